# SPDX-License-Identifier: Apache-2.0
"""Joint training of the text encoder and the UNet on cached latents, with v-prediction."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stamina_adapters.embedded.autoencoder import LATENT_CHANNELS, LATENT_SIZE
from stamina_adapters.embedded.captions import MAX_LENGTH, WordTable, draw_caption
from stamina_adapters.embedded.data import CHUNK, cached, chunk, labels, to_unit
from stamina_adapters.embedded.training import FlatTrainer, Schedule, fit, generator_at

BATCH = 64
SCHEDULE = Schedule(
    steps=12_500, rate=1e-3, warmup=500, decay=0.35, ema=0.9995, weight_decay=0.01, save_every=500
)


def new_scheduler() -> DDIMScheduler:
    """The noise schedule: SD's, ended at zero signal, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of 128 hidden units."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet for 8 x 8 latents with cross-attention at both resolutions."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        time_embedding_dim=128,
    )


class TextToLatents(nn.Module):
    """The text encoder and the UNet as one module: ``v = unet(noisy, t, text(tokens))``.

    Args:
        text: the text encoder.
        unet: the UNet.
    """

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text = text
        self.unet = unet

    def forward(self, tokens: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The predicted velocity, shaped as ``noisy``."""
        states = self.text(tokens)[0]
        return self.unet(noisy, times, states).sample


def new_model(tokenizer: CLIPTokenizer, seed: int) -> TextToLatents:
    """The untrained text encoder and UNet."""
    torch.manual_seed(seed)
    model = TextToLatents(new_text_encoder(tokenizer), new_unet())
    # On CPUs plain matrix products are faster than the fused kernel at 64 positions.
    model.unet.set_attn_processor(AttnProcessor())
    return model


@dataclass(frozen=True)
class Latents:
    """Cached latents and what their pictures show.

    Attributes:
        values: unit-variance latents, ``float16 [n, 16, 8, 8]``.
        scale: the factor that gave them unit variance.
        families: family of each row.
        told: discrete and nuisance attributes of each row.
    """

    values: np.ndarray
    scale: float
    families: list[str]
    told: list[tuple[list[int], list[int]]]


@torch.no_grad()
def encode_latents(
    folder: Path,
    autoencoder: AutoencoderTiny,
    pictures: np.ndarray,
    seed: int,
    chunks: int,
    size: int = CHUNK,
) -> Latents:
    """Encode training pictures, rendering those that ``pictures`` lacks, into ``latents.npy``."""
    encoder = copy.deepcopy(autoencoder.encoder).to(torch.bfloat16)

    def encode(images: Tensor) -> Tensor:
        return encoder(to_unit(images, torch.bfloat16)).float()

    first = encode(torch.from_numpy(pictures[: 2 * size]))
    scale = round(1.0 / float(first.std()), 4)
    (folder / "latents.json").write_text(json.dumps({"scale": scale}))

    def make(index: int) -> np.ndarray:
        start = index * size
        if start < len(pictures):
            images = torch.from_numpy(pictures[start : start + size])
        else:
            images = chunk(seed, index, size).render()
        return (encode(images) * scale).half().numpy()

    row = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    values = cached(folder / "latents.npy", row, np.float16, chunks, make, "latents", size)
    families: list[str] = []
    told: list[tuple[list[int], list[int]]] = []
    for sample in labels(seed, range(chunks), size):
        families += [sample.family] * size
        told += list(zip(sample.discrete.tolist(), sample.varied.tolist(), strict=True))
    return Latents(values, scale, families, told)


def velocity_batch(
    clean: Tensor, signal: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, times and velocities for clean ones.

    ``noisy = sqrt(a) x + sqrt(1 - a) e`` and ``v = sqrt(a) e - sqrt(1 - a) x``, where ``a`` is
    ``signal`` (the scheduler's ``alphas_cumprod``) at times spread evenly over the batch.
    """
    n = len(clean)
    even = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    times = (even * len(signal)).long().clamp(max=len(signal) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    a = signal[times][:, None, None, None]
    noisy = a.sqrt() * clean + (1.0 - a).sqrt() * noise
    return noisy, times, a.sqrt() * noise - (1.0 - a).sqrt() * clean


def train_diffusion(
    folder: Path,
    latents: Latents,
    tokenizer: CLIPTokenizer,
    seed: int,
    schedule: Schedule = SCHEDULE,
    batch: int = BATCH,
    resume: bool = True,
    stop_at: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compile_model: bool = True,
) -> TextToLatents:
    """Train the text encoder and the UNet together and return their averaged weights.

    Args:
        folder: holds the checkpoint ``diffusion.safetensors``.
        latents: what to learn.
        tokenizer: the caption tokenizer.
        seed: decides weights, batches, captions and noise.
        schedule: length and rates.
        batch: latents a step.
        resume: continue from the checkpoint.
        stop_at: leave with a checkpoint at this time.
        dtype: precision of the gradients.
        compile_model: run the copy that computes through `torch.compile`.
    """
    model = new_model(tokenizer, seed)
    trainer = FlatTrainer(model, schedule, dtype, fused=compile_model)
    forward = torch.compile(trainer.work) if compile_model else trainer.work
    signal = new_scheduler().alphas_cumprod
    table = WordTable(tokenizer)

    def loss_at(step: int) -> Tensor:
        generator = generator_at(seed, "diffusion", step)
        rows = torch.randint(len(latents.values), (batch,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = []
        for row in rows.tolist():
            discrete, varied = latents.told[row]
            captions.append(draw_caption(latents.families[row], discrete, varied, rng))
        clean = torch.from_numpy(latents.values[rows.numpy()]).float()
        noisy, times, target = velocity_batch(clean, signal, generator)
        noisy = noisy.to(dtype).contiguous(memory_format=torch.channels_last)
        predicted = forward(table.rows(captions), noisy, times)
        return (predicted.float() - target).square().mean()

    fit(trainer, loss_at, folder / "diffusion.safetensors", "diffusion", resume, stop_at)
    trainer.export(model)
    return model


def latent_scale(folder: Path) -> float:
    """The factor that `encode_latents` found to give the latents of ``folder`` unit variance."""
    return float(json.loads((folder / "latents.json").read_text())["scale"])


def read_model(folder: Path, tokenizer: CLIPTokenizer, seed: int) -> TextToLatents:
    """The averaged weights of the checkpoint ``diffusion.safetensors`` in ``folder``."""
    model = new_model(tokenizer, seed)
    trainer = FlatTrainer(model, SCHEDULE, torch.float32)
    trainer.load(folder / "diffusion.safetensors")
    trainer.export(model)
    return model


def save_pipeline(
    folder: Path,
    model: TextToLatents,
    autoencoder: AutoencoderTiny,
    tokenizer_folder: Path,
    scale: float,
) -> None:
    """Write a stock `StableDiffusionPipeline` in fp16 safetensors; ``folder`` must not hold one.

    Args:
        folder: where to write.
        model: trained text encoder and UNet; left in fp16.
        autoencoder: trained autoencoder; left in fp16.
        tokenizer_folder: as written by `save_tokenizer`.
        scale: factor that gives the latents unit variance.
    """
    from diffusers import StableDiffusionPipeline

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    autoencoder.register_to_config(scaling_factor=scale)
    model.unet.set_default_attn_processor()
    StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=model.text.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_folder / name, folder / "tokenizer" / name)
    # transformers would load the text encoder in the stored fp16, diffusers the rest in fp32.
    _edit(folder / "text_encoder" / "config.json", dtype="float32")
    # The model derives this itself and warns where a file says it.
    _edit(folder / "vae" / "config.json", block_out_channels=None)


def _edit(path: Path, **changes: str | None) -> None:
    """Set keys of a JSON file; None removes the key."""
    settings = {**json.loads(path.read_text()), **changes}
    kept = {
        key: value for key, value in settings.items() if value is not None or key not in changes
    }
    path.write_text(json.dumps(kept, indent=2) + "\n")
