# SPDX-License-Identifier: Apache-2.0
"""`stamina benchmark`: methods over a long sequence, or their settings on a short one."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console

from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.workspace import (
    check_inference_steps,
    check_length,
    check_new_tokens,
    counted,
    full_disk_is_told,
    load_pipeline,
)
from stamina_adapters.continual.customise import CustomiseWorkload, Plan
from stamina_adapters.continual.folder import check_folder, check_room, claim_folder
from stamina_adapters.continual.levels import find_levels
from stamina_adapters.continual.materials import Material, load_material
from stamina_adapters.continual.registry import (
    Registry,
    chosen_lines,
    chosen_seeds,
    default_registry,
)
from stamina_adapters.continual.rows import LevelRow, SummaryRow, TuningRow, read_rows, to_line
from stamina_adapters.continual.run import TaskFailedError, run_tasks
from stamina_adapters.continual.snapshot import PipelineSnapshot
from stamina_adapters.continual.spec import BenchmarkSpec, load_spec
from stamina_adapters.continual.store import Lock, RunStore, tasks_done
from stamina_adapters.continual.studio import Studio
from stamina_adapters.continual.tune import trials_of, tuned, tuning_rows
from stamina_adapters.embedded import load_encoder
from stamina_adapters.evaluation.clip import ClipEmbedder
from stamina_adapters.evaluation.embedder import Embedder, EncoderEmbedder
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.evaluation.kid import metric_class
from stamina_adapters.files import write_beside
from stamina_adapters.training.config import (
    TRAINER_FIELDS,
    ConceptSpec,
    TrainingConfig,
    describe,
)
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.trainer import ContinualTrainer

_FORMAT = 1


@dataclass(frozen=True)
class _Run:
    """One run to do: its folder, its line of the specification, and the settings that it has."""

    folder: Path
    name: str
    settings: dict[str, Any]
    seed: int
    rows: str = "rows.jsonl"

    def identity(self, spec: BenchmarkSpec) -> dict[str, Any]:
        """What may not change while the run goes on."""
        line = spec.line(self.name)
        return {
            "format": _FORMAT,
            "method": line.method,
            "settings": self.settings,
            "training": line.training,
            "seed": self.seed,
        }

    def make(self, spec: BenchmarkSpec, registry: Registry) -> tuple[Any, TrainingConfig]:
        """Its method and training settings. Raises `InputError` for settings that do not fit."""
        line, where = spec.line(self.name), f"--sequence: methods.{self.name}"
        training = spec.training_of(line.training, self.seed, f"{where}.training")
        method = registry.make(str(line.method), self.settings, where)
        if unread := sorted(line.training.keys() - TRAINER_FIELDS - method.reads):
            raise InputError(
                f"{where}.training: {line.method!r} does not read {', '.join(unread)}; its own "
                "settings go under 'settings', seeds come from --seeds"
            )
        return method, training


@dataclass(frozen=True)
class _Session:
    """A checked call: everything that can be wrong before training has been looked at."""

    spec: BenchmarkSpec
    material: Material
    judge: Judge
    folder: Path
    registry: Registry
    console: Console

    def pipeline(self) -> Any:
        """The model as it is on disk."""
        return load_pipeline(self.spec.model or model_path())

    def plan(self, progress: RunProgress, levels: Sequence[LevelRow] = ()) -> Plan:
        studio = Studio(self.spec.sampling, progress.counting)
        return Plan(self.spec, self.material, self.judge, studio, levels, progress.training)


def embedder(clip: Path | None) -> Embedder:
    """CLIP from a folder, or the shipped encoder."""
    return EncoderEmbedder(load_encoder()) if clip is None else ClipEmbedder.from_folder(clip)


def _for_tuning(spec: BenchmarkSpec, count: int) -> BenchmarkSpec:
    """The specification with the tuning concepts in the place of the evaluated ones."""
    changes = {"checkpoints": (count,), "pairs": 0, "shown": (), "ceiling": None}
    return spec.model_copy(update=changes)


def _try(pipe: Any, method: Any, concept: ConceptSpec, training: TrainingConfig, name: str) -> None:
    """Attach to a copy of the models. Raises `InputError` for settings that do not fit them."""
    trial = copy.copy(pipe)
    for part in ("unet", "text_encoder", "tokenizer"):
        setattr(trial, part, copy.deepcopy(getattr(pipe, part)))
    where = f"--sequence: methods.{name}"
    try:
        method.attach(trial, concept, training)
    except ValidationError as error:
        raise InputError(f"{where}: {describe(error)}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error


def _check_lengths(pipe: Any, spec: BenchmarkSpec, material: Material) -> None:
    """Raise `InputError` for a pair's or a family's prompt that the model would cut short."""
    prompts = {spec.prompts.pair.format(first="a", second="a"): "pair"} if spec.pairs else {}
    families = {concept.family for concept in material.concepts if concept.family}
    prompts |= {spec.prompts.family.format(family=family): "family" for family in families}
    for prompt, name in prompts.items():
        check_length(pipe, prompt, f"--sequence: prompts.{name}")


def _check_runs(
    spec: BenchmarkSpec,
    pipe: Any,
    concept: ConceptSpec,
    runs: Sequence[_Run],
    registry: Registry,
) -> None:
    for run in runs:
        method, training = run.make(spec, registry)
        # for its checks of resolution and of what the model predicts
        ContinualTrainer(pipe, method, training)
        # whether settings fit a model does not depend on the seed
        if run.seed == runs[0].seed:
            _try(pipe, method, concept, training, run.name)
        check_folder(run.folder, run.identity(spec))


def _open(
    spec: BenchmarkSpec,
    material: Material,
    runs: Sequence[_Run],
    output: Path,
    purpose: str,
    registry: Registry,
    console: Console,
) -> _Session:
    """Check everything, then claim the output folder."""
    metric_class()
    spec.check_count(len(material.concepts), "--sequence")
    pipe = load_pipeline(spec.model or model_path())
    check_new_tokens(pipe, [c.spec for c in material.concepts], "--concepts_list")
    _check_lengths(pipe, spec, material)
    steps = spec.sampling.num_inference_steps
    check_inference_steps(pipe, steps, "--sequence: sampling.num_inference_steps")
    origin = PipelineSnapshot(pipe)
    identity = {
        "format": _FORMAT,
        "purpose": purpose,
        # methods may join later: each run has an identity of its own
        "spec": spec.model_dump(mode="json", exclude={"methods", "description"}),
        "inputs": {"model": origin.digest(), "pictures": material.digest()},
    }
    check_folder(output, identity)
    _check_runs(spec, pipe, material.concepts[0].spec, runs, registry)
    # The state of a run is at most a pipeline and what its method carries, written one at a time.
    # Where the disk fills up later, what is finished is kept.
    if any(tasks_done(run.folder) < len(material.concepts) for run in runs):
        check_room(output, origin.bytes)
    judge = Judge(embedder(spec.clip), [c.real for c in material.concepts], material.others)
    with Lock(output, wait=True):
        claim_folder(output, identity)
    return _Session(spec, material, judge, output, registry, console)


def _do(session: _Session, plan: Plan, run: _Run, on_task: Callable[[], None]) -> list[SummaryRow]:
    """One run, from where its folder is; returns its summaries."""
    with Lock(run.folder):
        claim_folder(run.folder, run.identity(session.spec))
        store = RunStore(run.folder, run.rows)
        for _ in range(store.done):
            on_task()
        if store.done < len(session.material.concepts):
            method, training = run.make(session.spec, session.registry)
            pictures = run.seed == session.spec.shown_seed
            workload = CustomiseWorkload(
                plan, session.pipeline(), method, training, run.name, pictures
            )

            def told(task: int, written: Sequence[BaseModel]) -> None:
                on_task()
                for row in written:
                    if isinstance(row, SummaryRow):
                        session.console.print(_sentence(row), soft_wrap=True, highlight=False)

            run_tasks(workload, store, told)
        return store.rows(SummaryRow)


def _sentence(row: SummaryRow) -> str:
    drift = "" if row.f_mmd is None else f", F_mmd {row.f_mmd:.3f}"
    return (
        f"{row.method}, seed {row.seed}, {counted(row.concepts, 'concept')}: accuracy "
        f"{row.accuracy_after_learning:.2f} after learning, {row.accuracy_final:.2f} now, "
        f"A_mmd {row.a_mmd:.3f}{drift}, {row.seconds:.0f} s"
    )


def _levels(session: _Session, progress: RunProgress) -> list[LevelRow]:
    with Lock(session.folder / "levels", wait=True):
        count = progress.counting("levels", len(session.material.concepts))
        return find_levels(
            session.pipeline(),
            session.spec,
            session.material,
            session.judge,
            session.plan(progress).studio,
            session.folder / "levels" / "rows.jsonl",
            lambda: count(1),
        )


def benchmark(
    sequence: Path,
    methods: str | None,
    seeds: str,
    output: Path,
    console: Console,
    registry: Registry | None = None,
) -> None:
    """Check everything, then run; see `stamina benchmark --help`."""
    spec, registry = load_spec(sequence), registry or default_registry()
    numbers, lines = chosen_seeds(seeds), chosen_lines(spec, methods, registry)
    runs = [
        _Run(output / name / f"seed-{seed}", name, spec.line(name).settings, seed)
        for seed in numbers
        for name in lines
    ]
    material = load_material(spec)
    session = _open(spec, material, runs, output, "evaluation", registry, console)
    finished = all(tasks_done(run.folder) == len(material.concepts) for run in runs)
    failures = []
    with full_disk_is_told(output, "--output"), RunProgress(console, keep=False) as progress:
        plan = session.plan(progress, _levels(session, progress))
        count = progress.counting("concepts, all runs", len(material.concepts) * len(runs))
        for run in runs:
            try:
                _do(session, plan, run, lambda: count(1))
            except TaskFailedError as error:
                # the others can still be run
                failures.append(str(error))
                console.print(f"failed: {error}", soft_wrap=True, markup=False)
    if failures:
        failed = counted(len(failures), "run")
        raise InputError(f"{failed} failed, the others are whole: {failures[0]}")
    already = f"nothing left to do, {counted(len(runs), 'run')} finished: " if finished else ""
    told = f"{already}rows in {output}; make a page of them with stamina report"
    console.print(told, soft_wrap=True, markup=False)


def tune(
    sequence: Path,
    methods: str | None,
    output: Path,
    console: Console,
    registry: Registry | None = None,
) -> None:
    """Check everything, then try settings; see `stamina benchmark --help`."""
    spec, registry = load_spec(sequence), registry or default_registry()
    trials = trials_of(spec, chosen_lines(spec, methods, registry), registry)
    folder, seed = output / "tuning", spec.tuning.seed
    runs = {
        name: [
            # not .jsonl: a trial is no run of the report's
            _Run(folder / name / f"trial-{number:02d}", name, settings, seed, "trial.rows")
            for number, settings in enumerate(tried, 1)
        ]
        for name, tried in trials.items()
    }
    material = load_material(spec, tuning=True)
    concepts = len(material.concepts)
    everything = [run for tried in runs.values() for run in tried]
    short = _for_tuning(spec, concepts)
    session = _open(short, material, everything, output, "tuning", registry, console)
    with full_disk_is_told(output, "--output"), RunProgress(console, keep=False) as progress:
        plan = session.plan(progress)
        count = progress.counting("concepts, all trials", concepts * len(everything))
        for name, tried in runs.items():
            outcomes: list[SummaryRow | str] = []
            for run in tried:
                try:
                    outcomes += _do(session, plan, run, lambda: count(1))
                except TaskFailedError as error:
                    outcomes.append(str(error))
            rows = tuning_rows(name, trials[name], outcomes, seed, concepts)
            write_beside(folder / f"{name}.jsonl", "".join(map(to_line, rows)).encode())
            console.print(_picked(name, rows), soft_wrap=True, highlight=False, markup=False)
    results = read_rows(sorted(folder.glob("*.jsonl")), "--output")
    chosen = tuned(spec, [row for row in results if isinstance(row, TuningRow)])
    write_beside(output / "tuned.json", (chosen.model_dump_json(indent=1) + "\n").encode())
    console.print(
        f"specification with what was picked: {output / 'tuned.json'}", soft_wrap=True, markup=False
    )


def _picked(name: str, rows: Sequence[TuningRow]) -> str:
    for row in rows:
        if row.picked:
            return f"{name}: picked {row.settings}, accuracy {row.accuracy_final} at the end"
    return f"{name}: every trial failed: {rows[0].failed}"
