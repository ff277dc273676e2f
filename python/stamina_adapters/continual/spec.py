# SPDX-License-Identifier: Apache-2.0
"""The specification of a benchmark: a JSON file that says everything but methods and seeds to run.

Relative paths in the file are relative to it, and those in a list of concepts that it names to the
list. Unknown keys are refused.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stamina_adapters.training.config import TrainingConfig, describe
from stamina_adapters.training.errors import InputError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EmbeddedConcepts(_Part):
    """Identities of the embedded world, faces and landmarks in turn.

    The concepts to evaluate are `count` of the split "sequence" after its first `start`; the ones
    to tune on are of the split "tuning", so the two never overlap. Every picture is judged among
    `identities`: the learned ones and distractors, which are no evaluation concepts while tuning.
    """

    source: Literal["embedded"] = "embedded"
    start: int = Field(0, ge=0, lt=100, description="identities of the sequence to pass over")
    count: int = Field(50, ge=1, le=100)
    tuning: int = Field(5, ge=1, le=6)
    identities: int = Field(50, ge=2, le=106)
    pictures: int = Field(12, ge=1, description="pictures to learn a concept from")
    real_pictures: int = Field(16, ge=1, description="other real pictures, to compare with")

    @model_validator(mode="after")
    def _enough(self) -> "EmbeddedConcepts":
        if self.identities < self.count:
            raise ValueError(f"identities {self.identities} must not be below count {self.count}")
        if self.start + self.count > 100:
            raise ValueError(
                f"start {self.start} and count {self.count} must not exceed the 100 identities"
            )
        return self


class FolderConcepts(_Part):
    """Image folders, as `stamina train` takes them; real pictures are those learned from.

    Relative folders in a list are relative to the list, not to the working directory.

    `families` holds one word for each concept, for the level that the family's word alone reaches;
    without it that level is left out.
    """

    source: Literal["folders"]
    concepts_list: Path
    tuning_list: Path | None = None
    families: tuple[str, ...] = ()


class PromptSpec(_Part):
    """Prompts of embedded concepts and of every family and pair; folders bring their own."""

    concept: str = "a photo of {token}"
    family: str = "a photo of a {family}"
    pair: str = "a photo of {first} and {second}"

    @model_validator(mode="after")
    def _fields(self) -> "PromptSpec":
        for name, words in (
            ("concept", {"token": "x"}),
            ("family", {"family": "x"}),
            ("pair", {"first": "x", "second": "y"}),
        ):
            prompt = getattr(self, name)
            missing = [word for word in words if f"{{{word}}}" not in prompt]
            if missing:
                raise ValueError(f"prompt {name!r} must hold {{{missing[0]}}}, got {prompt!r}")
            try:
                prompt.format(**words)
            except (KeyError, ValueError, IndexError) as error:
                raise ValueError(f"prompt {name!r} holds a field it must not: {error}") from error
        # a concept's token is one of its prompt's words
        if "{token}" not in self.concept.split():
            raise ValueError(
                f"prompt 'concept' must hold {{token}} between spaces, got {self.concept!r}"
            )
        return self


class SamplingSpec(_Part):
    """How pictures are drawn; picture k of every prompt starts from the noise of noise_seed + k."""

    num_inference_steps: int = Field(10, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    scheduler: Literal["model", "ddim", "dpmsolver"] = "model"
    pictures: int = Field(16, ge=1, description="pictures of each prompt")
    batch_size: int = Field(64, ge=1, description="pictures drawn together, of any prompts")
    noise_seed: int = Field(10_000, ge=0, lt=2**62)


class CeilingSpec(_Part):
    """Each embedded concept learned alone, keys and values in full; see `embedded.ceiling`."""

    steps: int = Field(120, ge=1)
    rate: float = Field(2e-3, gt=0)


class MethodSpec(_Part):
    """One line of the comparison: a registered method, and what differs from its defaults.

    `method` None means that the line is named as the method. `settings` are the method's own;
    `training` replaces fields of the benchmark's training, for this line alone: those that the
    trainer or the method reads.
    """

    method: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)


class TuningSpec(_Part):
    """How settings are chosen: trials for each method, None: as many as its list holds."""

    trials: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)


class BenchmarkSpec(_Part):
    """A benchmark; `description` says what was chosen and why."""

    name: str = Field(min_length=1)
    description: str = ""
    model: Path | None = Field(None, description="pipeline folder; None: the embedded model")
    clip: Path | None = Field(None, description="CLIP that judges; None: the shipped encoder")
    concepts: Annotated[EmbeddedConcepts | FolderConcepts, Field(discriminator="source")]
    prompts: PromptSpec = Field(default_factory=lambda: PromptSpec.model_validate({}))
    sampling: SamplingSpec = Field(default_factory=lambda: SamplingSpec.model_validate({}))
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    checkpoints: tuple[int, ...] = Field((1, 5, 10, 25, 50), min_length=1)
    pairs: int = Field(8, ge=0, description="pairs of concepts in one prompt, at the last one")
    shown: tuple[int, ...] = Field((), description="tasks whose pictures the report shows")
    shown_seed: int = Field(0, ge=0, description="the run whose pictures those are")
    shown_pictures: int = Field(3, ge=1)
    ceiling: CeilingSpec | None = None
    tuning: TuningSpec = Field(default_factory=lambda: TuningSpec.model_validate({}))
    methods: dict[str, MethodSpec] = Field(default_factory=dict)

    @field_validator("checkpoints", "shown")
    @classmethod
    def _ascending(cls, tasks: tuple[int, ...]) -> tuple[int, ...]:
        if any(task < 1 for task in tasks) or list(tasks) != sorted(set(tasks)):
            raise ValueError("must be ascending task numbers, each once, from 1")
        return tasks

    @field_validator("training")
    @classmethod
    def _no_seed(cls, training: TrainingConfig) -> TrainingConfig:
        if training.seed:
            raise ValueError(f"seed {training.seed} is not read: seeds come from --seeds")
        return training

    @model_validator(mode="after")
    def _ceiling_is_embedded(self) -> "BenchmarkSpec":
        if self.ceiling is not None and self.concepts.source != "embedded":
            raise ValueError("ceiling is for embedded concepts; set it to null")
        return self

    def check_count(self, count: int, argument: str) -> None:
        """Raise `InputError` unless the checkpoints end at the last of `count` concepts."""
        if self.checkpoints[-1] != count:
            raise InputError(
                f"{argument}: checkpoints end at {self.checkpoints[-1]}, the sequence has {count} "
                "concepts; make the last checkpoint the last concept"
            )
        if self.shown and self.shown[-1] > count:
            raise InputError(
                f"{argument}: shown names task {self.shown[-1]}, the sequence has {count}"
            )

    def line(self, name: str) -> MethodSpec:
        """What a line of the comparison runs, its `method` filled in."""
        found = self.methods.get(name, MethodSpec())
        return found.model_copy(update={"method": found.method or name})

    def training_of(self, overrides: dict[str, Any], seed: int, argument: str) -> TrainingConfig:
        """The training settings with some replaced. Raises `InputError` for values out of range."""
        try:
            return TrainingConfig(**{**self.training.model_dump(), **overrides, "seed": seed})
        except ValidationError as error:
            raise InputError(f"{argument}: {describe(error)}") from error


def load_spec(file: Path, argument: str = "--sequence") -> BenchmarkSpec:
    """Read a specification. Raises `InputError` for a file that is none, naming what is wrong."""
    where = f"{argument} {str(file)!r}"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({error}); give a specification") from error
    try:
        spec = BenchmarkSpec.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {describe(error)}") from error
    return _resolved(spec, file.absolute().parent)


def _resolved(spec: BenchmarkSpec, folder: Path) -> BenchmarkSpec:
    """The specification with its paths made absolute."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else folder / path

    changes: dict[str, Any] = {"model": at(spec.model), "clip": at(spec.clip)}
    if isinstance(spec.concepts, FolderConcepts):
        paths = {
            name: at(getattr(spec.concepts, name)) for name in ("concepts_list", "tuning_list")
        }
        changes["concepts"] = spec.concepts.model_copy(update=paths)
    return spec.model_copy(update=changes)
