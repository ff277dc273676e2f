# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every concept at every checkpoint, who is taken for whom, and how masks overlap."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stamina_adapters.continual.report.results import Benchmark, Run
from stamina_adapters.continual.report.style import (
    SEQUENTIAL,
    SHARES,
    SOFT,
    figure,
    to_png,
    whole_numbers,
)

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def _mean(matrices: Sequence[Matrix]) -> Matrix:
    return np.mean(np.stack(matrices), axis=0)


def accuracy_matrix(runs: Sequence[Run]) -> tuple[list[int], Matrix]:
    """Checkpoints, and accuracy [checkpoint, concept], nan before a concept is learned.

    A mean over the seeds that reached every checkpoint that any reached.
    """
    longest = max(len(run.checkpoints) for run in runs)
    whole = [run for run in runs if len(run.checkpoints) == longest]
    after = [row.after for row in whole[0].checkpoints]
    matrices = []
    for run in whole:
        matrix = np.full((len(after), after[-1]), math.nan)
        for index, row in enumerate(run.checkpoints):
            matrix[index, : row.after] = row.accuracy
        matrices.append(matrix)
    return after, _mean(matrices)


def confusion_matrix(runs: Sequence[Run]) -> Matrix:
    """Share of each concept's last pictures told as each concept, distractors in a last column."""
    matrices = []
    newest = [run.checkpoints[-1] for run in runs if run.checkpoints]
    last = max(row.after for row in newest)
    for row in newest:
        if row.after != last:
            continue
        matrix = np.zeros((last, last + 1))
        for shown, told, count in row.confusion:
            matrix[shown - 1, min(told, last)] += count
        matrices.append(matrix / matrix.sum(axis=1, keepdims=True))
    return _mean(matrices)


def overlap_matrix(runs: Sequence[Run]) -> Matrix | None:
    """Share of concept i's mask that lies on that of j < i, nan elsewhere; None without masks."""
    matrices = []
    longest = max(len(run.concepts) for run in runs)
    for run in runs:
        if len(run.concepts) < longest or not any(row.overlaps for row in run.concepts):
            continue
        matrix = np.full((longest, longest), math.nan)
        for row in run.concepts:
            matrix[row.task - 1, : len(row.overlaps)] = row.overlaps
        matrices.append(matrix)
    return _mean(matrices) if matrices else None


def _panels(
    benchmark: Benchmark,
    names: Sequence[str],
    size: tuple[float, float],
    columns: int,
    draw: Callable[[Any, Sequence[Run]], Any],
    label: str,
) -> bytes:
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    with figure(size[0] * columns + 0.8, size[1] * rows, columns, rows) as (made, axes):
        image = None
        for name, one in zip(names, axes, strict=False):
            one.set_title(name)
            one.grid(False)
            image = draw(one, benchmark.methods[name])
        for one in axes[len(names) :]:
            one.set_axis_off()
        made.colorbar(image, ax=axes, label=label, shrink=0.9, pad=0.02, aspect=30)
        return to_png(made)


def accuracy_heat(benchmark: Benchmark) -> bytes:
    """One panel for each method: rows checkpoints, columns concepts."""

    def draw(axes: Any, runs: Sequence[Run]) -> Any:
        after, matrix = accuracy_matrix(runs)
        axes.set_facecolor("#f1f2f5")
        image = axes.imshow(
            matrix,
            cmap=SEQUENTIAL,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, matrix.shape[1] + 0.5, len(after) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(after)), [f"after {one}" for one in after])
        axes.set_xlabel("concept")
        whole_numbers(axes.xaxis)
        return image

    names = [name for name, runs in benchmark.methods.items() if any(r.checkpoints for r in runs)]
    return _panels(benchmark, names, (5.4, 1.9), 2, draw, "told as itself")


def confusion_heat(benchmark: Benchmark) -> bytes:
    """One panel for each method: rows the concept that was asked for, columns the one told."""

    def draw(axes: Any, runs: Sequence[Run]) -> Any:
        matrix = confusion_matrix(runs)
        count = len(matrix)
        image = axes.imshow(
            matrix,
            cmap=SHARES,
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0.5, count + 1.5, count + 0.5, 0.5),
        )
        axes.axvline(count + 0.5, color=SOFT, linewidth=0.8)
        axes.set_xlabel("told (last column: none of them)")
        axes.set_ylabel("asked for")
        whole_numbers(axes.xaxis, axes.yaxis)
        return image

    return _panels(benchmark, benchmark.finished(), (3.7, 3.7), 3, draw, "share of pictures")


def overlap_heat(benchmark: Benchmark) -> bytes | None:
    """One panel for each method with masks; None where there is none."""
    names = [
        name for name in benchmark.finished() if overlap_matrix(benchmark.methods[name]) is not None
    ]
    if not names:
        return None

    def draw(axes: Any, runs: Sequence[Run]) -> Any:
        matrix = overlap_matrix(runs)
        assert matrix is not None
        count = len(matrix)
        axes.set_xlabel("earlier concept")
        axes.set_ylabel("concept")
        whole_numbers(axes.xaxis, axes.yaxis)
        return axes.imshow(
            matrix,
            cmap=SHARES,
            vmin=0,
            interpolation="nearest",
            extent=(0.5, count + 0.5, count + 0.5, 0.5),
        )

    return _panels(benchmark, names, (4.2, 3.9), 3, draw, "share of its mask on the earlier one's")
