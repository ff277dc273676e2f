# SPDX-License-Identifier: Apache-2.0
"""The output folder of a benchmark: whose it is, and whether it has room."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from stamina_adapters.files import write_beside
from stamina_adapters.training.errors import InputError

_SPEC = "spec.json"
MARGIN = 64 * 2**20
"""Bytes to leave free besides what the runs need."""


def first_difference(old: Any, new: Any, at: str = "") -> str | None:
    """The key of the first value that differs, None where none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{at}.{key}" if at else key)
            if found is not None:
                return found
        return None
    return None if old == new else at


def check_folder(folder: Path, identity: dict[str, Any], argument: str = "--output") -> None:
    """Raise `InputError` unless `folder` is new, empty, or holds runs of the same identity.

    `identity` is plain JSON: the specification and digests of what it names. Makes nothing.
    """
    where = f"{argument} {str(folder)!r}"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{where}: is a file; choose an empty or new folder")
        # a hidden file may be what a killed process left of the first one
        if folder.is_dir() and any(not e.name.startswith(".") for e in folder.iterdir()):
            file = folder / _SPEC
            if not file.is_file():
                raise InputError(f"{where}: is in use (not empty); choose an empty or new folder")
            old = json.loads(file.read_text(encoding="utf-8"))
            # through JSON, so that tuples and lists are alike
            differs = first_difference(old, json.loads(json.dumps(identity)))
            if differs is not None:
                raise InputError(
                    f"{where}: holds another run ({differs} differs); choose a new folder, or give "
                    "what that run was given to go on with it"
                )
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"{where}: {str(parent)!r} is not writable; choose another folder")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: cannot be read ({error}); choose another folder") from error


def check_room(folder: Path, needed: int, argument: str = "--output") -> None:
    """Raise `InputError` when the disk of `folder` has less free than `needed` and a margin."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + MARGIN:
        raise InputError(
            f"{argument} {str(folder)!r}: the disk has {free >> 20} MiB free, "
            f"{(needed + MARGIN) >> 20} MiB are needed; free some or choose another folder"
        )


def claim_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder, and write there whose it is; for the holder of its `Lock`.

    Raises `InputError` as `check_folder` does: another process may have claimed it since.
    """
    check_folder(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _SPEC).is_file():
        write_beside(folder / _SPEC, (json.dumps(identity, indent=1) + "\n").encode())
