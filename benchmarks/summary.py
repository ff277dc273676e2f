# SPDX-License-Identifier: Apache-2.0
"""Geometric means over cases. One beside a failed check is null: speed without accuracy is none."""

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.record import Row, failed, wall_ms

Summary = dict[str, float | None]


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp(mean(log v)); None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


class Table:
    """Rows of one suite by case and provider."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row["case"], row["provider"], row["pass"]): row for row in rows}
        self.cases = list(dict.fromkeys(row["case"] for row in rows))

    def find(self, case: str, provider: str, pass_: str = "step") -> Row | None:
        return self._rows.get((case, provider, pass_))

    def fastest(self, case: str, providers: Sequence[str], pass_: str = "step") -> Row | None:
        """The fastest of the providers; None where one has no row: it might have been faster."""
        rows = [row for name in providers if (row := self.find(case, name, pass_))]
        if len(rows) < len(providers):
            return None
        return min(rows, key=lambda row: row["median_ms"] or math.inf)


def mean_ratio(
    cases: Iterable[str],
    above: Callable[[str], Row | None],
    below: Callable[[str], Row | None],
    *values: Callable[[Row], float | None],
) -> float | None:
    """Geometric mean over cases of the ratio above / below of the first value that both rows have;
    without any of medians of wall time.

    Cases that either lacks, or that lack all values, are left out. None where there is none, or a
    check of any row failed.
    """
    pairs = [
        (upper, lower)
        for case in cases
        if (upper := above(case)) is not None and (lower := below(case)) is not None
    ]
    if any(failed(row) for pair in pairs for row in pair):
        return None
    ratios = (
        next((a / b for value in values or (wall_ms,) if (a := value(u)) and (b := value(v))), None)
        for u, v in pairs
    )
    return geometric_mean(ratio for ratio in ratios if ratio)


def speedup(
    table: Table, cases: Sequence[str], rivals: Sequence[str], pass_: str = "step"
) -> float | None:
    """How many times faster ours is than the fastest, case by case, of rivals that all ran."""
    return mean_ratio(
        cases,
        lambda case: table.fastest(case, rivals, pass_),
        lambda case: table.find(case, "ours", pass_),
    )
