# SPDX-License-Identifier: Apache-2.0
"""What is learned and kept over the tasks: lines with a band of one standard deviation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stamina_adapters.continual.report.results import Benchmark, Run
from stamina_adapters.continual.report.stats import Spread, moving_mean, spread
from stamina_adapters.continual.report.style import SOFT, Look, figure, looks, to_png, whole_numbers

FIRST = 5
"""How many of the earliest concepts stand for what is longest ago."""
WINDOW = 5
Points = list[tuple[int, Spread]]


def _over_seeds(values: Mapping[int, Sequence[float]]) -> Points:
    found = ((task, spread(values[task])) for task in sorted(values))
    return [(task, one) for task, one in found if one is not None]


def first_concepts(runs: Sequence[Run], first: int = FIRST) -> Points:
    """Accuracy of the first concepts, from the checkpoint that has all of them on."""
    values: dict[int, list[float]] = {}
    for run in runs:
        early = [row for row in run.checkpoints if row.after >= first]
        for row in early or run.checkpoints:
            kept = row.accuracy[:first]
            values.setdefault(row.after, []).append(sum(kept) / len(kept))
    return _over_seeds(values)


def plasticity(runs: Sequence[Run], window: int = WINDOW) -> Points:
    """Accuracy right after learning, a moving mean over the tasks of each run."""
    values: dict[int, list[float]] = {}
    for run in runs:
        smooth = moving_mean([row.accuracy for row in run.concepts], window)
        for row, value in zip(run.concepts, smooth, strict=True):
            values.setdefault(row.task, []).append(value)
    return _over_seeds(values)


def learned_so_far(runs: Sequence[Run]) -> Points:
    """Mean accuracy right after learning of all concepts until a checkpoint."""
    return _summaries(runs, lambda row: row.accuracy_after_learning)


def _summaries(runs: Sequence[Run], value: Callable[[Any], float | None]) -> Points:
    values: dict[int, list[float]] = {}
    for run in runs:
        for count, row in run.summaries.items():
            found = value(row)
            if found is not None:
                values.setdefault(count, []).append(found)
    return _over_seeds(values)


def _draw(axes: Any, name: str, points: Points, look: Look, markers: bool) -> None:
    if not points:
        return
    x = [task for task, _ in points]
    y = [one.mean for _, one in points]
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.dash,
        linewidth=look.width,
        marker=look.marker if markers else None,
        markersize=5.5,
        zorder=look.order,
        label=name,
    )
    low = [one.mean - one.deviation for _, one in points]
    high = [one.mean + one.deviation for _, one in points]
    axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0, zorder=1)


def _lines(
    axes: Any,
    benchmark: Benchmark,
    points: Callable[[Sequence[Run]], Points],
    markers: bool = True,
) -> None:
    found = looks(list(benchmark.methods))
    for name, runs in benchmark.methods.items():
        _draw(axes, name, points(runs), found[name], markers)
    axes.set_xlabel("concepts learned")
    axes.set_xlim(left=0)
    whole_numbers(axes.xaxis)


def _level(axes: Any, value: Spread | None, name: str, right: bool = False) -> None:
    if value is None:
        return
    axes.axhline(value.mean, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        name,
        (0.99 if right else 0.01, value.mean),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        horizontalalignment="right" if right else "left",
        fontsize=8.5,
        color=SOFT,
    )


def levels(axes: Any, benchmark: Benchmark) -> None:
    """Lines at the ceiling, at what the family's word reaches, and at chance."""
    rows = [
        row for name in benchmark.methods for row in benchmark.summaries(name, benchmark.concepts)
    ]
    _level(axes, spread(row.accuracy_ceiling for row in rows), "ceiling: each learned alone")
    _level(axes, spread(row.accuracy_family for row in rows), "the family's word alone")
    _level(axes, spread(row.chance for row in rows), "chance", right=True)
    axes.set_ylim(0, 1.06)


def _legend(made: Any, axes: Any, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=min(count, 5), handlelength=3.2)


def accuracy_figure(benchmark: Benchmark) -> bytes:
    """Accuracy of the first concepts as more are learned; accuracy of each when it is learned."""
    with figure(11, 4.6, columns=2) as (made, axes):
        first = min(FIRST, benchmark.concepts)
        axes[0].set_title(f"Kept: accuracy of the first {first} concepts")
        _lines(axes[0], benchmark, first_concepts)
        axes[1].set_title("Learned: accuracy right after learning")
        _lines(axes[1], benchmark, plasticity, markers=False)
        axes[1].set_xlabel(f"concepts learned; mean over up to {WINDOW} neighbours")
        for one in axes:
            levels(one, benchmark)
        _legend(made, axes[0], len(benchmark.methods))
        return to_png(made)


def distance_figure(benchmark: Benchmark) -> bytes:
    """A_mmd, and F_mmd beside the accuracy after learning that it means nothing without."""
    panels: Sequence[tuple[str, Callable[[Sequence[Run]], Points]]] = (
        ("A_mmd: distance to real pictures", lambda runs: _summaries(runs, lambda row: row.a_mmd)),
        (
            "F_mmd: drift since learning\N{HORIZONTAL ELLIPSIS}",
            lambda runs: _summaries(runs, lambda row: row.f_mmd),
        ),
        ("\N{HORIZONTAL ELLIPSIS}and accuracy after learning", learned_so_far),
    )
    with figure(13, 4.4, columns=3) as (made, axes):
        for one, (title, points) in zip(axes, panels, strict=True):
            one.set_title(title)
            _lines(one, benchmark, points)
            one.set_ylim(bottom=0)
        axes[2].set_ylim(0, 1.06)
        _legend(made, axes[0], len(benchmark.methods))
        return to_png(made)


def balance_figure(benchmark: Benchmark) -> bytes:
    """Each method as a point: accuracy right after learning, and at the end."""
    found = looks(list(benchmark.methods))
    count = benchmark.concepts
    with figure(7.4, 5.0) as (made, (axes,)):
        axes.set_title(f"Learned and kept, {count} concepts")
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(
            "nothing forgotten",
            (0.04, 0.055),
            rotation=45,
            fontsize=8.5,
            color=SOFT,
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
        for name in benchmark.finished():
            rows = benchmark.summaries(name, count)
            x = spread(row.accuracy_after_learning for row in rows)
            y = spread(row.accuracy_final for row in rows)
            if x is None or y is None:
                continue
            look = found[name]
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=x.deviation,
                yerr=y.deviation,
                color=look.colour,
                marker=look.marker,
                markersize=9 if look.order == 3 else 7,
                linewidth=1.2,
                capsize=2,
                linestyle="none",
                zorder=look.order,
                label=name,
            )
        axes.set_xlim(0, 1.04)
        axes.set_ylim(0, 1.04)
        axes.set_aspect("equal")
        axes.set_xlabel("accuracy right after learning")
        axes.set_ylabel(f"accuracy after all {count}")
        made.legend(loc="outside right center")
        return to_png(made)
