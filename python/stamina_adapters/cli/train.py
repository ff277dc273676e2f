# SPDX-License-Identifier: Apache-2.0
"""`stamina train`: concept after concept, folded one by one."""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stamina_adapters.cli.embedded import embedded_concepts, model_path, write_embedded_images
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.workspace import (
    MODEL,
    check_new_tokens,
    check_output_dir,
    full_disk_is_told,
    load_pipeline,
    save_pipeline,
)
from stamina_adapters.config import StaminaConfig
from stamina_adapters.continual.folder import check_room
from stamina_adapters.continual.masks import weighted_density
from stamina_adapters.continual.snapshot import pipeline_bytes
from stamina_adapters.files import write_beside
from stamina_adapters.training.config import (
    ConceptSpec,
    TrainingConfig,
    load_concepts_list,
    pictures_argument,
)
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.methods import StaminaMethod
from stamina_adapters.training.trainer import ConceptLog, ContinualTrainer


def _concept_file(folder: Path, concept: ConceptSpec) -> Path:
    return folder / "concepts" / f"{concept.name}.safetensors"


def learn_all(
    trainer: ContinualTrainer,
    concepts: list[ConceptSpec],
    datasets: list[ConceptDataset],
    folder: Path,
    progress: RunProgress,
    on_learned: Callable[[int], None] | None = None,
) -> list[ConceptLog]:
    """Learn every concept in turn; after each, write its file and the record of the run so far.

    Writes `folder`/concepts/<name>.safetensors and `folder`/training.json. `on_learned` is called
    with the concept's position once it is folded.
    """
    (folder / "concepts").mkdir(parents=True)
    logs: list[ConceptLog] = []
    for index, (concept, dataset) in enumerate(zip(concepts, datasets, strict=True)):
        title = f"learn {index + 1}/{len(concepts)} {concept.token}"
        on_step = progress.training(title, trainer.config.max_train_steps)
        state, log = trainer.learn(concept, dataset, on_step)
        trainer.method.save(state, _concept_file(folder, concept))
        logs.append(log)
        write_beside(folder / "training.json", _record(trainer, logs).encode())
        if on_learned is not None:
            on_learned(index)
    return logs


def _record(trainer: ContinualTrainer, logs: list[ConceptLog]) -> str:
    record = {
        "training": trainer.config.model_dump(),
        "method": trainer.method.settings(),
        "concepts": [log.model_dump() for log in logs],
    }
    return json.dumps(record, indent=1)


def read_datasets(concepts: list[ConceptSpec], file: Path | None = None) -> list[ConceptDataset]:
    """Every concept's pictures, decoded and checked; `file` is the list that names them."""
    return [
        ConceptDataset.from_folder(c.instance_data_dir, pictures_argument(index, file))
        for index, c in enumerate(concepts)
    ]


def summary_table(logs: list[ConceptLog], pipe: Any) -> Table:
    """One row for each concept that `pipe` has learned; densities are of the committed masks."""
    table = Table(title="Learned concepts")
    losses = ("loss, sampled masks", "loss, committed masks")
    for title in ("token", "images", *losses, "density", "seconds"):
        table.add_column(title, justify="left" if title == "token" else "right")
    for log in logs:
        last = log.probes[-1]
        density = weighted_density(log.densities, pipe)
        table.add_row(
            escape(log.token),
            str(log.images),
            f"{last.sampled:.4f}",
            f"{last.committed:.4f}",
            "-" if density is None else f"{density:.2f}",
            f"{log.seconds:.1f}",
        )
    return table


@contextmanager
def _interruption_is_told(
    model: Path | None, concepts: Sequence[ConceptSpec], folder: Path
) -> Iterator[None]:
    """Where Ctrl-C ends the block, tell on stderr what is kept and how to make a pipeline of it."""
    try:
        yield
    except KeyboardInterrupt:
        learned = [c for c in concepts if _concept_file(folder, c).is_file()]
        if learned:
            base = [] if model is None else [MODEL, str(model)]
            files = [str(_concept_file(folder, concept)) for concept in learned]
            command = shlex.join(["stamina", "fold", *files, *base, "--output_dir", "NEW"])
            message = (
                f"{', '.join(concept.token for concept in learned)} kept in "
                f"{str(folder / 'concepts')!r}; make a pipeline with: {command}"
            )
        else:
            message = "no concept is finished; choose an empty or new folder to begin again"
        typer.echo(f"interrupted: {message}", err=True)
        raise


def train(
    model: Path | None,
    concepts_list: Path | None,
    output_dir: Path,
    training: TrainingConfig,
    adapter: StaminaConfig,
    console: Console,
) -> None:
    """Check everything, then learn; see `stamina train --help`."""
    if model is not None and concepts_list is None:
        raise InputError(
            "--concepts_list: is needed with a model of your own; give a JSON list of concepts"
        )
    check_output_dir(output_dir)
    if concepts_list is None:
        concepts = embedded_concepts(output_dir / "images")
    else:
        concepts = load_concepts_list(concepts_list)
        datasets = read_datasets(concepts, concepts_list)
    pipe = load_pipeline(model or model_path())
    check_new_tokens(pipe, concepts, "--concepts_list")
    trainer = ContinualTrainer(pipe, StaminaMethod(adapter), training)
    # concept files and pictures are small beside the pipeline
    check_room(output_dir, pipeline_bytes(pipe), "--output_dir")
    with (
        full_disk_is_told(output_dir, "--output_dir"),
        _interruption_is_told(model, concepts, output_dir),
    ):
        output_dir.mkdir(parents=True, exist_ok=True)
        if concepts_list is None:
            write_embedded_images(concepts)
            datasets = read_datasets(concepts)
        with RunProgress(console) as progress:
            logs = learn_all(trainer, concepts, datasets, output_dir, progress)
        save_pipeline(pipe, output_dir)
    console.print(summary_table(logs, pipe))
    console.print(f"stock pipeline  {output_dir}", soft_wrap=True, markup=False)
    console.print(f"concept files   {output_dir / 'concepts'}", soft_wrap=True, markup=False)
