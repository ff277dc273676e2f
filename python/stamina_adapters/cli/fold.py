# SPDX-License-Identifier: Apache-2.0
"""`stamina fold`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from stamina_adapters import ConceptState, fold_concepts, read_stamina_weights
from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.workspace import (
    MODEL,
    check_output_dir,
    counted,
    full_disk_is_told,
    load_pipeline,
    save_pipeline,
)
from stamina_adapters.concept_checks import WrongBaseError
from stamina_adapters.training.errors import InputError


def fold(model: Path | None, concepts: Sequence[Path], output_dir: Path, console: Console) -> None:
    """Check everything, then fold and save; see `stamina fold --help`."""
    check_output_dir(output_dir)
    states = [_read(file) for place in concepts for file in _files(place)]
    pipe = load_pipeline(model or model_path())
    with console.status(f"folding {counted(len(states), 'concept')}"):
        _fold(pipe, states)
        with full_disk_is_told(output_dir, "--output_dir"):
            output_dir.mkdir(parents=True, exist_ok=True)
            save_pipeline(pipe, output_dir)
    console.print(f"stock pipeline  {output_dir}", soft_wrap=True, markup=False)


def _files(place: Path) -> list[Path]:
    """The concept files of a folder; of anything else, itself."""
    if not place.is_dir():
        return [place]
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"CONCEPTS {str(place)!r}: holds no .safetensors file; give the folder 'concepts' that "
            "stamina train wrote, or files in it"
        )
    return files


def _read(file: Path) -> ConceptState:
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
    except WrongBaseError as error:
        raise InputError(
            f"CONCEPTS: {_one_line(error)}; give the folder that it was learned on with {MODEL}"
        ) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"CONCEPTS: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
