# SPDX-License-Identifier: Apache-2.0
"""What compiled kernels cost, and the committed tables that they are held to."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parents[1] / "data"


class Cost(NamedTuple):
    """One row: a kernel in a dtype on an arch, as one version of a compiler made it.

    registers per thread; stack bytes; spills; shared bytes per block; matrix instructions.
    """

    kernel: str
    dtype: str
    arch: str
    compiler: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int


class Budget:
    """A committed table, and the shared memory that a block may have, by arch, in bytes."""

    def __init__(self, name: str, shared_limit: dict[str, int]) -> None:
        self.path, self._shared_limit = DATA / name, shared_limit

    def read(self) -> dict[tuple[str, ...], Cost]:
        with self.path.open(newline="") as file:
            _header, *rows = csv.reader(file)
        costs = [Cost(*row[:4], *map(int, row[4:])) for row in rows]
        return {cost[:3]: cost for cost in costs}

    def write(self, costs: Sequence[Cost]) -> None:
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Cost._fields, *costs])
        os.replace(beside, self.path)

    def faults(self, cost: Cost, committed: Cost | None) -> list[str]:
        """What is wrong with a row: limits that always hold, then what got worse than the table.

        Another version of the compiler allocates differently: only the limits are held against it.
        """
        found = [
            f"{name} {getattr(cost, name)}, must be 0"
            for name in ("stack", "spills")
            if getattr(cost, name)
        ]
        limit = self._shared_limit[cost.arch]
        if cost.shared > limit:
            found.append(f"shared {cost.shared}, the limit is {limit}")
        if committed is None:
            return [*found, f"no row in {self.path.name}; run with --update and commit it"]
        if committed.matrix and not cost.matrix:
            found.append("no matrix instruction")
        if cost.compiler == committed.compiler:
            found += [
                f"{name} {getattr(cost, name)}, was {getattr(committed, name)}"
                for name in ("registers", "shared")
                if getattr(cost, name) > getattr(committed, name)
            ]
        return found

    def compare(self, costs: Sequence[Cost]) -> int:
        """Print every row with its faults; 1 where there are any."""
        table, failed = self.read(), 0
        for cost in costs:
            found = self.faults(cost, table.get(cost[:3]))
            failed |= bool(found)
            print(*cost, *(f"<- {fault}" for fault in found))
        return int(failed)
