# SPDX-License-Identifier: Apache-2.0
"""Rows in files, sorted by benchmark, method and seed."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stamina_adapters.continual.report.agreement import check_agreement, told_differences
from stamina_adapters.continual.rows import (
    CheckpointRow,
    ConceptRow,
    FailedRow,
    PairRow,
    PictureRow,
    RunRow,
    SummaryRow,
    TuningRow,
    read_rows,
)
from stamina_adapters.training.errors import InputError

OURS = "stamina"


@dataclass
class Run:
    """The rows of one method with one seed."""

    run: RunRow
    file: Path
    concepts: list[ConceptRow] = field(default_factory=list)
    checkpoints: list[CheckpointRow] = field(default_factory=list)
    summaries: dict[int, SummaryRow] = field(default_factory=dict)
    pairs: list[PairRow] = field(default_factory=list)
    pictures: list[PictureRow] = field(default_factory=list)
    failed: FailedRow | None = None

    @property
    def learned(self) -> int:
        """How many concepts the run has learned so far."""
        return len(self.concepts)


@dataclass
class Benchmark:
    """The runs of one benchmark, by method, in the order of the report."""

    name: str
    methods: dict[str, list[Run]]

    @property
    def concepts(self) -> int:
        """The most concepts that any run has a summary of."""
        counts = [n for runs in self.methods.values() for run in runs for n in run.summaries]
        return max(counts, default=0)

    def summaries(self, method: str, concepts: int) -> list[SummaryRow]:
        """A method's summaries of that many concepts, one for each seed that got there."""
        runs = self.methods.get(method, [])
        return [run.summaries[concepts] for run in runs if concepts in run.summaries]

    def finished(self) -> list[str]:
        """The methods with a summary of all concepts."""
        return [name for name in self.methods if self.summaries(name, self.concepts)]

    def differences(self) -> str | None:
        """One line on versions, devices and threads of the runs where these differ, else None."""
        return told_differences([run.run for runs in self.methods.values() for run in runs])


@dataclass
class Results:
    """Everything that was found: the largest benchmark first."""

    benchmarks: list[Benchmark]
    tuning: list[TuningRow]
    real: dict[str, PictureRow]


def find_files(folders: Sequence[Path]) -> list[Path]:
    """All row files below the folders, each once. Raises `InputError` where there are none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"DIR {str(folder)!r}: no such folder; give one that holds rows")
        for file in sorted(folder.rglob("*.jsonl")):
            found.setdefault(file.resolve(), file)
    if not found:
        raise InputError(
            f"DIR {str(folders[0])!r}: holds no rows (*.jsonl); give a folder that stamina "
            "benchmark wrote"
        )
    return list(found.values())


def read_results(folders: Sequence[Path]) -> Results:
    """Read and sort all rows.

    Raises `InputError` for a line that is none, a run found twice, or runs of two experiments.
    """
    runs: dict[tuple[str, str, int], Run] = {}
    results = Results([], [], {})
    for file in find_files(folders):
        _read_file(file, runs, results)
    check_agreement((run.run, run.file) for run in runs.values())
    grouped: dict[str, dict[str, list[Run]]] = {}
    for (benchmark, method, _), run in sorted(runs.items()):
        grouped.setdefault(benchmark, {}).setdefault(method, []).append(run)
    made = [Benchmark(name, _ordered(methods)) for name, methods in grouped.items()]
    results.benchmarks = sorted(made, key=lambda one: -one.concepts)
    if not results.benchmarks and not results.tuning:
        raise InputError(f"DIR {str(folders[0])!r}: holds no row of a run; run a benchmark first")
    return results


def _read_file(file: Path, runs: dict[tuple[str, str, int], Run], results: Results) -> None:
    here: Run | None = None
    for row in read_rows([file], "DIR"):
        match row:
            case RunRow():
                key = (row.benchmark, row.method, row.seed)
                if key in runs:
                    raise InputError(
                        f"DIR: {str(runs[key].file)!r} and {str(file)!r} are both of {row.method}, "
                        f"seed {row.seed}; remove one"
                    )
                here = runs[key] = Run(row, file)
            case TuningRow():
                results.tuning.append(row)
            case PictureRow(stage="real"):
                results.real[row.concept] = row
            case (
                ConceptRow()
                | CheckpointRow()
                | FailedRow()
                | SummaryRow()
                | PairRow()
                | PictureRow()
            ):
                if here is None:
                    raise InputError(f"DIR: {str(file)!r} does not begin with its row of kind run")
                _put(here, row)
            case _:
                pass  # levels: the summaries hold what the report needs of them


def _put(
    run: Run, row: ConceptRow | CheckpointRow | FailedRow | SummaryRow | PairRow | PictureRow
) -> None:
    match row:
        case ConceptRow():
            run.concepts.append(row)
        case CheckpointRow():
            run.checkpoints.append(row)
        case FailedRow():
            run.failed = row
        case SummaryRow():
            run.summaries[row.concepts] = row
        case PairRow():
            run.pairs.append(row)
        case PictureRow():
            run.pictures.append(row)


def _ordered(methods: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Ours first, then by final accuracy, the highest first."""

    def key(name: str) -> tuple[bool, int, float, str]:
        last = [max(run.summaries.items()) for run in methods[name] if run.summaries]
        reached = max((count for count, _ in last), default=0)
        accuracy = [row.accuracy_final for count, row in last if count == reached]
        mean = sum(accuracy) / len(accuracy) if accuracy else 0.0
        return (name != OURS, -reached, -mean, name)

    return {name: methods[name] for name in sorted(methods, key=key)}


def collect(folders: Sequence[Path], target: Path) -> list[Path]:
    """Copy every row file to a folder, named after where it lay; refuses to replace a file."""
    copies = []
    for folder in folders:
        for file in find_files([folder]):
            parts = file.relative_to(folder).with_suffix("").parts
            names = parts[:-1] if parts[-1] == "rows" and len(parts) > 1 else parts
            copies.append((file, target / ("-".join(names) + ".jsonl")))
    for _, copy in copies:
        if copy.exists():
            raise InputError(f"--collect {str(target)!r}: {copy.name} exists; choose a new folder")
    if len({copy for _, copy in copies}) < len(copies):
        raise InputError("--collect: two row files would have one name; collect one DIR at a time")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--collect {str(target)!r}: cannot be made ({error.strerror})") from error
    for file, copy in copies:
        shutil.copyfile(file, copy)
    return [copy for _, copy in copies]
