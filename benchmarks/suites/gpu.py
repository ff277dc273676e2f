# SPDX-License-Identifier: Apache-2.0
"""What the gpu suites share: the dtype, their rounds, and figures by backend."""

from collections.abc import Iterable, Sequence

from benchmarks.record import Row, busy_ms, device_ms, peak_mib, wall_ms
from benchmarks.rivals import OURS
from benchmarks.suites.suite import Settings
from benchmarks.summary import Summary, Table, mean_ratio

ROUNDS, QUICK_ROUNDS = 25, 1
KERNELS = tuple(name for name, backend in OURS.items() if backend != "reference")
"""Ours without the definition, which would take minutes for a whole model."""
CLOCKS = {"device": (device_ms, busy_ms), "wall": (wall_ms,)}
"""Of two rows, times between events on the device where both have them, else of their kernels."""


def dtype(settings: Settings) -> str:
    """bf16, in which GPUs train; on the CPU Triton's interpreter multiplies its bit patterns."""
    return "fp32" if settings.device == "cpu" else "bf16"


def rounds(settings: Settings, wanted: int = ROUNDS) -> int:
    return QUICK_ROUNDS if settings.quick else wanted


def backends_that_ran(rows: Iterable[Row]) -> list[str]:
    """Providers that are ours on a backend, in the order of the registry."""
    found = {row["provider"] for row in rows}
    return [name for name in OURS if name in found]


def ratios(
    table: Table, cases: Sequence[str], above: str, below: str, name: str, pass_: str = "step"
) -> Summary:
    """name.device and name.wall: geometric means of the times of `above` over those of `below`."""
    return {
        f"{name}.{clock}": mean_ratio(
            cases,
            lambda case: table.find(case, above, pass_),
            lambda case: table.find(case, below, pass_),
            *values,
        )
        for clock, values in CLOCKS.items()
    }


def peak_ratio(table: Table, above: str, below: str) -> float | None:
    """What a step adds to the memory, `above` over `below`."""
    return mean_ratio(
        table.cases,
        lambda case: table.find(case, above),
        lambda case: table.find(case, below),
        peak_mib,
    )


def goals(names: Iterable[str], goal: str) -> dict[str, str]:
    """One goal for a figure of every backend; {} in a name stands for the backend's provider."""
    return {name.format(provider): goal for name in names for provider in OURS}
