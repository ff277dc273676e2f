# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import BY_NAME, CONCEPTS_UNIT, RANKS, SDXL
from benchmarks.record import Result, Row, failed, write_beside
from benchmarks.report import PARTS

# colour, hatch; a compiled rival has the colour of the code that it compiles
_LOOK: dict[str, tuple[str, str]] = {
    "ours": ("#D55E00", ""),
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
}
_NAMES = {
    "ours": "ours",
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
}
_FILL = {"ours": "full", "eager": "full", "eager.compile": "none", "gumbel": "full"}
_PANEL = 6  # cases side by side that stay legible


def _figure(rows: int, columns: int = 1, *, width: float = 11.0, height: float = 3.4) -> Figure:
    figure = Figure(figsize=(width, height * rows + 0.9), layout="constrained", dpi=150)
    figure.subplots(rows, columns, squeeze=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", which="major", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _finish(figure: Figure, title: str, note: str, path: Path) -> Path:
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


def _providers(rows: Iterable[Row]) -> list[str]:
    """Those in the rows, in the order of the legend."""
    found = {row["provider"] for row in rows}
    return [name for name in _LOOK if name in found]


def _bars(
    axes: Axes, cases: Sequence[str], rows: Sequence[Row], value: Callable[[Row], float | None]
) -> None:
    """Bars of each case side by side, one a provider; room is kept for those that did not run."""
    providers = _providers(rows)
    width = 0.84 / len(providers)
    found = {(row["case"], row["provider"]): row for row in rows}
    for k, provider in enumerate(providers):
        colour, hatch = _LOOK[provider]
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
            label=_NAMES[provider],
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        if value is median:
            spread = np.array([_whisker(row) for _, row, _ in drawn]).reshape(-1, 2).T
            axes.errorbar(
                [number + offset for number, _, _ in drawn], [height for _, _, height in drawn],
                spread, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=1.5,
            )  # fmt: skip
    axes.set_xticks(range(len(cases)), [case.replace(" x", "\nx") for case in cases])
    heights = [height for row in rows if (height := value(row))]
    _log(axes, min(heights))


def _log(axes: Axes, lowest: float) -> None:
    """A logarithmic axis in plain numbers that begins below the lowest value."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=10 ** math.floor(math.log10(lowest * 0.7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def median(row: Row) -> float | None:
    return row["median_ms"]


def _whisker(row: Row) -> tuple[float, float]:
    median, low, high = row["median_ms"], row["p20_ms"], row["p80_ms"]
    if median is None or low is None or high is None:
        return 0.0, 0.0
    return median - low, high - median


def _dtype(row: Row) -> str:
    suffix = row["case"].rsplit(" ", 1)[-1]
    return suffix if suffix in ("bf16", "fp16") else "fp32"


def _concepts(row: Row) -> int | None:
    """How many concepts a case of the scale suite has learned; None for another case."""
    count, _, unit = row["case"].partition(" ")
    return int(count) if unit == CONCEPTS_UNIT else None


def _machine_note(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads; torch {result['versions']['torch']}"


def draw_times(result: Result, folder: Path) -> list[Path]:
    """Time of a step by shape: fp32, and 16 bits in a picture of its own."""
    rows = [
        row
        for row in result["rows"]
        if row["pass"] not in PARTS and row["median_ms"] and not failed(row) and not _concepts(row)
    ]
    pictures = (("time", ("fp32",)), ("time-16bit", ("bf16", "fp16")))
    return [
        _draw_time([row for row in rows if _dtype(row) in dtypes], dtypes, result, folder, name)
        for name, dtypes in pictures
        if any(_dtype(row) in dtypes for row in rows)
    ]


def _draw_time(
    rows: list[Row], dtypes: Sequence[str], result: Result, folder: Path, name: str
) -> Path:
    panels: list[list[str]] = []
    for dtype in dtypes:
        cases = list(dict.fromkeys(row["case"] for row in rows if _dtype(row) == dtype))
        panels += [cases[k : k + _PANEL] for k in range(0, len(cases), _PANEL)]
    figure = _figure(len(panels))
    for axes, panel in zip(figure.axes, panels, strict=True):
        _bars(axes, panel, rows, median)
        axes.set_xlim(-0.6, max(map(len, panels)) - 0.4)
        axes.set_ylabel("ms")
    suite = rows[0]["suite"]
    what = "fold" if rows[0]["pass"] == "fold" else "one training step"
    note = f"median, whiskers p20 and p80, interleaved in one process; {_machine_note(result)}"
    title = f"{suite}: time of {what}, {' and '.join(dtypes)}"
    return _finish(figure, title, note, folder / f"{suite}-{name}.png")


def draw_roofline(result: Result, folder: Path) -> list[Path]:
    """Arithmetic rate over arithmetic intensity, both counted from the formulas, below the roof."""
    shown = ("ours", "eager.compile", "eager", "gumbel")
    rows = [
        row
        for row in result["rows"]
        if row["provider"] in shown and row["pass"] == "step" and row["case"] in BY_NAME
        and _dtype(row) == "fp32" and row["median_ms"] and not failed(row)
    ]  # fmt: skip
    if not rows or rows[0]["suite"] == "scale":
        return []
    peak, bandwidth = result["machine"]["gemm_gflops"], result["machine"]["copy_gb_s"]
    figure = _figure(1, height=4.6)
    (axes,) = figure.axes
    intensity = np.geomspace(0.5, 500, 200)
    roof = np.minimum(peak, intensity * bandwidth)
    axes.plot(intensity, roof, color="#222222", label="measured roof", linewidth=1.6)
    axes.annotate(f"GEMM {peak:.0f} GFLOP/s", (480, peak * 1.08), ha="right", fontsize=9)
    axes.annotate(f"copy {bandwidth:.0f} GB/s", (1.4, 0.9 * bandwidth), fontsize=9)
    points = [(BY_NAME[row["case"]], row) for row in rows]
    for provider, marker in zip(shown, "osD^", strict=True):
        cases = [(case, row) for case, row in points if row["provider"] == provider]
        axes.plot(
            [case.step_flops() / case.step_bytes() for case, _ in cases],
            [case.step_flops() / (row["median_ms"] or 1.0) / 1e6 for case, row in cases],
            marker, color=_LOOK[provider][0], label=_NAMES[provider] if cases else None,
            markersize=8, fillstyle=_FILL[provider],
        )  # fmt: skip
    axes.set_xscale("log")
    _log(axes, min(case.step_flops() / (row["median_ms"] or 1.0) / 1e6 for case, row in points))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("GFLOP/s")
    note = f"products of the formulas only, the same count for all; {_machine_note(result)}"
    title = "Roofline of a masked training step, fp32"
    return [_finish(figure, title, note, folder / f"{rows[0]['suite']}-roofline.png")]


def draw_memory(result: Result, folder: Path) -> list[Path]:
    """What a step adds to the process, and what of it is saved for the backward."""
    rows = [row for row in result["rows"] if row["peak_mib"] is not None and not failed(row)]
    if not rows:
        return []
    small = [row for row in rows if not row["case"].startswith(SDXL.label)]
    model = [{**row, "case": SDXL.label} for row in rows if row["case"].startswith(SDXL.label)]
    cases = list(dict.fromkeys(row["case"] for row in small)) + [SDXL.label] * bool(model)
    figure = _figure(2)
    values: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("peak growth, MiB", lambda row: row["peak_mib"]),
        ("saved for backward, MiB", lambda row: row["saved_mib"]),
    )
    for axes, (label, value) in zip(figure.axes, values, strict=True):
        _bars(axes, cases, [*small, *model], value)  # type: ignore[list-item]
        axes.set_ylabel(label)
    note = (
        "one training step, fp32, a process for each; weights, W_init, X and upstream gradients "
        f"not counted; sdxl-140 of rivals from 14 layers x 10; {_machine_note(result)}"
    )
    return [_finish(figure, "Memory of a training step", note, folder / "memory.png")]


def _curve(axes: Axes, provider: str, points: Sequence[tuple[int, Row]]) -> None:
    """Medians over x with the band from p20 to p80."""
    colour = _LOOK[provider][0]
    x = [count for count, _ in points]
    rows = [row for _, row in points]
    axes.plot(x, [row["median_ms"] or 0.0 for row in rows], "o-", color=colour,
              label=_NAMES[provider])  # fmt: skip
    low, high = ([row[q] or 0.0 for row in rows] for q in ("p20_ms", "p80_ms"))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_scaling(result: Result, folder: Path) -> list[Path]:
    """A step against the number of concepts learned, and against the rank."""
    rows = [row for row in result["rows"] if row["pass"] == "step" and not failed(row)]
    if not any(_concepts(row) for row in rows):
        return []
    ranks = {case.name: case.rank for case in RANKS}
    axis: tuple[tuple[str, Callable[[Row], int | None]], ...] = (
        ("concepts already learned", _concepts),
        ("rank", lambda row: ranks.get(row["case"])),
    )
    figure = _figure(1, 2, height=4.0)
    for axes, (label, position) in zip(figure.axes, axis, strict=True):
        for provider in _providers(row for row in rows if position(row)):
            points = [
                (x, row) for row in rows if row["provider"] == provider and (x := position(row))
            ]
            _curve(axes, provider, sorted(points, key=lambda point: point[0]))
        axes.set_xscale("log")
        _log(axes, min(row["median_ms"] or 1.0 for row in rows if position(row)))
        ticks = sorted({x for row in rows if (x := position(row))})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("ms per step")
    note = (
        "ours folds finished concepts into W; PEFT LoRA keeps each as an active adapter; "
        f"{_machine_note(result)}"
    )
    title = "Cost of a training step as concepts add up, and by rank"
    return [_finish(figure, title, note, folder / "scale-concepts.png")]


def draw(result: Result, folder: Path) -> list[Path]:
    """Every picture that the rows allow; the files written."""
    pictures = (draw_times, draw_roofline, draw_memory, draw_scaling)
    return [path for picture in pictures for path in picture(result, folder)]
