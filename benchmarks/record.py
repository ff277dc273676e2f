# SPDX-License-Identifier: Apache-2.0
"""The result file: {"machine", "versions", "rows", "summary"} as JSON."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.errors import InputError

Row = TypedDict(
    "Row",
    {
        "suite": str,
        "case": str,
        "provider": str,
        "pass": str,
        "median_ms": float | None,
        "p20_ms": float | None,
        "p80_ms": float | None,
        "device_ms": float | None,
        "device_p20_ms": float | None,
        "device_p80_ms": float | None,
        "busy_ms": float | None,
        "launches": float | None,
        "gb_s": float | None,
        "tflop_s": float | None,
        "saved_mib": float | None,
        "peak_mib": float | None,
        "error": float | None,
        "error_limit": float | None,
        "machine": str,
        "versions": dict[str, str | None],
    },
)


# Of the machine, what tables and pictures need.
_MACHINE = {"cpu", "device", "threads"}
# What results of before devices had clocks lack.
_LATER = ("device_ms", "device_p20_ms", "device_p80_ms", "busy_ms", "launches", "gb_s", "tflop_s")


class Result(TypedDict):
    """Machine and versions in full; rows repeat them in short, to stand alone.

    skipped: what could not run here or had no time left, and why. errors: what raised.
    """

    machine: dict[str, Any]
    versions: dict[str, str | None]
    rows: list[Row]
    summary: dict[str, float | None]
    skipped: dict[str, str]
    errors: dict[str, str]


def device_ms(row: Row) -> float | None:
    return row["device_ms"]


def busy_ms(row: Row) -> float | None:
    return row["busy_ms"]


def wall_ms(row: Row) -> float | None:
    return row["median_ms"]


def peak_mib(row: Row) -> float | None:
    return row["peak_mib"]


def on_device(row: Row) -> bool:
    """Whether the row has a time of a device."""
    return device_ms(row) is not None or busy_ms(row) is not None


def by_kernels(row: Row) -> bool:
    """Whether the row is shown by the time of its kernels, for want of one between events."""
    return device_ms(row) is None and busy_ms(row) is not None


def milliseconds(row: Row) -> float | None:
    """The time that a row is shown by: between events on the device, else of its kernels, else the
    caller's."""
    times = (device_ms(row), busy_ms(row), wall_ms(row))
    return next((time for time in times if time is not None), None)


def failed(row: Row) -> bool:
    """Whether the row's accuracy check failed; one that was not checked did not."""
    error, limit = row["error"], row["error_limit"]
    return error is not None and limit is not None and not error <= limit


def key(row: Row) -> tuple[str, str, str, str]:
    """What a row is about: rows of two results are joined by it."""
    return row["suite"], row["case"], row["provider"], row["pass"]


def read(file: Path) -> Result:
    """The result in a file. Raises InputError naming the file and what is wrong with it."""
    try:
        result = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if isinstance(result, dict):
        result = {"skipped": {}, "errors": {}} | result
    if not isinstance(result, dict) or not set(Result.__annotations__) <= set(result):
        raise InputError(f"{file} is not a result of `python -m benchmarks run`")
    rows = result["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file} has rows that are no objects")
    for name in ("machine", "versions", "summary", "skipped", "errors"):
        if not isinstance(result[name], dict):
            raise InputError(f"{file}: {name!r} is no object")
    if missing := sorted(_MACHINE - set(result["machine"])):
        raise InputError(f"{file}: 'machine' lacks {', '.join(missing)}")
    result["rows"] = [dict.fromkeys(_LATER) | row for row in rows]
    if any(set(Row.__annotations__) - set(row) for row in result["rows"]):
        raise InputError(f"{file} has rows that lack fields of this version")
    return result  # type: ignore[return-value]


def check_writable(path: Path, option: str) -> None:
    """Raise InputError unless a file can be written at the path; nothing is left behind."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {path.parent} is not writable")


def write_beside(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it: a reader sees all of it or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(file: Path, result: Result) -> None:
    write_beside(file, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
