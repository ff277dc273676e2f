# SPDX-License-Identifier: Apache-2.0
"""`stamina evaluate`: the metrics for a folder that exists."""

import os
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stamina_adapters.cli.benchmark import embedder
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.train import read_datasets
from stamina_adapters.cli.workspace import (
    MODEL,
    check_inference_steps,
    check_length,
    counted,
    full_disk_is_told,
    load_pipeline,
)
from stamina_adapters.continual.score import mean
from stamina_adapters.continual.spec import SamplingSpec
from stamina_adapters.continual.studio import Studio
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.evaluation.kid import kid, metric_class
from stamina_adapters.evaluation.metrics import polynomial_mmd
from stamina_adapters.files import write_beside
from stamina_adapters.training.config import load_concepts_list
from stamina_adapters.training.errors import InputError

KID_PICTURES = 10
"""Fewest real and fewest drawn pictures, of all concepts together, that a KID is computed from."""


class ConceptFigures(BaseModel):
    """One concept; `accuracy` is the share told as itself, None where there is no other."""

    token: str
    accuracy: float | None
    cosine: float
    mmd: float


class Figures(BaseModel):
    """What `stamina evaluate` measures.

    a_mmd      mean over concepts of the discrepancy to their real pictures
    kid        of all real and all generated pictures; None for fewer than 10 (`KID_PICTURES`) of
               either, whose spread says more of chance than of the model
    accuracy   mean over concepts; chance is one over their number
    """

    model: str
    judged_by: str
    pictures: int
    accuracy: float | None
    cosine: float
    a_mmd: float
    kid: float | None
    concepts: list[ConceptFigures]


def _check_output(file: Path | None) -> None:
    if file is None:
        return
    where, folder = f"--output {str(file)!r}", file.absolute().parent
    try:
        if file.exists():
            raise InputError(f"{where}: exists; choose another file")
        if not folder.is_dir():
            raise InputError(f"{where}: its folder does not exist; make it")
    except PermissionError as error:
        raise InputError(f"{where}: its folder cannot be read; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{where}: its folder is not writable; choose another")


def _check_known(pipe: Any, tokens: list[str], model: Path) -> None:
    vocabulary = pipe.tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise InputError(
            f"{MODEL} {str(model)!r}: has not learned {', '.join(unknown)}; give the folder that "
            "was trained on this list"
        )


def evaluate(
    model: Path,
    concepts_list: Path,
    clip: Path | None,
    sampling: SamplingSpec,
    output: Path | None,
    console: Console,
) -> Figures:
    """Check everything, then draw and judge; see `stamina evaluate --help`."""
    metric_class()
    _check_output(output)
    concepts = load_concepts_list(concepts_list)
    datasets = read_datasets(concepts, concepts_list)
    pipe = load_pipeline(model)
    _check_known(pipe, [concept.token for concept in concepts], model)
    for concept in concepts:
        where = f"--concepts_list: instance_prompt of {concept.token!r}"
        check_length(pipe, concept.instance_prompt, where)
    check_inference_steps(pipe, sampling.num_inference_steps, "--num_inference_steps")
    judged = embedder(clip)
    real_pictures = [dataset.images for dataset in datasets]
    # a centroid alone tells nobody apart, but the distances to it are still of use
    several = len(concepts) > 1
    judge = Judge(judged, real_pictures, () if several else real_pictures)
    with RunProgress(console) as progress:
        drawn = Studio(sampling, progress.counting).draw(
            pipe,
            [concept.instance_prompt for concept in concepts],
            f"draw {counted(len(concepts) * sampling.pictures, 'picture')}",
        )
    embedded = [judged.embed(images) for images in drawn]
    rows = [
        ConceptFigures(
            token=concept.token,
            accuracy=judge.centroids.accuracy(embedded[k], k) if several else None,
            cosine=judge.cosine(embedded[k], k),
            mmd=polynomial_mmd(judge.real[k], embedded[k]),
        )
        for k, concept in enumerate(concepts)
    ]
    figures = _figures(rows, judge, embedded, model, clip, sampling)
    console.print(figures_table(figures))
    if output is not None:
        with full_disk_is_told(output, "--output"):
            write_beside(output, (figures.model_dump_json(indent=1) + "\n").encode())
    return figures


def _figures(
    rows: list[ConceptFigures],
    judge: Judge,
    embedded: list[torch.Tensor],
    model: Path,
    clip: Path | None,
    sampling: SamplingSpec,
) -> Figures:
    real, made = torch.cat(judge.real), torch.cat(embedded)
    known = [row.accuracy for row in rows if row.accuracy is not None]
    return Figures(
        model=str(model),
        judged_by="the shipped encoder" if clip is None else str(clip),
        pictures=sampling.pictures,
        accuracy=mean(known) if known else None,
        cosine=mean([row.cosine for row in rows]),
        a_mmd=mean([row.mmd for row in rows]),
        kid=kid(real, made) if min(len(real), len(made)) >= KID_PICTURES else None,
        concepts=rows,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def figures_table(figures: Figures) -> Table:
    distance = "-" if figures.kid is None else f"{1e3 * figures.kid:.3f}"
    judge = escape(figures.judged_by)  # square brackets, of a folder or a token, are no style
    table = Table(title=f"{counted(figures.pictures, 'picture')} each, judged by {judge}")
    chance = "" if figures.accuracy is None else f", chance {1 / len(figures.concepts):.2f}"
    table.add_column("concept")
    for title in (f"told as itself{chance}", "cosine to real", "MMD to real"):
        table.add_column(title, justify="right")
    for row in figures.concepts:
        name = escape(row.token)
        table.add_row(name, _share(row.accuracy), f"{row.cosine:.3f}", f"{row.mmd:.3f}")
    table.add_section()
    table.add_row("mean", _share(figures.accuracy), f"{figures.cosine:.3f}", f"{figures.a_mmd:.3f}")
    table.add_row("KID x 1000", "", "", distance)
    return table
