# SPDX-License-Identifier: Apache-2.0
"""A run on disk: killed at any moment, it resumes after its last finished task, each row once.

A run's folder holds `state.safetensors`, replaced after every task, and `rows.jsonl`. The state
is the only truth. It holds the rows of its own task and the length that the row file had before
them, and is renamed into place before they are appended. Opening a run cuts the row file to that
length and appends them again: whatever a killed process left of them is replaced by the same bytes.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stamina_adapters.continual.rows import from_line, read_rows, to_line
from stamina_adapters.files import write_beside
from stamina_adapters.training.errors import InputError

_STATE = "state.safetensors"
_ENTRY = "stamina_run"
_Kind = TypeVar("_Kind", bound=BaseModel)


class Lock:
    """Keeps a second process out of a folder; gone with the process, however it ends."""

    def __init__(self, folder: Path, wait: bool = False) -> None:
        """`wait` for the other process instead of raising `InputError`."""
        self._file, self._wait = folder / ".lock", wait

    def __enter__(self) -> "Lock":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._file.open("w")
        try:
            import fcntl
        except ImportError:  # only on systems without POSIX locks
            return self
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except OSError as error:
            self._stream.close()
            raise InputError(
                f"--output: another process works in {str(self._file.parent)!r}; "
                "wait for it, or give other methods or seeds"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


@contextmanager
def _reading(state: Path) -> Iterator[Any]:
    """The file's reader. Raises `InputError` where it is damaged."""
    try:
        with safe_open(state, framework="pt") as reader:
            yield reader
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"--output: {str(state)!r} is damaged; remove {str(state.parent)!r} to run it again"
        ) from error


def _described(reader: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((reader.metadata() or {})[_ENTRY])
    return found


def tasks_done(folder: Path) -> int:
    """How many tasks the run of a folder has finished; makes nothing.

    Raises `InputError` when its state cannot be read.
    """
    state = folder / _STATE
    if not state.is_file():
        return 0
    with _reading(state) as reader:
        return int(_described(reader)["done"])


class RunStore:
    """One run: `done` tasks, the tensors and facts to go on from, and the rows so far."""

    def __init__(self, folder: Path, rows: str = "rows.jsonl") -> None:
        """Open a run, or begin one in a new folder; the file `rows` is brought to the state's rows.

        Raises `InputError` when the state cannot be read, or rows before it are missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._lines = folder / _STATE, folder / rows
        self.done = 0
        self.facts: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._length = 0
        pending: list[str] = []
        if self._state.is_file():
            with _reading(self._state) as reader:
                described = _described(reader)
                self.tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            self.done, self.facts = described["done"], described["facts"]
            self._length, pending = described["length"], described["lines"]
        self._append(pending)

    def _append(self, lines: Sequence[str]) -> None:
        data = "".join(lines).encode()
        present = self._lines.stat().st_size if self._lines.exists() else 0
        if present < self._length:
            raise InputError(
                f"--output: {str(self._lines)!r} is damaged: it holds {present} of its first "
                f"{self._length} bytes; remove {str(self._lines.parent)!r} to run it again"
            )
        with self._lines.open("r+b" if present else "w+b") as stream:
            stream.truncate(self._length)
            stream.seek(self._length)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self._length += len(data)

    def rows(self, kind: type[_Kind]) -> list[_Kind]:
        """All rows of a kind, in the order written. Raises `InputError` for a line that is none."""
        return [row for row in read_rows([self._lines], "--output") if isinstance(row, kind)]

    def commit(
        self, tensors: dict[str, Tensor], facts: dict[str, Any], rows: Sequence[BaseModel]
    ) -> None:
        """Finish a task: the state to go on from and the task's rows, both or neither."""
        lines = [to_line(row) for row in rows]
        described = {
            "done": self.done + 1,
            "facts": facts,
            "length": self._length,
            "lines": lines,
        }
        flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_beside(self._state, save(flat, {_ENTRY: json.dumps(described)}))
        self._append(lines)
        self.done, self.facts, self.tensors = self.done + 1, facts, flat

    def note(self, rows: Sequence[BaseModel]) -> None:
        """Add rows that the state does not hold: they stand until the run is opened again."""
        length = self._length
        self._append([to_line(row) for row in rows])
        self._length = length


class RowLog:
    """Rows that stand for themselves, each written once under a key; used for cached results."""

    def __init__(self, file: Path) -> None:
        """Open or begin the file; a last line that a killed process left unfinished is cut off."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        data = file.read_bytes() if file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with file.open("r+b") as stream:
                stream.truncate(len(whole))
        try:
            self.rows: list[BaseModel] = [from_line(line) for line in whole.decode().splitlines()]
        except ValueError as error:
            raise InputError(
                f"--output: {str(file)!r} is damaged; remove it to compute it again"
            ) from error

    def append(self, row: BaseModel) -> None:
        """Write one more row."""
        with self._file.open("ab") as stream:
            stream.write(to_line(row).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)
