# SPDX-License-Identifier: Apache-2.0
"""Command line options made from settings classes, so that each is defined once."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from stamina_adapters.config import StaminaConfig
from stamina_adapters.training.config import TrainingConfig, describe
from stamina_adapters.training.errors import InputError

_Settings = TypeVar("_Settings", bound=BaseModel)

# The help cuts names where they and the types beside them leave no room at 80 columns. So the
# longest name has a panel of its own, and types are short.
MODEL_PANEL = "Model"
Model = Annotated[
    Path | None,
    typer.Option(
        "--pretrained_model_name_or_path",
        metavar="DIR",
        help="Local Stable Diffusion folder. Default: the embedded model.",
        rich_help_panel=MODEL_PANEL,
    ),
]
OutputDir = Annotated[Path, typer.Option("--output_dir", help="New or empty folder.")]

# a settings field and its option, where the names differ
_SPELLING = {"r": "rank"}
_LEFT_OUT = {(StaminaConfig, "seed"), (StaminaConfig, "target_modules")}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an `InputError` as one line on stderr and leave with status 2."""
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def console() -> Console:
    """Where commands print what they did."""
    return Console()


def _fields(kind: type[BaseModel]) -> dict[str, str]:
    """Option name of every field that has an option."""
    names = [name for name in kind.model_fields if (kind, name) not in _LEFT_OUT]
    return {_SPELLING.get(name, name): name for name in names}


def _parameters(kind: type[BaseModel], panel: str) -> list[inspect.Parameter]:
    parameters = []
    for option, name in _fields(kind).items():
        field = kind.model_fields[name]
        flags = f"--{option}/--no_{option}" if field.annotation is bool else f"--{option}"
        # the description names the values
        metavar = "<name>" if get_origin(field.annotation) is Literal else None
        declared = typer.Option(
            flags, metavar=metavar, help=field.description, rich_help_panel=panel
        )
        parameters.append(
            inspect.Parameter(
                option,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[field.annotation, declared],
            )
        )
    return parameters


def _make(kind: type[_Settings], given: dict[str, Any]) -> _Settings:
    fields = _fields(kind)
    try:
        return kind(**{name: given.pop(option) for option, name in fields.items()})
    except ValidationError as error:
        spelling = {name: option for option, name in fields.items()}
        key = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
        message = describe(error)
        raise InputError(f"--{message.replace(key, spelling.get(key, key), 1)}") from error


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `TrainingConfig` and `StaminaConfig` as options.

    The command itself takes them as two arguments, `training` and `adapter`.
    """

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        with one_line_errors():
            training = _make(TrainingConfig, given)
            adapter = _make(StaminaConfig, given)
        command(training=training, adapter=adapter, **given)

    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name not in ("training", "adapter")]
    parameters = [
        *own,
        *_parameters(TrainingConfig, "Training"),
        *_parameters(StaminaConfig, "Adapter"),
    ]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
