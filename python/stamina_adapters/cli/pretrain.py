# SPDX-License-Identifier: Apache-2.0
"""`stamina pretrain`: the embedded model from scratch, and its gate."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.workspace import full_disk_is_told, load_pipeline
from stamina_adapters.embedded import gate
from stamina_adapters.embedded.pretrain import OtherSeedError
from stamina_adapters.embedded.pretrain import pretrain as train_embedded
from stamina_adapters.training.errors import InputError


def _chosen(seed: int | None) -> dict[str, Any]:
    """The seed as an argument; nothing where the function's own default is wanted."""
    return {} if seed is None else {"seed": seed}


def pretrain(output_dir: Path, seed: int | None, console: Console) -> None:
    """Train every stage, resuming from what `output_dir` holds."""
    where = f"--output_dir {str(output_dir)!r}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{where}: is a file; choose a folder") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be made ({error.strerror})") from error
    try:
        with full_disk_is_told(output_dir, "--output_dir"):
            assets = train_embedded(output_dir, **_chosen(seed))
    except OtherSeedError as error:
        raise InputError(f"{where}: {error}; choose another folder") from error
    console.print(f"model  {assets}", soft_wrap=True, markup=False)
    console.print("measure it with stamina pretrain --check", soft_wrap=True)


def check(model: Path | None, seed: int | None, console: Console) -> None:
    """Measure the gate of a model and print it."""
    folder = model or model_path()
    load_pipeline(folder)
    if not (folder / "encoder").is_dir():
        raise InputError(
            f"--pretrained_model_name_or_path {str(folder)!r}: holds no image encoder; "
            "give a folder that stamina pretrain made"
        )
    report = gate.check(folder, **_chosen(seed))
    console.print(_attributes(report["attributes"]))
    console.print(_bounds(report))
    console.print("the gate holds" if report["passed"] else "[red]the gate does not hold")


def _attributes(rows: dict[str, dict[str, float]]) -> Table:
    table = Table("attribute", "samples", "real pictures", "chance", title="Prompts obeyed")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("accuracy", "real", "chance")))
    return table


def _bounds(report: dict[str, Any]) -> Table:
    table = Table("gate", "measured", "bound", title="Gate")
    rebuilt, ceiling = report["reconstruction"], report["ceiling"]
    measured = {
        "identity through the autoencoder": (rebuilt["retrieval_reconstructed"], rebuilt["bound"]),
        f"ceiling among {ceiling['among']}": (ceiling["mean"], ceiling["bound"]),
    }
    for name, (value, bound) in measured.items():
        table.add_row(name, f"{value:.3f}", f"{bound:.2f}")
    return table
