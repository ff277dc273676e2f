# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.canvas import (
    FILL,
    LOOK,
    NAMES,
    PANEL,
    bars,
    finish,
    log_axis,
    look,
    machine_note,
    new_figure,
    providers_of,
)
from benchmarks.cases import BY_NAME, CONCEPTS_UNIT, RANKS, SDXL, SDXL_TENTH
from benchmarks.record import Result, Row, by_kernels, failed, milliseconds, on_device
from benchmarks.report import PARTS


def _dtype(row: Row) -> str:
    suffix = row["case"].rsplit(" ", 1)[-1]
    return suffix if suffix in ("bf16", "fp16") else "fp32"


def _concepts(row: Row) -> int | None:
    """How many concepts a case of the scale suite has learned; None for another case."""
    count, _, unit = row["case"].partition(" ")
    return int(count) if unit == CONCEPTS_UNIT else None


def _cases_by_pass(rows: Iterable[Row]) -> list[Row]:
    """The rows, with the pass before the case where there are several: then it tells them apart."""
    found = list(rows)
    if len({row["pass"] for row in found}) < 2:
        return found
    return [{**row, "case": f"{row['pass']}, {row['case']}"} for row in found]


def draw_times(result: Result, folder: Path) -> list[Path]:
    """Time of a step by shape: fp32, and 16 bits in a picture of its own."""
    rows = _cases_by_pass(
        row
        for row in result["rows"]
        if row["pass"] not in PARTS and milliseconds(row) and not failed(row) and not _concepts(row)
    )
    pictures = (("time", ("fp32",)), ("time-16bit", ("bf16", "fp16")))
    return [
        _draw_time([row for row in rows if _dtype(row) in dtypes], dtypes, result, folder, name)
        for name, dtypes in pictures
        if any(_dtype(row) in dtypes for row in rows)
    ]


def _panels(rows: Iterable[Row]) -> list[list[str]]:
    """The cases of the rows, so many side by side as stay legible."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return [cases[k : k + PANEL] for k in range(0, len(cases), PANEL)]


def _draw_time(
    rows: list[Row], dtypes: Sequence[str], result: Result, folder: Path, name: str
) -> Path:
    dtypes = [dtype for dtype in dtypes if any(_dtype(row) == dtype for row in rows)]
    panels = [
        panel for dtype in dtypes for panel in _panels(row for row in rows if _dtype(row) == dtype)
    ]
    figure = new_figure(len(panels))
    for axes, panel in zip(figure.axes, panels, strict=True):
        bars(axes, panel, rows, milliseconds)
        axes.set_xlim(-0.6, max(map(len, panels)) - 0.4)
        axes.set_ylabel("ms")
    suite = rows[0]["suite"]
    passes = {row["pass"] for row in rows}
    what = "one training step" if passes == {"step"} else "fold" if passes == {"fold"} else "a call"
    clock = "between events on the device" if any(map(on_device, rows)) else "waited for"
    if any(map(by_kernels, rows)):
        clock += " (of the kernels alone where the host could not keep ahead)"
    note = (
        f"median of the time {clock}, whiskers p20 and p80, interleaved in one process; "
        f"{machine_note(result)}"
    )
    title = f"{suite}: time of {what}, {' and '.join(dtypes)}"
    return finish(figure, title, note, folder / f"{suite}-{name}.png")


def draw_roofline(result: Result, folder: Path) -> list[Path]:
    """Arithmetic rate over arithmetic intensity, both counted from the formulas, beside the rates
    that PyTorch's own product and copy reach."""
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
    figure = new_figure(1, height=4.6)
    (axes,) = figure.axes
    intensity = np.geomspace(0.5, 500, 200)
    roof = np.minimum(peak, intensity * bandwidth)
    axes.plot(intensity, roof, color="#222222", label="PyTorch's product and copy", linewidth=1.6)
    axes.annotate(f"PyTorch's GEMM {peak:.0f} GFLOP/s", (7, peak * 0.86), fontsize=9)
    axes.annotate(f"copy {bandwidth:.0f} GB/s", (1.4, 0.9 * bandwidth), fontsize=9)
    points = [(BY_NAME[row["case"]], row) for row in rows]
    for provider, marker in zip(shown, "osD^", strict=True):
        cases = [(case, row) for case, row in points if row["provider"] == provider]
        axes.plot(
            [case.step_flops() / case.step_bytes() for case, _ in cases],
            [case.step_flops() / (row["median_ms"] or 1.0) / 1e6 for case, row in cases],
            marker, color=LOOK[provider][0], label=NAMES[provider] if cases else None,
            markersize=8, fillstyle=FILL[provider],
        )  # fmt: skip
    axes.set_xscale("log")
    log_axis(axes, min(case.step_flops() / (row["median_ms"] or 1.0) / 1e6 for case, row in points))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("GFLOP/s")
    note = f"products of the formulas only, the same count for all; {machine_note(result)}"
    title = "Roofline of a masked training step, fp32"
    return [finish(figure, title, note, folder / f"{rows[0]['suite']}-roofline.png")]


def draw_memory(result: Result, folder: Path) -> list[Path]:
    """What a step adds to the process, and what of it is saved for the backward."""
    rows = [row for row in result["rows"] if row["peak_mib"] is not None and not failed(row)]
    if not any(row["peak_mib"] for row in rows):
        return []
    suite, share = rows[0]["suite"], SDXL_TENTH.name
    # a tenth of the layers stands for all of them
    rows = [{**row, "case": SDXL.label} if row["case"] == share else row for row in rows]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    values: list[tuple[str, Callable[[Row], float | None]]] = [
        ("peak growth, MiB", lambda row: row["peak_mib"])
    ]
    if any(row["saved_mib"] for row in rows):
        values.append(("saved for backward, MiB", lambda row: row["saved_mib"]))
    figure = new_figure(len(values))
    for axes, (label, value) in zip(figure.axes, values, strict=True):
        bars(axes, cases, rows, value)
        axes.set_ylabel(label)
    how = (
        f"fp32, a process for each; {SDXL.label} of rivals from a tenth of the layers"
        if suite == "memory"
        else "growth of the process"
        if result["machine"]["device"] == "cpu"
        else "counted by the device's allocator"
    )
    note = f"what one training step adds to what lives anyway; {how}; {machine_note(result)}"
    name = "memory.png" if suite == "memory" else f"{suite}-memory.png"
    return [finish(figure, "Memory of a training step", note, folder / name)]


def draw_rates(result: Result, folder: Path) -> list[Path]:
    """Of single operations: bandwidth beside a copy, FLOP/s beside the vendor's product."""
    rows = [
        row
        for row in result["rows"]
        if row["pass"] not in (*PARTS, "step") and row["gb_s"] and not failed(row)
    ]
    vendor = {row["pass"] for row in rows if row["provider"] == "frozen"}
    units: tuple[tuple[str, Callable[[Row], float | None], list[Row]], ...] = (
        ("GB/s", lambda row: row["gb_s"], [row for row in rows if row["pass"] not in vendor]),
        ("TFLOP/s", lambda row: row["tflop_s"], [row for row in rows if row["pass"] in vendor]),
    )
    panels = [
        (unit, value, labelled, panel)
        for unit, value, of_unit in units
        for labelled in [_cases_by_pass(of_unit)]
        for panel in _panels(labelled)
    ]
    if not panels:
        return []
    machine = result["machine"]
    rates = machine["gemm_tflops_by_dtype"]
    figure = new_figure(len(panels))
    for axes, (unit, value, labelled, panel) in zip(figure.axes, panels, strict=True):
        bars(axes, panel, labelled, value, log=False)
        roof = machine["copy_gb_s"] if unit == "GB/s" else rates[_dtype(labelled[0])]
        axes.axhline(roof, color="#222222", linewidth=1.4, label="measured ceiling")
        axes.set_ylabel(unit)
    suite = rows[0]["suite"]
    note = (
        "what the formula must move and multiply, while the kernels run; ceilings: a copy, a "
        f"matrix product; {machine_note(result)}"
    )
    title = f"{suite}: rates reached"
    return [finish(figure, title, note, folder / f"{suite}-rates.png")]


def curve(axes: Axes, provider: str, points: Sequence[tuple[int, Row]]) -> None:
    """Medians over x with the band from p20 to p80."""
    colour, _, name = look(provider)
    x = [count for count, _ in points]
    rows = [row for _, row in points]
    axes.plot(x, [row["median_ms"] or 0.0 for row in rows], "o-", color=colour,
              label=name)  # fmt: skip
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
    figure = new_figure(1, 2, height=4.0)
    for axes, (label, position) in zip(figure.axes, axis, strict=True):
        for provider in providers_of(row for row in rows if position(row)):
            points = [
                (x, row) for row in rows if row["provider"] == provider and (x := position(row))
            ]
            curve(axes, provider, sorted(points, key=lambda point: point[0]))
        axes.set_xscale("log")
        log_axis(axes, min(row["median_ms"] or 1.0 for row in rows if position(row)))
        ticks = sorted({x for row in rows if (x := position(row))})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("ms per step")
    note = (
        "ours folds finished concepts into W; PEFT LoRA keeps each as an active adapter; "
        f"{machine_note(result)}"
    )
    title = "Cost of a training step as concepts add up, and by rank"
    return [finish(figure, title, note, folder / "scale-concepts.png")]


def draw(result: Result, folder: Path) -> list[Path]:
    """Every picture that the rows allow; the files written."""
    pictures = (draw_times, draw_rates, draw_roofline, draw_memory, draw_scaling)
    return [path for picture in pictures for path in picture(result, folder)]
