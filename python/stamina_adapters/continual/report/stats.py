# SPDX-License-Identifier: Apache-2.0
"""Means and standard deviations over seeds."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; the latter 0 for a single value."""

    mean: float
    deviation: float
    count: int

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """As "0.93 +- 0.02", without the deviation for a single value."""
        mean = f"{factor * self.mean:.{digits}f}"
        if self.count < 2:
            return mean
        return f"{mean} \N{PLUS-MINUS SIGN} {factor * self.deviation:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Spread(statistics.fmean(known), deviation, len(known))


def text(
    rows: Sequence[_Row],
    value: Callable[[_Row], float | None],
    digits: int = 2,
    factor: float = 1.0,
) -> str:
    """A cell of a table: mean and deviation of a value over rows, a dash where it is unknown."""
    found = spread(value(row) for row in rows)
    return "\N{EN DASH}" if found is None else found.text(digits, factor)


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over up to `width` values around each; fewer at the ends, the same on both sides."""
    half = width // 2
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        result.append(statistics.fmean(values[index - reach : index + reach + 1]))
    return result
