# SPDX-License-Identifier: Apache-2.0
"""The loop over tasks. A workload may be a diffusion model, a classifier, or a stub in a test."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor

from stamina_adapters.continual.store import RunStore
from stamina_adapters.training.errors import InputError


class TaskFailedError(InputError):
    """A task cannot be learned with these settings: the loss or a weight is not finite.

    `rows` say so in the run's file.
    """

    def __init__(self, message: str, rows: Sequence[BaseModel]) -> None:
        super().__init__(message)
        self.rows = rows


class Workload(Protocol):
    """A model and a sequence of tasks for it.

    Everything that a task's outcome depends on is in `snapshot`, or is the same in every process:
    after `restore`, `learn` must do to the bit what it would have done without the interruption.
    """

    tasks: int

    def restore(
        self, tensors: dict[str, Tensor], facts: dict[str, Any], rows: Sequence[BaseModel]
    ) -> None:
        """Bring a fresh workload to where `snapshot` was taken; `rows` are all rows until then."""
        ...

    def learn(self, task: int) -> list[BaseModel]:
        """Learn a task, counted from 0, evaluate what is due after it; returns its rows.

        Raises `TaskFailedError` when the settings do not allow it.
        """
        ...

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and facts of plain JSON types, to go on from."""
        ...


def run_tasks(
    workload: Workload,
    store: RunStore,
    on_task: Callable[[int, Sequence[BaseModel]], None] = lambda task, rows: None,
) -> None:
    """Learn the tasks that the store does not hold yet, committing each; then call `on_task`.

    Where one fails, its rows are noted and `TaskFailedError` is raised; the next call tries again.
    """
    if store.done:
        workload.restore(store.tensors, store.facts, store.rows(BaseModel))
    for task in range(store.done, workload.tasks):
        try:
            rows = workload.learn(task)
        except TaskFailedError as error:
            store.note(error.rows)
            raise
        store.commit(*workload.snapshot(), rows)
        on_task(task, rows)
