# SPDX-License-Identifier: Apache-2.0
"""Colours, dashes and the axes' look; told apart without colour by dashes, markers and labels."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stamina_adapters.continual.report.results import OURS
from stamina_adapters.training.errors import InputError

INK, SOFT, LINE = "#1d2026", "#5d6472", "#dfe2e8"
_OURS = "#0072B2"
# Okabe and Ito's, without the yellow that vanishes on white, and two greys
_RIVALS = (
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#4D4D4D",
    "#9A6A3A",
    "#A6A6A6",
    "#7A5195",
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.4, 1.2, 1.4)))
_MARKERS = "osD^vPX<>"
SEQUENTIAL = "cividis"
SHARES = "Blues"
"""For matrices that are mostly zero: zero is the paper's white."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every figure."""

    colour: str
    dash: Any
    marker: str
    width: float
    order: int


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look for each method: ours strong, rivals by their names, whatever order they are in."""
    found = {}
    for index, name in enumerate(sorted(name for name in methods if name != OURS)):
        colour = _RIVALS[index % len(_RIVALS)]
        dash = _DASHES[index % len(_DASHES)]
        found[name] = Look(colour, dash, _MARKERS[(index + 1) % len(_MARKERS)], 1.6, 2)
    found[OURS] = Look(_OURS, "-", "o", 3.0, 3)
    return found


def whole_numbers(*lines: Any) -> None:
    """Ticks at concepts only, however few there are."""
    for axis in lines:
        axis.get_major_locator().set_params(integer=True)


def pyplot() -> Any:
    """matplotlib without a display. Raises `InputError` when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("stamina report needs matplotlib; pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@contextmanager
def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """(figure, axes as a flat list) in the report's look, closed at the end."""
    plt = pyplot()
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "figure.dpi": 150,
    }
    with plt.rc_context(settings):
        made, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
        try:
            yield made, list(axes.flat)
        finally:
            plt.close(made)


def to_png(made: Any) -> bytes:
    """The figure's PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
