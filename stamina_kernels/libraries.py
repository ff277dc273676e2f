# SPDX-License-Identifier: Apache-2.0
"""Whether a compiled library is there and of these sources."""

import sys
from collections.abc import Callable
from pathlib import Path


def check_interface(version: Callable[[], int] | None, needed: int) -> None:
    """Raise OSError unless a library tells the interface version that is needed."""
    if version is None or version() != needed:
        raise OSError("it was built from another version of the sources; build it again")


def missing_reason(library: Path, needs: str) -> str:
    """That the build left `library` out, and what it needs, or where another copy of the package
    has it, as where the source folder comes before the installed package on Python's path."""
    folder = library.parent
    for entry in sys.path:
        other = Path(entry).resolve() / folder.name
        if other != folder.resolve() and (other / library.name).exists():
            return (
                f"{folder} is the package in use and holds no {library.name}; {other} has it: "
                f"run outside {folder.parent}, or install with `pip install -e .`"
            )
    return (
        f"{library.name} was not built; it needs {needs}, "
        "as in `pip install --no-build-isolation .`"
    )
