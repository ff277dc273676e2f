# SPDX-License-Identifier: Apache-2.0
"""One progress display for a whole command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from stamina_adapters.training.trainer import StepReport

_SMOOTHING = 0.95
# columns of text that a shortest bar, counts, time, loss and density take
_BESIDE_TITLE = 48


class RunProgress:
    """Bars for training and for anything that is counted; a context manager.

    `keep` False removes bars that are full when another begins: for commands with hundreds.
    Where the console cannot show moving bars, there is a line for each instead when it begins.
    """

    def __init__(self, console: Console, keep: bool = True) -> None:
        self._keep = keep
        # a long title is cut, and never the numbers
        width = max(8, console.width - _BESIDE_TITLE)
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, max_width=width),
            ),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_interactive,
        )

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _add(self, title: str, total: int | None) -> TaskID:
        if self._progress.disable:
            self._progress.console.print(title, soft_wrap=True, markup=False, highlight=False)
        if not self._keep:
            for task in self._progress.tasks:
                if task.finished:
                    self._progress.remove_task(task.id)
        return self._progress.add_task(title, total=total, note="")

    def counting(self, title: str, total: int) -> Callable[[int], None]:
        """A bar; call the result with how many more are done."""
        task = self._add(title, total)
        return lambda count: self._progress.update(task, advance=count)

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """A bar that only shows that something of unknown length is going on."""
        task = self._add(title, None)
        yield
        self._progress.update(task, total=1, completed=1)

    def training(self, title: str, total: int) -> Callable[[StepReport], None]:
        """A bar for a concept's steps, with its loss and mask density.

        The loss shown is an exponential mean: single batches differ by more than a concept learns
        in a hundred steps.
        """
        task = self._add(title, total)
        smooth: float | None = None

        def on_step(report: StepReport) -> None:
            nonlocal smooth
            last = report.loss if smooth is None else smooth
            smooth = _SMOOTHING * last + (1 - _SMOOTHING) * report.loss
            density = "" if report.density is None else f"  density {report.density:.2f}"
            self._progress.update(task, advance=1, note=f"loss {smooth:.4f}{density}")

        return on_step
