# SPDX-License-Identifier: Apache-2.0
"""`stamina demo`: five embedded concepts in a row, and what became of each."""

import hashlib
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stamina_adapters.cli.embedded import (
    embedded_concepts,
    model_path,
    sequence_identities,
    write_embedded_images,
)
from stamina_adapters.cli.page import page
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.report import ConceptReport, DemoReport, layer_groups, mean_by_key
from stamina_adapters.cli.train import learn_all, read_datasets
from stamina_adapters.cli.workspace import (
    check_output_dir,
    full_disk_is_told,
    load_pipeline,
    save_pipeline,
    write_png,
)
from stamina_adapters.config import StaminaConfig
from stamina_adapters.continual.spec import SamplingSpec
from stamina_adapters.continual.studio import Studio
from stamina_adapters.embedded import Identity, heldout_identities, load_encoder
from stamina_adapters.embedded.ceiling import train_ceiling
from stamina_adapters.embedded.pictures import REAL_PICTURES_SEED, pictures
from stamina_adapters.evaluation.cost import SD15_SHAPES, KeyValueShape, measure_projections
from stamina_adapters.evaluation.embedder import EncoderEmbedder
from stamina_adapters.evaluation.grid import image_grid
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.evaluation.metrics import a_mmd, f_mmd
from stamina_adapters.files import write_beside
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.methods import StaminaMethod
from stamina_adapters.training.trainer import ConceptLog, ContinualTrainer
from stamina_kernels import info

DISTRACTORS = 45
SAMPLES = 16
SAMPLING = SamplingSpec.model_validate(
    {"num_inference_steps": 20, "pictures": SAMPLES, "batch_size": SAMPLES}
)
SHOWN = 3
# reaches the accuracy of twice the steps at half the rate, in half the time
CEILING: dict[str, Any] = {"steps": 120, "rate": 2e-3}

Pictures = list[Image.Image]


def _draw(studio: Studio, pipe: Any, prompt: str, title: str) -> Pictures:
    (drawn,) = studio.draw(pipe, [prompt], title)
    return drawn


def _judge(learned: list[Identity]) -> Judge:
    """Tells identities among the learned ones and distractors."""
    known = {one.id for one in learned}
    others = [i for i in heldout_identities() if i.id not in known][:DISTRACTORS]

    def real(identities: list[Identity]) -> list[Pictures]:
        return [pictures(identity, SAMPLES, REAL_PICTURES_SEED) for identity in identities]

    return Judge(EncoderEmbedder(load_encoder()), real(learned), real(others))


_RELOAD = """
import hashlib, sys
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
torch.set_num_threads(int(sys.argv[4]))
image = pipe(
    sys.argv[2],
    num_inference_steps=4,
    generator=torch.Generator().manual_seed(int(sys.argv[3])),
    output_type="np",
).images
assert not any(name.startswith("stamina") for name in sys.modules)
print(hashlib.sha256(image.tobytes()).hexdigest())
"""


def reloads_identically(pipe: Any, folder: Path, prompt: str, seed: int = 0) -> bool:
    """Whether a process with diffusers alone makes the same image bits from the saved folder."""
    image = pipe(
        prompt,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    arguments = [str(folder), prompt, str(seed), str(torch.get_num_threads())]
    found = subprocess.run(
        [sys.executable, "-c", _RELOAD, *arguments], capture_output=True, text=True, check=True
    )
    return found.stdout.strip().endswith(hashlib.sha256(image.tobytes()).hexdigest())


@dataclass(frozen=True)
class _Gallery:
    """Pictures of every concept: real, of the family alone, and generated at each stage."""

    real: list[Pictures]
    base: list[Pictures]
    ceiling: list[Pictures]
    learned: list[Pictures]
    final: list[Pictures]

    def grid(self, concepts: list[ConceptSpec], identities: list[Identity]) -> Image.Image:
        """Rows: concepts; columns: real, right after learning, after all of them."""
        rows = [
            (
                f"{concept.token}\n{identity.family}",
                [stage[index][:SHOWN] for stage in (self.real, self.learned, self.final)],
            )
            for index, (concept, identity) in enumerate(zip(concepts, identities, strict=True))
        ]
        titles = ("real", "right after learning", f"after all {len(concepts)}")
        return image_grid(rows, titles)


def _ceiling(pipe: Any, progress: RunProgress, dataset: ConceptDataset, identity: Identity) -> Any:
    """The pipeline that has learned this concept alone."""
    images = np.stack([np.asarray(image) for image in dataset.images])
    with progress.waiting(f"ceiling {identity.id}"):
        return train_ceiling(pipe, images, like=identity.family, **CEILING)


def _run(
    trainer: ContinualTrainer,
    concepts: list[ConceptSpec],
    identities: list[Identity],
    folder: Path,
    console: Console,
) -> tuple[_Gallery, list[ConceptLog]]:
    datasets = read_datasets(concepts)
    with RunProgress(console) as progress:
        draw = partial(_draw, Studio(SAMPLING, progress.counting))
        families = {
            family: draw(trainer.pipe, f"a photo of a {family}", f"draw {family}, before learning")
            for family in dict.fromkeys(identity.family for identity in identities)
        }
        ceiling = [
            draw(
                _ceiling(trainer.pipe, progress, dataset, identity),
                "a photo of <v>",
                f"draw {identity.id}, learned alone",
            )
            for dataset, identity in zip(datasets, identities, strict=True)
        ]
        learned: list[Pictures] = []

        def draw_learned(index: int) -> None:
            concept = concepts[index]
            learned.append(draw(trainer.pipe, concept.instance_prompt, f"draw {concept.token}"))

        logs = learn_all(trainer, concepts, datasets, folder, progress, draw_learned)
        final = [
            draw(trainer.pipe, concept.instance_prompt, f"draw {concept.token} again, after all")
            for concept in concepts
        ]
    real = [dataset.images for dataset in datasets]
    base = [families[identity.family] for identity in identities]
    return _Gallery(real, base, ceiling, learned, final), logs


def _concept_reports(
    gallery: _Gallery,
    logs: list[ConceptLog],
    identities: list[Identity],
    judge: Judge,
    weights: dict[str, int],
) -> list[ConceptReport]:
    return [
        ConceptReport(
            token=log.token,
            identity=identity.id,
            family=identity.family,
            accuracy_base=judge.accuracy(gallery.base[index], index),
            accuracy_ceiling=judge.accuracy(gallery.ceiling[index], index),
            accuracy_after_learning=judge.accuracy(gallery.learned[index], index),
            accuracy_final=judge.accuracy(gallery.final[index], index),
            mask_density=layer_groups(log.densities, weights),
            loss_sampled_masks=log.probes[-1].sampled,
            loss_committed_masks=log.probes[-1].committed,
            seconds=log.seconds,
        )
        for index, (log, identity) in enumerate(zip(logs, identities, strict=True))
    ]


def _costs(pipe: Any, paths: list[str], batch: int, adapter: StaminaConfig) -> dict[str, float]:
    """The cost keys of the report: this run's layers, then SD 1.5's shapes."""
    tokens = batch * pipe.tokenizer.model_max_length
    keys = [pipe.unet.get_submodule(path) for path in paths if path.endswith("to_k")]
    shapes = [KeyValueShape(key.in_features, key.out_features, tokens) for key in keys]
    here = measure_projections(shapes, adapter.r, adapter.mask_rank)
    sd15 = measure_projections(SD15_SHAPES, adapter.r, adapter.mask_rank)
    return asdict(here) | {
        "step_ms_ours_sd15": sd15.step_ms_ours,
        "step_ms_eager_sd15": sd15.step_ms_eager,
    }


def _table(report: DemoReport) -> Table:
    table = Table(title=f"Told as itself among {report.identities} identities")
    for title in ("concept", "before", "alone, in full", "after learning", "after all", "density"):
        table.add_column(title, justify="left" if title == "concept" else "right")

    def row(name: str, of: ConceptReport | DemoReport) -> None:
        shares = (
            of.accuracy_base,
            of.accuracy_ceiling,
            of.accuracy_after_learning,
            of.accuracy_final,
            sum(of.mask_density.values()) / len(of.mask_density),
        )
        table.add_row(name, *(f"{share:.2f}" for share in shares))

    for concept in report.concepts:
        row(f"{concept.token} {concept.identity}", concept)
    table.add_section()
    row("mean", report)
    return table


def demo(
    output: Path, training: TrainingConfig, adapter: StaminaConfig, console: Console
) -> DemoReport:
    """Run it all and write it down; see `stamina demo --help`."""
    check_output_dir(output, "--output")
    with full_disk_is_told(output, "--output"):
        return _demo(output, training, adapter, console)


def _demo(
    output: Path, training: TrainingConfig, adapter: StaminaConfig, console: Console
) -> DemoReport:
    started = time.perf_counter()
    trainer = ContinualTrainer(load_pipeline(model_path()), StaminaMethod(adapter), training)
    pipe = trainer.pipe
    identities, concepts = sequence_identities(), embedded_concepts(output / "images")
    judge = _judge(identities)
    write_embedded_images(concepts)
    gallery, logs = _run(trainer, concepts, identities, output / "run", console)
    save_pipeline(pipe, output / "run")
    console.print("measuring cost, reloading with diffusers alone")
    paths = list(logs[0].densities)
    weights = {path: pipe.unet.get_submodule(path).weight.numel() for path in paths}
    rows = _concept_reports(gallery, logs, identities, judge, weights)
    embedded = {
        stage: [judge.embedder.embed(images) for images in getattr(gallery, stage)]
        for stage in ("learned", "final")
    }
    means = {
        key: sum(getattr(row, key) for row in rows) / len(rows)
        for key in DemoReport.model_fields
        if key.startswith("accuracy_")
    }
    report = DemoReport(
        concepts=rows,
        identities=judge.identities,
        pictures=SAMPLES,
        **means,
        a_mmd=a_mmd(judge.real, embedded["final"]),
        f_mmd=f_mmd(embedded["learned"], embedded["final"]),
        mask_density=mean_by_key([row.mask_density for row in rows]),
        **_costs(pipe, paths, training.train_batch_size, adapter),
        stock_pipeline_bit_identical=reloads_identically(
            pipe, output / "run", concepts[0].instance_prompt
        ),
        backend=info()["default_backend"],
        threads=torch.get_num_threads(),
        seed=training.seed,
        seconds=time.perf_counter() - started,
    )
    grid = gallery.grid(concepts, identities)
    write_png(output / "grid.png", grid)
    write_beside(output / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_beside(output / "report.html", page(report, grid, logs).encode())
    console.print(_table(report))
    for expectation, met in report.expectations().items():
        console.print(f"[green]yes[/]  {expectation}" if met else f"[red]no[/]   {expectation}")
    console.print(f"\nLook at [bold]{escape(str(output / 'report.html'))}[/]", soft_wrap=True)
    return report
