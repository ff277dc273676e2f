# SPDX-License-Identifier: Apache-2.0
"""`stamina report`."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stamina_adapters.cli.workspace import counted, full_disk_is_told
from stamina_adapters.continual.report.page import markdown, page
from stamina_adapters.continual.report.results import collect as collect_rows
from stamina_adapters.continual.report.results import read_results
from stamina_adapters.files import write_beside
from stamina_adapters.training.errors import InputError


def report(
    folders: Sequence[Path], output: Path | None, collect: Path | None, console: Console
) -> None:
    """Read, then write; see `stamina report --help`."""
    results = read_results(folders)
    target = folders[0] if output is None else output
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {str(target)!r}: is a file; choose a folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {str(target)!r}: cannot be made ({error.strerror})") from error
    if not os.access(target, os.W_OK):
        raise InputError(f"--output {str(target)!r}: is not writable; choose another folder")
    made = page(results)
    if collect is not None:
        copies = collect_rows(folders, collect)
        console.print(
            f"{counted(len(copies), 'row file')} in {collect}", soft_wrap=True, markup=False
        )
    with full_disk_is_told(target, "--output"):
        write_beside(target / "report.html", made.encode())
        write_beside(target / "report.md", markdown(results).encode())
    for benchmark in results.benchmarks:
        if differences := benchmark.differences():
            console.print(differences, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Look at [bold]{escape(str(target / 'report.html'))}[/]", soft_wrap=True)
