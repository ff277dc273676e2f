# SPDX-License-Identifier: Apache-2.0
"""`stamina benchmark`: methods over a long sequence, or their settings on a short one."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.workspace import check_new_tokens, load_pipeline
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
from stamina_adapters.continual.store import Lock, RunStore, write_whole
from stamina_adapters.continual.studio import Studio
from stamina_adapters.continual.tune import trials_of, tuned, tuning_rows
from stamina_adapters.embedded import load_encoder
from stamina_adapters.evaluation.clip import ClipEmbedder
from stamina_adapters.evaluation.embedder import Embedder, EncoderEmbedder
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.trainer import ContinualTrainer

_FORMAT = 1


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


@contextmanager
def _full_disk_is_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"--output {str(folder)!r}: the disk is full; free some and give the same command "
            "again, finished concepts are kept"
        ) from error


def _for_tuning(spec: BenchmarkSpec, count: int) -> BenchmarkSpec:
    """The specification with the tuning concepts in the place of the evaluated ones."""
    changes = {"checkpoints": (count,), "pairs": 0, "shown": (), "ceiling": None}
    return spec.model_copy(update=changes)


def _open(
    sequence: Path,
    methods: str | None,
    output: Path,
    tuning: bool,
    registry: Registry | None,
    console: Console,
) -> tuple[_Session, list[str]]:
    spec = load_spec(sequence)
    registry = registry or default_registry()
    lines = chosen_lines(spec, methods, registry)
    material = load_material(spec, tuning)
    if tuning:
        trials_of(spec, lines, registry)
        spec = _for_tuning(spec, len(material.concepts))
    spec.check_count(len(material.concepts), f"--sequence {str(sequence)!r}")
    pipe = load_pipeline(spec.model or model_path())
    check_new_tokens(pipe, [c.spec for c in material.concepts], "--concepts_list")
    for name in lines:
        line = spec.line(name)
        training = spec.training_of(line.training, 0, f"--sequence: methods.{name}.training")
        method = registry.make(str(line.method), line.settings, f"--sequence: methods.{name}")
        # for its checks of resolution and of what the model predicts
        ContinualTrainer(pipe, method, training)
    origin = PipelineSnapshot(pipe)
    identity = {
        "format": _FORMAT,
        "purpose": "tuning" if tuning else "evaluation",
        "spec": spec.model_dump(mode="json"),
        "inputs": {"model": origin.digest(), "pictures": material.digest()},
    }
    check_folder(output, identity)
    # a run keeps the weights that it changed and what its method carries
    check_room(output, len(lines) * origin.bytes)
    judged = embedder(spec.clip)
    judge = Judge(judged, [c.real for c in material.concepts], material.others)
    claim_folder(output, identity)
    return _Session(spec, material, judge, output, registry, console), lines


def _run(
    session: _Session,
    plan: Plan,
    folder: Path,
    name: str,
    settings: dict[str, Any],
    seed: int,
    *,
    rows: str = "rows.jsonl",
    pictures: bool = False,
    on_task: Callable[[], None] = lambda: None,
) -> list[SummaryRow]:
    """One run, from where its folder is; returns its summaries."""
    line = session.spec.line(name)
    with Lock(folder):
        store = RunStore(folder, rows)
        for _ in range(store.done):
            on_task()
        if store.done < len(session.material.concepts):
            where = f"--sequence: methods.{name}"
            training = session.spec.training_of(line.training, seed, f"{where}.training")
            method = session.registry.make(str(line.method), settings, where)
            workload = CustomiseWorkload(plan, session.pipeline(), method, training, name, pictures)

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
        f"{row.method}, seed {row.seed}, {row.concepts} concepts: accuracy "
        f"{row.accuracy_after_learning:.2f} after learning, {row.accuracy_final:.2f} now, "
        f"A_mmd {row.a_mmd:.3f}{drift}, {row.seconds:.0f} s"
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
    numbers = chosen_seeds(seeds)
    session, lines = _open(sequence, methods, output, False, registry, console)
    tasks = len(session.material.concepts)
    with _full_disk_is_told(output), RunProgress(console, keep=False) as progress:
        with Lock(output / "levels", wait=True):
            count = progress.counting("levels", tasks)
            plan = session.plan(progress)
            levels = find_levels(
                session.pipeline(),
                session.spec,
                session.material,
                session.judge,
                plan.studio,
                output / "levels" / "rows.jsonl",
                lambda: count(1),
            )
        plan = session.plan(progress, levels)
        count_all = progress.counting("concepts, all runs", tasks * len(lines) * len(numbers))
        failures = []
        for seed in numbers:
            for name in lines:
                try:
                    _run(
                        session,
                        plan,
                        output / name / f"seed-{seed}",
                        name,
                        session.spec.line(name).settings,
                        seed,
                        pictures=seed == session.spec.shown_seed,
                        on_task=lambda: count_all(1),
                    )
                except TaskFailedError as error:
                    # the others can still be run
                    failures.append(str(error))
                    console.print(f"failed: {error}", soft_wrap=True, markup=False)
    if failures:
        raise InputError(f"{len(failures)} runs failed, the others are whole: {failures[0]}")
    console.print(f"rows in {output}; make a page of them with stamina report", soft_wrap=True)


def tune(
    sequence: Path,
    methods: str | None,
    output: Path,
    console: Console,
    registry: Registry | None = None,
) -> None:
    """Check everything, then try settings; see `stamina benchmark --help`."""
    session, lines = _open(sequence, methods, output, True, registry, console)
    spec, found = load_spec(sequence), session.registry
    trials = trials_of(spec, lines, found)
    folder = output / "tuning"
    total = len(session.material.concepts) * sum(map(len, trials.values()))
    with _full_disk_is_told(output), RunProgress(console, keep=False) as progress:
        plan = session.plan(progress)
        count = progress.counting("concepts, all trials", total)
        for name, tried in trials.items():
            outcomes: list[SummaryRow | str] = []
            for trial, settings in enumerate(tried):
                place = folder / name / f"trial-{trial + 1:02d}"
                try:
                    # not .jsonl: a trial is no run of the report's
                    outcomes += _run(
                        session,
                        plan,
                        place,
                        name,
                        settings,
                        spec.tuning.seed,
                        rows="trial.rows",
                        on_task=lambda: count(1),
                    )
                except TaskFailedError as error:
                    outcomes.append(str(error))
            rows = tuning_rows(
                name, tried, outcomes, spec.tuning.seed, session.spec.checkpoints[-1]
            )
            write_whole(folder / f"{name}.jsonl", "".join(map(to_line, rows)).encode())
            picked = [row.settings for row in rows if row.picked]
            what = f"picked {picked[0]}" if picked else f"every trial failed: {rows[0].failed}"
            console.print(f"{name}: {what}", soft_wrap=True, highlight=False, markup=False)
    results = read_rows(sorted(folder.glob("*.jsonl")), "--output")
    chosen = tuned(spec, [row for row in results if isinstance(row, TuningRow)])
    write_whole(output / "tuned.json", (chosen.model_dump_json(indent=1) + "\n").encode())
    console.print(f"specification with what was picked: {output / 'tuned.json'}", soft_wrap=True)
