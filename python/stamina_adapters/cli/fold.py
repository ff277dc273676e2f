# SPDX-License-Identifier: Apache-2.0
"""`stamina fold`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from stamina_adapters import ConceptState, fold_concepts, read_stamina_weights
from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.workspace import (
    check_output_dir,
    counted,
    full_disk_is_told,
    load_pipeline,
    save_pipeline,
)
from stamina_adapters.training.errors import InputError


def fold(model: Path | None, concepts: Sequence[Path], output_dir: Path, console: Console) -> None:
    """Check everything, then fold and save; see `stamina fold --help`."""
    check_output_dir(output_dir)
    states = [_read(file) for file in concepts]
    pipe = load_pipeline(model or model_path())
    with console.status(f"folding {counted(len(states), 'concept')}"):
        _fold(pipe, states)
        with full_disk_is_told(output_dir, "--output_dir"):
            output_dir.mkdir(parents=True, exist_ok=True)
            save_pipeline(pipe, output_dir)
    console.print(f"stock pipeline  {output_dir}", soft_wrap=True, markup=False)


def _read(file: Path) -> ConceptState:
    if file.is_dir():
        raise InputError(
            f"CONCEPTS {str(file)!r}: is a folder; give its files, in the order learned"
        )
    if not file.is_file():
        raise InputError(
            f"CONCEPTS {str(file)!r}: no such file; give files that stamina train wrote"
        )
    try:
        return read_stamina_weights(file)
    except (ValueError, OSError) as error:
        raise InputError(f"CONCEPTS {str(file)!r}: {_one_line(error)}") from error


def _fold(pipe: Any, states: Sequence[ConceptState]) -> None:
    try:
        fold_concepts(pipe, states)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"CONCEPTS: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
