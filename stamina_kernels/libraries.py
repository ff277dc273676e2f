# SPDX-License-Identifier: Apache-2.0
"""Why a compiled library is not beside the package's own files."""

import sys
from pathlib import Path


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
