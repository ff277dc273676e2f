# SPDX-License-Identifier: Apache-2.0
"""Figures in tables, for the page and in Markdown."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stamina_adapters.continual.report.results import Benchmark, Run
from stamina_adapters.continual.report.stats import spread, text
from stamina_adapters.continual.rows import ConceptRow, SummaryRow, TuningRow

_DASH = "\N{EN DASH}"
_TEN = 10


@dataclass(frozen=True)
class Table:
    """Titles and cells; the first column is text."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [
            "| " + " | ".join(self.titles) + " |",
            "|" + "|".join(["---", *(["---:"] * (len(self.titles) - 1))]) + "|",
        ]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows
        ]
        return "\n".join(lines) + "\n"


_Column = tuple[str, Callable[[SummaryRow], float | None], int, float]

# F_mmd always follows accuracy right after learning
_QUALITY: tuple[_Column, ...] = (
    ("accuracy at the end", lambda row: row.accuracy_final, 2, 1.0),
    ("accuracy after learning", lambda row: row.accuracy_after_learning, 2, 1.0),
    ("F_mmd", lambda row: row.f_mmd, 3, 1.0),
    ("A_mmd", lambda row: row.a_mmd, 3, 1.0),
    ("KID \N{MULTIPLICATION SIGN} 1000", lambda row: row.kid, 2, 1e3),
    ("cosine to real", lambda row: row.cosine_final, 3, 1.0),
)
_COST: tuple[_Column, ...] = (
    ("trained, % of the model", lambda row: row.trained_percent, 2, 1.0),
    ("stored to sample, %", lambda row: row.stored_percent, 3, 1.0),
    ("carried to learn on, %", lambda row: row.carried_percent, 1, 1.0),
    ("s / concept", lambda row: row.seconds / row.concepts, 1, 1.0),
    ("peak MiB", lambda row: row.peak_mib, 0, 1.0),
    ("mask density", lambda row: row.density, 2, 1.0),
)


def _table(benchmark: Benchmark, concepts: int, columns: Sequence[_Column]) -> Table:
    rows = []
    for name, runs in benchmark.methods.items():
        found = benchmark.summaries(name, concepts)
        seeds = str(len(found)) if len(found) == len(runs) else f"{len(found)} of {len(runs)}"
        cells = [text(found, value, digits, factor) for _, value, digits, factor in columns]
        rows.append([name, seeds, *cells])
    return Table(["method", "seeds", *(title for title, *_ in columns)], rows)


def quality_table(benchmark: Benchmark, concepts: int) -> Table:
    """What was learned and kept, one row for each method."""
    return _table(benchmark, concepts, _QUALITY)


def unfinished_table(benchmark: Benchmark) -> Table | None:
    """How many runs of a method failed or were stopped, and where; None where all are whole."""
    rows = []
    for name, runs in benchmark.methods.items():
        ends = Counter(map(_end, (run for run in runs if run.learned < run.run.concepts)))
        for (end, reason), count in ends.items():
            rows.append([name, f"{count} of {len(runs)} seeds {end}", reason])
    return Table(["method", "outcome", "reason"], rows) if rows else None


def _end(run: Run) -> tuple[str, str]:
    """Where a run that is not whole came to its end, and why."""
    if run.failed is None:
        return f"unfinished: {run.learned} of {run.run.concepts} concepts learned", ""
    return f"failed at concept {run.failed.task}", run.failed.reason


def cost_table(benchmark: Benchmark, concepts: int) -> Table:
    """Parameters, time and memory, one row for each method."""
    return _table(benchmark, concepts, _COST)


def growth_table(benchmark: Benchmark) -> Table | None:
    """The first ten concepts beside the last ten: what is learned of each, and what each costs.

    None where a benchmark has fewer than twenty concepts.
    """
    if benchmark.concepts < 2 * _TEN:
        return None
    values: tuple[tuple[Callable[[ConceptRow], float | None], int], ...] = (
        (lambda row: row.accuracy, 2),
        (lambda row: row.seconds, 1),
        (lambda row: row.peak_mib, 0),
    )
    rows = []
    for name in benchmark.finished():
        whole = _whole(benchmark, name)
        cells = [name]
        for value, digits in values:
            for part in (slice(None, _TEN), slice(-_TEN, None)):
                means = [_mean(value, run.concepts[part]) for run in whole]
                cells.append(text(means, lambda mean: mean, digits))
        rows.append(cells)
    titles = ("accuracy after learning", "s / concept", "peak MiB")
    return Table(
        ["method", *(f"{title}, {part} ten" for title in titles for part in ("first", "last"))],
        rows,
    )


def _whole(benchmark: Benchmark, name: str) -> list[Run]:
    """The method's runs that have learned every concept."""
    return [run for run in benchmark.methods[name] if run.learned == benchmark.concepts]


def _mean(value: Callable[[ConceptRow], float | None], rows: Sequence[ConceptRow]) -> float | None:
    found = spread(map(value, rows))
    return None if found is None else found.mean


def ablation_table(benchmark: Benchmark, concepts: int) -> Table:
    """What was learned and kept, with density and time beside."""
    chosen = (*_QUALITY[:4], _COST[0], _COST[3], _COST[5])
    return _table(benchmark, concepts, chosen)


def pair_table(benchmark: Benchmark) -> Table | None:
    """Two concepts in one prompt, means over all pairs and seeds; None where there are none."""
    rows = []
    for name in benchmark.finished():
        pairs = [pair for run in benchmark.methods[name] for pair in run.pairs]
        if pairs:
            either = _per_run(benchmark.methods[name], lambda p: p.share_either)
            first = _per_run(benchmark.methods[name], lambda p: p.share_first)
            second = _per_run(benchmark.methods[name], lambda p: p.share_second)
            rows.append([name, str(len(pairs)), either, first, second])
    titles = ["method", "pairs", "either of the two", "the first", "the second"]
    return Table(titles, rows) if rows else None


def _per_run(runs: Sequence[Run], value: Callable[..., float]) -> str:
    means = [sum(map(value, run.pairs)) / len(run.pairs) for run in runs if run.pairs]
    found = spread(means)
    return _DASH if found is None else found.text()


def mask_table(benchmark: Benchmark) -> Table | None:
    """Density, and overlap beside what independent masks of that density would have."""
    rows = []
    for name in benchmark.finished():
        whole = _whole(benchmark, name)
        dense = spread(_mean(lambda row: row.density, run.concepts) for run in whole)
        if dense is None:
            continue
        pairs = [spread(one for row in run.concepts for one in row.overlaps) for run in whole]
        rows.append(
            [
                name,
                dense.text(),
                text(pairs, lambda found: None if found is None else found.mean),
                text([run.concepts[-1] for run in whole], lambda row: row.overlap),
            ]
        )
    titles = ["method", "density", "overlap with one earlier concept", "of the last, with any"]
    return Table(titles, rows) if rows else None


def _figure(value: float | None, digits: int) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def tuning_table(rows: Sequence[TuningRow]) -> Table:
    """Every trial, the picked ones marked."""
    titles = (
        "method",
        "trial",
        "outcome",
        "accuracy at the end",
        "accuracy after learning",
        "F_mmd",
        "A_mmd",
        "settings",
    )
    cells = [
        [
            row.method,
            f"{row.trial} / {row.trials}",
            "picked" if row.picked else "failed" if row.failed else "",
            _figure(row.accuracy_final, 2),
            _figure(row.accuracy_after_learning, 2),
            _figure(row.f_mmd, 3),
            _figure(row.a_mmd, 3),
            json.dumps(row.settings),
        ]
        for row in rows
    ]
    return Table(titles, cells)
