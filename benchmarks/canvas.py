# SPDX-License-Identifier: Apache-2.0
"""What the pictures share: colours, axes, bars. The colours are Okabe and Ito's, which
colour-blind readers tell apart."""

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.machine import threads
from benchmarks.record import Result, Row, by_kernels, milliseconds, write_beside

# colour, hatch; a compiled rival has the colour of the code that it compiles
LOOK: dict[str, tuple[str, str]] = {
    "ours": ("#D55E00", ""),
    "ours.triton": ("#D55E00", ""),
    "ours.cuda": ("#E69F00", ""),
    "ours.cpu": ("#882255", ""),
    "ours.reference": ("#F0E442", ""),
    "ours.separate": ("#D55E00", "///"),
    "gumbel": ("#0072B2", ""),
    "gumbel.compile": ("#0072B2", "///"),
    "eager": ("#56B4E9", ""),
    "eager.compile": ("#56B4E9", "///"),
    "eager_masks": ("#56B4E9", ""),
    "peft": ("#009E73", ""),
    "peft_fuse": ("#009E73", ""),
    "loha": ("#CC79A7", ""),
    "loha_merge": ("#CC79A7", ""),
    "dense": ("#555555", ""),
    "frozen": ("#BBBBBB", ""),
    "copy": ("#BBBBBB", "///"),
}
NAMES = {
    "ours": "ours",
    "ours.triton": "ours, Triton",
    "ours.cuda": "ours, CUDA C++",
    "ours.cpu": "ours, C++ on the CPU",
    "ours.reference": "ours, plain PyTorch",
    "ours.separate": "ours, a call each",
    "gumbel": "Gumbel-softmax module",
    "gumbel.compile": "Gumbel-softmax, compiled",
    "eager": "one-uniform eager",
    "eager.compile": "one-uniform, compiled",
    "eager_masks": "eager, bool masks",
    "peft": "PEFT LoRA (no mask)",
    "peft_fuse": "PEFT fuse_lora (no mask)",
    "loha": "LyCORIS LoHa (no mask)",
    "loha_merge": "LyCORIS LoHa merge",
    "dense": "dense layer, trained",
    "frozen": "dense layer, frozen",
    "copy": "copy of W",
}
FILL = {"ours": "full", "eager": "full", "eager.compile": "none", "gumbel": "full"}
PANEL = 6  # cases side by side that stay legible


def new_figure(rows: int, columns: int = 1, *, width: float = 11.0, height: float = 3.4) -> Figure:
    figure = Figure(figsize=(width, height * rows + 0.9), layout="constrained", dpi=150)
    figure.subplots(rows, columns, squeeze=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", which="major", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def finish(figure: Figure, title: str, note: str, path: Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    handles = {
        text: handle
        for axes in figure.axes
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_beside(path, image.getvalue())
    return path


def providers_of(rows: Iterable[Row]) -> list[str]:
    """Those in the rows, in the order of the legend; one that the legend lacks comes last."""
    found = dict.fromkeys(row["provider"] for row in rows)
    return [name for name in LOOK if name in found] + [name for name in found if name not in LOOK]


def look(provider: str) -> tuple[str, str, str]:
    """Colour, hatch and name."""
    return (*LOOK.get(provider, ("#000000", "...")), NAMES.get(provider, provider))


def bars(
    axes: Axes,
    cases: Sequence[str],
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    *,
    log: bool = True,
) -> None:
    """Bars of each case side by side, one a provider; room is kept for those that did not run."""
    providers = providers_of(rows)
    width = 0.84 / len(providers)
    found = {(row["case"], row["provider"]): row for row in rows}
    for k, provider in enumerate(providers):
        colour, hatch, name = look(provider)
        drawn = [
            (number, row, height)
            for number, case in enumerate(cases)
            if (row := found.get((case, provider))) and (height := value(row))
        ]
        if not drawn:
            continue
        offset = (k - (len(providers) - 1) / 2) * width
        axes.bar(
            [number + offset for number, _, _ in drawn],
            [height for _, _, height in drawn],
            width * 0.92,
            label=name,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        if value is milliseconds:
            spread = np.array([_whisker(row) for _, row, _ in drawn]).reshape(-1, 2).T
            axes.errorbar(
                [number + offset for number, _, _ in drawn], [height for _, _, height in drawn],
                spread, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=1.5,
            )  # fmt: skip
    axes.set_xticks(range(len(cases)), [_broken(case) for case in cases])
    if log:
        log_axis(axes, min(height for row in rows if (height := value(row))))


def _broken(case: str) -> str:
    """A case's name over several short lines, at its spaces."""
    return textwrap.fill(
        case.replace(", ", " "), 15, break_long_words=False, break_on_hyphens=False
    )


def log_axis(axes: Axes, lowest: float) -> None:
    """A logarithmic axis in plain numbers that begins below the lowest value."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=10 ** math.floor(math.log10(lowest * 0.7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _whisker(row: Row) -> tuple[float, float]:
    """From p20 to the median and from there to p80, of what `milliseconds` takes.

    A sum over kernels has none."""
    if by_kernels(row):
        return 0.0, 0.0
    prefix = "device_" if row["device_ms"] is not None else ""
    low, high, middle = row[f"{prefix}p20_ms"], row[f"{prefix}p80_ms"], milliseconds(row)  # type: ignore[literal-required]
    if middle is None or low is None or high is None:
        return 0.0, 0.0
    return middle - low, high - middle


def machine_note(result: Result) -> str:
    machine = result["machine"]
    name = f"{machine['cpu']}, {threads(machine)}"
    if machine["device"] != "cpu":
        name = machine["device"]
    return f"{name}; torch {result['versions']['torch']}"
