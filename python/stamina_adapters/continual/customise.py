# SPDX-License-Identifier: Apache-2.0
"""Tasks that are concepts of a diffusion model: learn, draw, judge, and what to go on from."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from pydantic import BaseModel
from torch import Tensor

from stamina_adapters.continual.masks import mask_bits, overlaps, shared, union, weighted_density
from stamina_adapters.continual.materials import Material
from stamina_adapters.continual.memory import PeakMemory
from stamina_adapters.continual.rows import (
    CheckpointRow,
    ConceptRow,
    FailedRow,
    LevelRow,
    PictureRow,
    RunRow,
    SummaryRow,
)
from stamina_adapters.continual.run import TaskFailedError
from stamina_adapters.continual.score import (
    checkpoint_row,
    chosen_pairs,
    concept_scores,
    pair_row,
    summary_row,
)
from stamina_adapters.continual.snapshot import PipelineSnapshot
from stamina_adapters.continual.spec import BenchmarkSpec
from stamina_adapters.continual.studio import Studio
from stamina_adapters.continual.thumbnails import encode
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.methods import Method
from stamina_adapters.training.trainer import ConceptLog, ContinualTrainer, StepReport


class _Observed:
    """A method that is looked at while it learns; everything else is the method's own."""

    def __init__(self, method: Method) -> None:
        self._method, self.trained = method, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        groups = self._method.attach(pipe, concept, config)
        self.trained = sum(p.numel() for group in groups for p in group["params"])
        return groups


@dataclass(frozen=True)
class Plan:
    """What all runs of a benchmark share."""

    spec: BenchmarkSpec
    material: Material
    judge: Judge
    studio: Studio
    levels: Sequence[LevelRow] = ()
    on_training: Callable[[str, int], Callable[[StepReport], None]] | None = None


@dataclass
class _Progress:
    """What a run has gathered; all of it is in the snapshot or in the rows."""

    learned: list[Tensor] = field(default_factory=list)
    masks: list[dict[str, Tensor]] = field(default_factory=list)
    concepts: list[ConceptRow] = field(default_factory=list)


class CustomiseWorkload:
    """One method, one seed, on a pipeline of its own that is as it was loaded."""

    def __init__(
        self,
        plan: Plan,
        pipe: Any,
        method: Method,
        training: TrainingConfig,
        label: str,
        pictures: bool = False,
    ) -> None:
        """`training.seed` is the run's; `pictures`: give the report pictures of `spec.shown`."""
        self.plan, self.pipe, self._pictures = plan, pipe, pictures
        self.tasks = len(plan.material.concepts)
        self._origin = PipelineSnapshot(pipe)
        self._observed = _Observed(method)
        observed: Any = self._observed
        self._trainer = ContinualTrainer(pipe, observed, training)
        self._labels: dict[str, Any] = {"method": label, "seed": training.seed}
        self._so_far = _Progress()
        self._state: dict[str, Tensor] | None = None

    def restore(
        self, tensors: dict[str, Tensor], facts: dict[str, Any], rows: Sequence[BaseModel]
    ) -> None:
        """See `Workload`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        self._origin.put(parts.get("pipeline", {}), facts["words"])
        self._observed.load_state_dict(self.pipe, parts.get("method", {}))
        learned = parts.get("learned", {})
        self._so_far.learned = [learned[str(task)] for task in range(len(learned))]
        self._so_far.masks = [{} for _ in learned]
        for name, words in parts.get("masks", {}).items():
            task, path = name.split("/", 1)
            self._so_far.masks[int(task)][path] = words
        self._so_far.concepts = [row for row in rows if isinstance(row, ConceptRow)]

    def _carried(self) -> dict[str, Tensor]:
        """What the method carries to the next concept: copied once, it may be a model's size."""
        if self._state is None:
            self._state = self._observed.state_dict()
        return self._state

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Workload`."""
        changed, words = self._origin.take()
        parts: dict[str, Mapping[str, Tensor]] = {
            "pipeline": changed,
            "method": self._carried(),
            "learned": {str(task): rows for task, rows in enumerate(self._so_far.learned)},
        }
        for task, masks in enumerate(self._so_far.masks):
            parts[f"masks/{task}"] = masks
        # clones, because a file can hold no two tensors that share memory
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().clone()
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        return tensors, {"words": words}

    def learn(self, task: int) -> list[BaseModel]:
        """Learn a concept and draw it; after a checkpoint's concept, draw and judge all so far."""
        self._state = None  # of the concept before; freed before memory is measured
        rows: list[BaseModel] = [self._run_row()] if task == 0 else []
        concept = self.plan.material.concepts[task]
        # for whatever draws from the global stream: the same, wherever the process began
        torch.manual_seed(concept.spec.seed(self._trainer.config.seed))
        title = f"{self._name} {task + 1}/{self.tasks}"
        on_step = None
        if self.plan.on_training is not None:
            on_step = self.plan.on_training(title, self._trainer.config.max_train_steps)
        with PeakMemory() as peak:
            state, log = self._train(task, on_step, rows)
        (images,) = self.plan.studio.draw(
            self.pipe, [concept.spec.instance_prompt], f"{title}, draw"
        )
        embeddings = self.plan.judge.embedder.embed(images)
        row = self._concept_row(task, state, log, embeddings, peak.mib)
        self._so_far.learned.append(embeddings)
        self._so_far.masks.append(mask_bits(state))
        self._so_far.concepts.append(row)
        rows.append(row)
        if self._shows(task):
            rows.append(self._picture_row("learned", task, images))
        if task + 1 in self.plan.spec.checkpoints:
            rows += self._checkpoint(task + 1, images)
        return rows

    def _train(
        self,
        task: int,
        on_step: Callable[[StepReport], None] | None,
        before: Sequence[BaseModel],
    ) -> tuple[Any, ConceptLog]:
        """`before`: the task's rows so far, which say whose a failure is."""
        concept = self.plan.material.concepts[task]
        try:
            return self._trainer.learn(concept.spec, concept.dataset, on_step)
        except InputError as error:
            reason = " ".join(str(error).split())
            failed = FailedRow(task=task + 1, reason=reason, **self._labels)
            raise TaskFailedError(
                f"{self._name} concept {failed.task}: {reason}", [*before, failed]
            ) from error

    @property
    def _name(self) -> str:
        return f"{self._labels['method']}, seed {self._labels['seed']},"

    def _shows(self, task: int) -> bool:
        return self._pictures and task + 1 in self.plan.spec.shown

    def _run_row(self) -> RunRow:
        config = self._trainer.config
        gpu = torch.cuda.is_available()
        return RunRow(
            benchmark=self.plan.spec.name,
            concepts=self.tasks,
            identities=self.plan.judge.identities,
            pictures=self.plan.spec.sampling.pictures,
            training=config.model_dump(mode="json"),
            settings=self._observed.settings(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
            device=torch.cuda.get_device_name() if gpu else "cpu",
            threads=torch.get_num_threads(),
            **self._labels,
        )

    def _concept_row(
        self, task: int, state: Any, log: ConceptLog, embeddings: Tensor, peak: float | None
    ) -> ConceptRow:
        concept = self.plan.material.concepts[task]
        model = self._origin.parameters
        carried = sum(t.numel() * t.element_size() for t in self._carried().values())
        mask, earlier = mask_bits(state), self._so_far.masks
        return ConceptRow(
            task=task + 1,
            concept=concept.name,
            token=concept.spec.token,
            family=concept.family,
            loss_sampled=log.probes[-1].sampled,
            loss_committed=log.probes[-1].committed,
            trained_percent=100 * self._observed.trained / model,
            stored_percent=100 * self._origin.grown() / model,
            carried_percent=100 * carried / self._origin.bytes,
            density=weighted_density(log.densities, self.pipe),
            overlap=shared(mask, union(earlier)) if mask else None,
            overlaps=overlaps(mask, earlier),
            seconds=log.seconds,
            peak_mib=peak,
            **concept_scores(self.plan.judge, embeddings, task),
            **self._labels,
        )

    def _picture_row(self, stage: Any, task: int, images: Sequence[Any]) -> PictureRow:
        shown = images[: self.plan.spec.shown_pictures]
        name = self.plan.material.concepts[task].name
        return PictureRow(
            stage=stage, task=task + 1, concept=name, data=encode(shown), **self._labels
        )

    def _checkpoint(self, after: int, last: list[Any]) -> list[BaseModel]:
        """Rows of a checkpoint; `last` are the newest concept's pictures, which still hold."""
        started = time.perf_counter()
        plan, so_far = self.plan, self._so_far
        prompts = [c.spec.instance_prompt for c in plan.material.concepts[: after - 1]]
        title = f"{self._name} all {after}, draw"
        drawn = [*plan.studio.draw(self.pipe, prompts, title), last] if prompts else [last]
        now = [plan.judge.embedder.embed(images) for images in drawn[:-1]] + [so_far.learned[-1]]
        checkpoint = checkpoint_row(
            plan.judge,
            so_far.learned,
            now,
            seconds=time.perf_counter() - started,
            **self._labels,
        )
        rows: list[BaseModel] = [checkpoint, self._summary(checkpoint)]
        if after == self.tasks:
            rows += [
                self._picture_row("final", k, drawn[k]) for k in range(after) if self._shows(k)
            ]
            rows += self._pairs(after)
        return rows

    def _summary(self, checkpoint: CheckpointRow) -> SummaryRow:
        chance = 1 / self.plan.judge.identities
        return summary_row(self._so_far.concepts, checkpoint, self.plan.levels, chance)

    def _pairs(self, after: int) -> list[BaseModel]:
        pairs = chosen_pairs(after, self.plan.spec.pairs)
        if not pairs:
            return []
        tokens = [concept.spec.token for concept in self.plan.material.concepts]
        prompts = [
            self.plan.spec.prompts.pair.format(first=tokens[a], second=tokens[b]) for a, b in pairs
        ]
        drawn = self.plan.studio.draw(self.pipe, prompts, f"{self._name} pairs, draw")
        return [
            pair_row(
                self.plan.judge,
                self.plan.judge.embedder.embed(images),
                a,
                b,
                after=after,
                **self._labels,
            )
            for (a, b), images in zip(pairs, drawn, strict=True)
        ]
