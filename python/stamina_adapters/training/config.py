# SPDX-License-Identifier: Apache-2.0
"""Typed settings of a training run, and the list of concepts it learns.

The published method does not print its sizes. Every default here is this library's own choice,
found on the embedded model's tuning identities, and declared as such.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stamina_adapters.training.errors import InputError

_PLACEHOLDER = re.compile(r"<[^<>\s]+>")


def placeholders(prompt: str) -> list[str]:
    """The `<...>` words of a prompt, in order, each once."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(prompt)))


class TrainingConfig(BaseModel):
    """How one concept is learned; the same settings serve every concept of a run.

    Rates are AdamW's. The formulas of the terms are in `stamina_adapters.training.penalties` and
    `stamina_adapters.training.preservation`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_train_steps: int = Field(100, ge=1, description="optimiser steps for each concept")
    train_batch_size: int = Field(8, ge=1, description="latents in a step")
    learning_rate: float = Field(2e-2, gt=0, description="rate of the low-rank factors A and B")
    mask_learning_rate: float = Field(2e-2, gt=0, description="rate of the mask generators")
    token_learning_rate: float = Field(1e-1, gt=0, description="rate of the token's MLP")
    lr_scheduler: Literal["constant", "linear"] = Field(
        "linear",
        description="constant (rates stay) or linear (they fall to 0 over a concept's steps)",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(0.0, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="global L2 norm each group is clipped to")
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; None: no weighting")
    hard_fraction: float = Field(
        0.2, ge=0, le=1, description="last part of the steps, trained with the committed masks"
    )
    forget_weight: float = Field(0.0, ge=0, description="lambda of the forgetting penalty")
    preserve_weight: float = Field(
        2.0, ge=0, description="nu of the term that keeps earlier prompts' keys and values"
    )
    precondition: float = Field(
        10.0, ge=0, description="eta: how much less B moves where earlier prompts are; 0: no less"
    )
    sparse_weight: float = Field(1.0, ge=0, description="mu of the density hinges; 0: none")
    target_density: float = Field(0.5, gt=0, lt=1, description="density the masks come down to")
    min_density: float = Field(0.15, ge=0, lt=1, description="density they are kept above")
    sparse_start: float = Field(
        0.1, ge=0, le=1, description="part of the steps after which the target comes down"
    )
    sparse_end: float = Field(
        0.5, ge=0, le=1, description="part of the steps after which the target is final"
    )
    density_every: int = Field(
        5, ge=1, description="steps between two measurements of density, a twelfth of all at most"
    )
    resolution: int | None = Field(
        None, ge=8, description="side of the square pictures in pixels; None: the pipeline's own"
    )
    hflip: bool = Field(False, description="learn from mirrored pictures too")
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _in_order(self) -> "TrainingConfig":
        if self.sparse_start > self.sparse_end:
            raise ValueError(
                f"sparse_start {self.sparse_start} must not exceed sparse_end {self.sparse_end}"
            )
        if self.min_density >= self.target_density:
            raise ValueError(
                f"min_density {self.min_density} must be below target_density {self.target_density}"
            )
        return self

    @property
    def first_hard_step(self) -> int:
        """The first step that is trained with the committed masks."""
        return round((1 - self.hard_fraction) * self.max_train_steps)

    def measures_density(self, step: int) -> bool:
        """Whether the densities that steer the hinges are measured before this step.

        In a short run masks go from full to nearly empty in less than `density_every` steps.
        """
        most = max(1, self.max_train_steps // 12)
        return step % min(self.density_every, most) == 0


TRAINER_FIELDS = frozenset(
    (
        "max_train_steps", "train_batch_size", "lr_scheduler", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "max_grad_norm", "snr_gamma", "resolution", "hflip",
    )
)  # fmt: skip
"""Fields of `TrainingConfig` that the trainer reads; all others but the seed are methods'."""
METHOD_FIELDS = frozenset(TrainingConfig.model_fields) - TRAINER_FIELDS - {"seed"}


class ConceptSpec(BaseModel):
    """One concept: the prompt that names it and the folder that shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_prompt: str
    instance_data_dir: Path
    token: str = ""

    @field_validator("instance_prompt")
    @classmethod
    def _prompt_not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("must not be blank")
        return prompt

    @model_validator(mode="before")
    @classmethod
    def _token_from_prompt(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("token"):
            found = placeholders(str(values.get("instance_prompt", "")))
            if len(found) != 1:
                raise ValueError(
                    f"instance_prompt holds {len(found)} words like <v1>; "
                    "write exactly one, or name the new word with 'token'"
                )
            return {**values, "token": found[0]}
        return values

    @model_validator(mode="after")
    def _token_in_prompt(self) -> "ConceptSpec":
        if self.token not in self.instance_prompt.split():
            raise ValueError(
                f"token {self.token!r} is not a word of instance_prompt {self.instance_prompt!r}; "
                "write it there with a space on either side, before a comma too"
            )
        if not self.name:
            raise ValueError(f"token {self.token!r} is nothing but brackets; put a name in them")
        return self

    @property
    def name(self) -> str:
        """The token without its brackets, safe as a file name and a module name."""
        return re.sub(r"[^A-Za-z0-9_-]+", "_", self.token.strip("<>"))

    def seed(self, run_seed: int) -> int:
        """The concept's own seed in [0, 2^63): SHA-256 of "run seed/token", first 63 bits."""
        digest = hashlib.sha256(f"{run_seed}/{self.token}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def describe(error: ValidationError) -> str:
    """The first fault of a pydantic validation in one line: the key, and what is wrong with it."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"key {key!r} is missing; add it"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; remove it"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {first['input']!r}" if key else message


def load_concepts_list(path: Path, folder: Path | None = None) -> list[ConceptSpec]:
    """Read a concepts list: a JSON list of objects with the keys of `ConceptSpec`.

    A relative `instance_data_dir` is relative to `folder`: None is the working directory, as the
    commands take a list; those that a benchmark's specification names are given their own folder.

    Raises `InputError` when the file is missing, is no such list, holds an unknown key, or names
    one token twice.
    """
    argument = f"--concepts_list {str(path)!r}"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{argument}: cannot be read ({error.strerror}); give a JSON file"
        ) from error
    except ValueError as error:
        raise InputError(f"{argument}: is not JSON ({error}); give a list of concepts") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{argument}: must be a JSON list with at least one concept")
    concepts: list[ConceptSpec] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{argument}: entry {index} must be an object, not {entry!r}")
        try:
            concept = ConceptSpec.model_validate(entry)
        except ValidationError as error:
            raise InputError(f"{argument}: entry {index}: {describe(error)}") from error
        if folder is not None:
            images = folder / concept.instance_data_dir
            concept = concept.model_copy(update={"instance_data_dir": images})
        concepts.append(concept)
    check_distinct(concepts, argument)
    return concepts


def pictures_argument(index: int, file: Path | None) -> str:
    """What a message about the pictures of a list's entry begins with; None: of no list."""
    entry = "" if file is None else f"--concepts_list {str(file)!r}: entry {index}: "
    return f"{entry}instance_data_dir"


def check_distinct(concepts: list[ConceptSpec], argument: str) -> None:
    """Raise `InputError` when two concepts share a token, or a file name made from it.

    Case makes no difference: CLIP's tokenizers turn words to lower case, and some file systems do
    not tell names apart by it.
    """
    for what in ("token", "name"):
        seen: set[str] = set()
        for index, concept in enumerate(concepts):
            value = getattr(concept, what)
            if value.lower() in seen:
                raise InputError(
                    f"{argument}: entry {index}: {what} {value!r} is used twice, case aside; "
                    "rename one"
                )
            seen.add(value.lower())
