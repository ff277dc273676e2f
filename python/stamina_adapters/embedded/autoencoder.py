# SPDX-License-Identifier: Apache-2.0
"""Training of the autoencoder: 64 x 64 pictures to 16 x 8 x 8 latents and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from stamina_adapters.embedded.data import to_unit
from stamina_adapters.embedded.training import FlatTrainer, Schedule, fit, generator_at

LATENT_CHANNELS = 16
LATENT_SIZE = 8
# Noise on the unit-variance latents during training, so that small errors of the diffusion model
# do not show.
LATENT_NOISE = 0.08
BATCH = 32
DECODER_SCHEDULE = Schedule(
    steps=3_400, rate=7e-4, warmup=100, decay=0.7, ema=0.999, weight_decay=0.0, save_every=250
)
SCHEDULE = Schedule(steps=5000, rate=1.5e-3, warmup=200, decay=0.4, ema=0.998, weight_decay=0.0)


def new_autoencoder(seed: int) -> AutoencoderTiny:
    """An untrained autoencoder; the full-resolution stages are single convolutions."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(64,) * 4,
        num_encoder_blocks=(0, 1, 2, 1),
        num_decoder_blocks=(2, 2, 2, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences, for pictures in [-1, 1].

    ``mean|e| + (mean|e_x| + mean|e_y|) / 4`` with ``e`` the error, ``e_x`` and ``e_y`` its
    differences between neighbours across and down.
    """
    error = decoded.float() - images.float()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.25 * (across + down)


def spread_loss(latents: Tensor) -> Tensor:
    """Distance of the latents from zero mean and unit deviation, averaged over channels."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return flat.mean(1).square().mean() + (flat.std(1) - 1.0).square().mean()


def train_autoencoder(
    folder: Path,
    images: np.ndarray,
    seed: int,
    schedule: Schedule = SCHEDULE,
    batch: int = BATCH,
    resume: bool = True,
    stop_at: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderTiny:
    """Train the autoencoder on pictures and return its averaged weights.

    Args:
        folder: holds the checkpoint ``autoencoder.safetensors``.
        images: ``uint8 [n, 3, 64, 64]``.
        seed: decides weights, batches and noise.
        schedule: length and rates.
        batch: pictures a step.
        resume: continue from the checkpoint.
        stop_at: leave with a checkpoint at this time.
        dtype: precision of the gradients.
    """
    model = new_autoencoder(seed)
    trainer = FlatTrainer(model, schedule, dtype)
    work: Any = trainer.work

    def loss_at(step: int) -> Tensor:
        generator = generator_at(seed, "autoencoder", step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        shown = to_unit(torch.from_numpy(images[rows.numpy()]), dtype)
        latents = work.encoder(shown)
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator).to(dtype)
        decoded = work.decoder(latents + noise)
        return picture_loss(decoded, shown) + 0.02 * spread_loss(latents)

    fit(trainer, loss_at, folder / "autoencoder.safetensors", "autoencoder", resume, stop_at)
    return trainer.export(model)


def train_decoder(
    folder: Path,
    images: np.ndarray,
    seed: int,
    schedule: Schedule = DECODER_SCHEDULE,
    batch: int = BATCH,
    resume: bool = True,
    stop_at: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderTiny:
    """Train the decoder further while the encoder, and so every latent, stays as it is.

    It starts from ``autoencoder.safetensors`` and writes ``decoder.safetensors``, both in
    ``folder``; the other arguments are those of `train_autoencoder`.
    """
    model = read_autoencoder(folder, seed, refined=False)
    encoder = copy.deepcopy(model.encoder).to(dtype).to(memory_format=torch.channels_last)
    trainer = FlatTrainer(model.decoder, schedule, dtype)

    def loss_at(step: int) -> Tensor:
        generator = generator_at(seed, "decoder", step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        shown = to_unit(torch.from_numpy(images[rows.numpy()]), dtype)
        with torch.no_grad():
            latents = encoder(shown)
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator).to(dtype)
        return picture_loss(trainer.work(latents + noise), shown)

    fit(trainer, loss_at, folder / "decoder.safetensors", "decoder", resume, stop_at)
    trainer.export(model.decoder)
    return model


def read_autoencoder(folder: Path, seed: int, refined: bool = True) -> AutoencoderTiny:
    """The averaged weights of the checkpoints in ``folder``.

    Args:
        folder: holds ``autoencoder.safetensors`` and, maybe, ``decoder.safetensors``.
        seed: the seed of that run.
        refined: take the decoder from its own stage where that has a checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint of the autoencoder.
    """
    model = new_autoencoder(seed)
    trainer = FlatTrainer(model, SCHEDULE, torch.float32)
    trainer.load(folder / "autoencoder.safetensors")
    trainer.export(model)
    path = folder / "decoder.safetensors"
    if refined and path.exists():
        decoder = FlatTrainer(model.decoder, DECODER_SCHEDULE, torch.float32)
        decoder.load(path)
        decoder.export(model.decoder)
    return model
