# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: list, run, plot, compare, table."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import record, report
from benchmarks.errors import InputError
from benchmarks.run import failures, run_suite
from benchmarks.suites import SUITES
from benchmarks.suites.suite import Settings, Suite
from stamina_kernels import dispatch

app = typer.Typer(
    help="Time, memory and accuracy of the kernels beside real rivals.",
    pretty_exceptions_enable=False,
)

ResultFile = Annotated[Path, typer.Argument(metavar="FILE", help="JSON written by `run`.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print an `InputError` as one line on stderr and leave with status 2."""
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise InputError(f"SUITE must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}") from error
    # a meta tensor holds nothing to time or to check, and the CPU has no second one
    if name != "cpu" and torch.device(name).type in ("cpu", "meta"):
        raise InputError(f"--device must be 'cpu' or a GPU such as 'cuda:0', got {name!r}")


def _check_backend(suite: Suite, device: str) -> None:
    """Raise InputError where `ours` would be the reference for want of the device's own backend."""
    if "ours" not in suite.rivals or os.environ.get(dispatch.VARIABLE):
        return
    defaults = dispatch.DEFAULTS.get(torch.device(device).type, ())
    reasons = {name: dispatch.backends()[name] for name in defaults}
    if reasons and None not in reasons.values():
        missing = "; ".join(f"{name!r} is not available: {why}" for name, why in reasons.items())
        raise InputError(
            f"'ours' would run on backend 'reference': {missing}; "
            f"{dispatch.VARIABLE}=reference measures the reference on purpose"
        )


@app.callback(invoke_without_command=True)
def list_suites(context: typer.Context) -> None:
    """Time, memory and accuracy beside real rivals. Without a command: lists the suites."""
    if context.invoked_subcommand is None:
        for suite in SUITES.values():
            typer.echo(f"{suite.name:10}{suite.about}")


@app.command()
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="One of the suites listed.")],
    json: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the result goes.")],
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds: a trial.")] = False,
    device: Annotated[str, typer.Option("--device", help="Where to run it.")] = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", help="After so many no further task begins. Default: no limit."),
    ] = None,
) -> None:
    """Run a suite and write its result, after every task what there is so far.

    Status 1 where an accuracy check failed or something raised.
    """
    with _one_line_errors():
        chosen = _suite(suite)
        record.check_writable(json, "--json")
        _check_device(device)
        _check_backend(chosen, device)
    console = Console(stderr=True)
    settings = Settings(quick=quick, device=device, seconds=seconds)
    result = _run_with_progress(
        chosen, settings, console, lambda so_far: record.write(json, so_far)
    )
    record.write(json, result)
    for what, why in result["skipped"].items():
        console.print(f"{what} is left out: {why}", soft_wrap=True, highlight=False)
    Console().print(report.summary_table(result["summary"], chosen.goals))
    failed = failures(result)
    for line in failed:
        typer.echo(line, err=True)
    if failed:
        raise typer.Exit(1)


def _run_with_progress(
    suite: Suite, settings: Settings, console: Console, keep: Callable[[record.Result], None]
) -> record.Result:
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console,
    )  # fmt: skip
    with bar:
        # the machine's peaks are a task too
        task = bar.add_task(suite.name, total=len(suite.tasks(settings)) + 1, completed=-1)
        result = run_suite(
            suite, settings, lambda label: bar.update(task, advance=1, description=label), keep
        )
        bar.update(task, advance=1, description=suite.name)
    return result


@app.command()
def plot(
    file: ResultFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder for the pictures. Default: FILE's."),
    ] = None,
) -> None:
    """Draw a result as PNG pictures."""
    with _one_line_errors():
        try:
            from benchmarks import plots  # matplotlib is imported where it is needed
        except ModuleNotFoundError as error:
            raise InputError(
                f"plot needs matplotlib, which the extra 'bench' has: {error}"
            ) from error
        result = record.read(file)
        folder = file.parent if output is None else output
        _make_folder(folder)
        for path in plots.draw(result, folder):
            typer.echo(path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder} is not writable")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[Path, typer.Argument(metavar="B")],
) -> None:
    """Show what changed from result A to result B, row by row."""
    with _one_line_errors():
        results = record.read(first), record.read(second)
    console = Console()
    for part in report.comparison(*results):
        console.print(part)


@app.command()
def table(file: ResultFile) -> None:
    """Print a result as Markdown, as in the README."""
    with _one_line_errors():
        result = record.read(file)
        suite = SUITES.get(result["rows"][0]["suite"]) if result["rows"] else None
        typer.echo(report.markdown(result, suite.goals if suite else {}))
