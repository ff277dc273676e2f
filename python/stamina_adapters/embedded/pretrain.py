# SPDX-License-Identifier: Apache-2.0
"""From nothing to the shipped assets, stage by stage, each resumable."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import CLIPTokenizer

from stamina_adapters.embedded import autoencoder as ae
from stamina_adapters.embedded import diffusion as dm
from stamina_adapters.embedded import encoder as enc
from stamina_adapters.embedded.captions import save_tokenizer
from stamina_adapters.embedded.data import CHUNK, pictures
from stamina_adapters.embedded.training import Schedule
from stamina_adapters.files import write_beside

STAGES = ("autoencoder", "encoder", "diffusion", "decoder", "export")


@dataclass(frozen=True)
class Plan:
    """Sizes of a pretraining run; the defaults are those of the shipped model.

    Attributes:
        picture_chunks: chunks of pictures the autoencoder trains on.
        latent_chunks: chunks of latents the diffusion model trains on.
        pair_chunks: chunks of picture groups the encoder trains on.
        chunk: rows of a chunk of pictures or latents.
        autoencoder: schedule of the autoencoder.
        decoder: schedule of the decoder alone, after it.
        encoder: schedule of the metric encoder.
        diffusion: schedule of the text encoder and the UNet.
        batch: rows a step of the autoencoder, the decoder and the diffusion model.
        compile_model: compile the diffusion model for training.
    """

    picture_chunks: int = 160
    latent_chunks: int = 320
    pair_chunks: int = 160
    chunk: int = CHUNK
    autoencoder: Schedule = field(default=ae.SCHEDULE)
    decoder: Schedule = field(default=ae.DECODER_SCHEDULE)
    encoder: Schedule = field(default=enc.SCHEDULE)
    diffusion: Schedule = field(default=dm.SCHEDULE)
    batch: tuple[int, int, int] = (ae.BATCH, ae.BATCH, dm.BATCH)
    compile_model: bool = True


class OtherSeedError(ValueError):
    """The folder holds pictures and checkpoints of another seed."""


def _claim(work_dir: Path, seed: int) -> None:
    """Note the folder's seed, or raise where it is another one."""
    work_dir.mkdir(parents=True, exist_ok=True)
    file = work_dir / "seed.txt"
    if file.exists():
        found = file.read_text().strip()
        if found != str(seed):
            raise OtherSeedError(f"holds a run of seed {found}, not of {seed}")
    else:
        write_beside(file, f"{seed}\n".encode())


def pretrain(
    work_dir: Path,
    assets: Path | None = None,
    stages: Sequence[str] = STAGES,
    seed: int = 7,
    plan: Plan | None = None,
    minutes: float | None = None,
    diffusion_steps: int | None = None,
    resume: bool = True,
) -> Path:
    """Train the embedded model and write its assets.

    Every stage writes checkpoints to ``work_dir`` and starts from those it finds there, so a
    run that was killed continues when it is called again. Batches depend on the seed and the
    step alone: on the same machine an interrupted run ends with the same bits.

    Args:
        work_dir: caches and checkpoints.
        assets: folder of the result, replaced whole; None takes ``work_dir / "assets"``.
        stages: which of `STAGES` to run, in their order.
        seed: decides every draw.
        plan: sizes; None takes those of the shipped model.
        minutes: stop each training stage, with a checkpoint, once this time has passed; None
            trains to the schedules' ends.
        diffusion_steps: length of the diffusion stage in place of the plan's.
        resume: False starts the training stages anew and overwrites their checkpoints.

    Returns:
        The folder of the assets.

    Raises:
        ValueError: a stage is unknown, or a cache is of another size.
        OtherSeedError: ``work_dir`` was begun with another seed.
        FileNotFoundError: a stage needs the checkpoint of an earlier one that was not run.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stages holds {unknown}; known are {list(STAGES)}")
    plan = plan or Plan()
    if diffusion_steps is not None:
        plan = replace(plan, diffusion=replace(plan.diffusion, steps=diffusion_steps))
    assets = assets or work_dir / "assets"
    stop_at = None if minutes is None else time.time() + 60.0 * minutes
    _claim(work_dir, seed)
    save_tokenizer(work_dir / "tokenizer")
    if "autoencoder" in stages:
        images = pictures(work_dir, seed, plan.picture_chunks, plan.chunk)
        ae.train_autoencoder(
            work_dir, images, seed, plan.autoencoder, plan.batch[0], resume, stop_at
        )
    if "encoder" in stages:
        enc.train_encoder(
            work_dir, seed, plan.encoder, plan.pair_chunks, resume=resume, stop_at=stop_at
        ).save(work_dir / "encoder")
    if "diffusion" in stages:
        dm.train_diffusion(
            work_dir,
            _latents(work_dir, seed, plan),
            CLIPTokenizer.from_pretrained(work_dir / "tokenizer"),
            seed,
            plan.diffusion,
            plan.batch[2],
            resume,
            stop_at,
            compile_model=plan.compile_model,
        )
    if "decoder" in stages:
        images = pictures(work_dir, seed, plan.picture_chunks, plan.chunk)
        ae.train_decoder(work_dir, images, seed, plan.decoder, plan.batch[1], resume, stop_at)
    if "export" in stages:
        export(work_dir, assets, seed)
    return assets


def _latents(work_dir: Path, seed: int, plan: Plan) -> dm.Latents:
    images = pictures(work_dir, seed, plan.picture_chunks, plan.chunk)
    model = ae.read_autoencoder(work_dir, seed)
    return dm.encode_latents(work_dir, model, images, seed, plan.latent_chunks, plan.chunk)


def export(work_dir: Path, assets: Path, seed: int) -> None:
    """Write the averaged weights of the latest checkpoints to ``assets``, whole or not at all.

    Args:
        work_dir: a folder that `pretrain` worked in.
        assets: the result, replaced if it exists.
        seed: the seed of that run.
    """
    part = assets.with_name(assets.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    dm.save_pipeline(
        part,
        dm.read_model(work_dir, tokenizer, seed),
        ae.read_autoencoder(work_dir, seed),
        work_dir / "tokenizer",
        dm.latent_scale(work_dir),
    )
    shutil.copytree(work_dir / "encoder", part / "encoder")
    for file in part.rglob("*.safetensors"):
        # safetensors writes files that only their owner can read; a package is for everybody.
        file.chmod(0o644)
    if assets.exists():
        old = assets.with_name(assets.name + ".old")
        os.replace(assets, old)
        os.replace(part, assets)
        shutil.rmtree(old)
    else:
        os.replace(part, assets)
