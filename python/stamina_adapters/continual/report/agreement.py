# SPDX-License-Identifier: Apache-2.0
"""Which runs may stand in one table: a deviation over seeds is one where only the seed differs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stamina_adapters.continual.folder import first_difference
from stamina_adapters.continual.rows import RunRow
from stamina_adapters.training.errors import InputError


def check_agreement(runs: Iterable[tuple[RunRow, Path]]) -> None:
    """Raise `InputError` where runs of one benchmark, or of one method in it, differ in more than
    their seed, naming the first value that does and both files."""
    first: dict[str, tuple[RunRow, Path]] = {}
    for row, file in runs:
        for of, identity in (
            (row.benchmark, _of_benchmark),
            (f"{row.benchmark}, {row.method}", _of_method),
        ):
            other, other_file = first.setdefault(of, (row, file))
            differs = first_difference(identity(other), identity(row))
            if differs is not None:
                raise InputError(
                    f"DIR: {str(other_file)!r} and {str(file)!r} are both of {of}, but {differs} "
                    "differs; give the rows of one experiment"
                )


def _of_benchmark(row: RunRow) -> dict[str, Any]:
    return row.model_dump(include={"concepts", "identities", "pictures"})


def _of_method(row: RunRow) -> dict[str, Any]:
    training = {key: value for key, value in row.training.items() if key != "seed"}
    return {"training": training, "settings": row.settings}


def told_differences(rows: Sequence[RunRow]) -> str | None:
    """One line on what the runs of a benchmark were made with, where that differs, else None.

    Such runs may be compared: they differ in rounding and in seconds.
    """
    made = [{**row.versions, "device": row.device, "threads": row.threads} for row in rows]
    differing = []
    for name in sorted({name for one in made for name in one}):
        values = {str(one.get(name)) for one in made}
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(sorted(values))})")
    return f"Runs of {rows[0].benchmark} differ in {', '.join(differing)}." if differing else None
