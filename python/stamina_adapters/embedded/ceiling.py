# SPDX-License-Identifier: Apache-2.0
"""The ceiling of customisation: every cross-attention K and V trained in full on one concept."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from stamina_adapters.embedded.data import to_unit
from stamina_adapters.embedded.diffusion import velocity_batch


def load_pipeline(folder: Any) -> StableDiffusionPipeline:
    """Load a pipeline in fp32, quiet, with the attention that is fastest on CPUs."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(AttnProcessor())
    return pipe


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 32,
) -> np.ndarray:
    """One picture a prompt, floating point in [0, 1], ``[n, 64, 64, 3]``."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        pipe(
            prompts[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).images
        for start in range(0, len(prompts), batch)
    ]
    return np.concatenate(parts)


def train_ceiling(
    pipe: StableDiffusionPipeline,
    images: np.ndarray,
    token: str = "<v>",
    prompt: str = "a photo of {token}",
    like: str = "face",
    steps: int = 250,
    batch: int = 16,
    rate: float = 1e-3,
    token_rate: float = 5e-3,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Learn one concept with all cross-attention K and V weights and a new token embedding.

    The loss is the v-prediction error on cached latents, under AdamW with rates that fall
    linearly to 0. The given pipeline is left as it was.

    Args:
        pipe: a pipeline in fp32, on any device.
        images: the concept, ``uint8 [n, 64, 64, 3]``.
        token: the new word; must not be in the vocabulary.
        prompt: the caption of every picture; ``{token}`` is replaced.
        like: the word whose embedding the new one starts from.
        steps: optimisation steps.
        batch: latents a step.
        rate: learning rate of the K and V weights.
        token_rate: learning rate of the embedding.
        seed: decides batches and noise.

    Returns:
        A new pipeline that knows ``token``; autoencoder and scheduler are shared.

    Raises:
        ValueError: ``token`` is in the vocabulary already.
    """
    tokenizer = copy.deepcopy(pipe.tokenizer)
    if len(tokenizer(token, add_special_tokens=False).input_ids) == 1:
        raise ValueError(f"token {token!r} is in the vocabulary already")
    tokenizer.add_tokens(token)
    text, unet = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.unet)
    device = unet.device
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text.requires_grad_(False)
    unet.requires_grad_(False)
    table = text.get_input_embeddings().weight
    row = tokenizer.convert_tokens_to_ids(token)
    with torch.no_grad():
        table[row] = table[tokenizer(like).input_ids[1]]
    table.requires_grad_(True)
    weights = [
        p.requires_grad_(True)
        for name, p in unet.named_parameters()
        if "attn2.to_k." in name or "attn2.to_v." in name
    ]
    with torch.no_grad():
        scale = pipe.vae.config.scaling_factor
        pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
        latents = (pipe.vae.encode(to_unit(pictures).to(device)).latents * scale).cpu()
    ids = tokenizer(prompt.format(token=token), padding="max_length").input_ids
    tokens = torch.tensor([ids], device=device)
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rate}, {"params": [table], "lr": token_rate}],
        weight_decay=0.0,
    )
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    signal = pipe.scheduler.alphas_cumprod.cpu()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        # drawn on the CPU, so that every device learns from the same numbers
        drawn = velocity_batch(latents[rows], signal, generator)
        noisy, times, target = (part.to(device) for part in drawn)
        states = text(tokens)[0].expand(batch, -1, -1)
        loss = (unet(noisy, times, states).sample - target).square().mean()
        loss.backward()
        _keep_row(table, row)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    table.requires_grad_(False)
    taught = StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval().requires_grad_(False),
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    taught.set_progress_bar_config(disable=True)
    return taught


def _keep_row(table: Tensor, row: int) -> None:
    """Zero the gradient of every embedding but one."""
    assert table.grad is not None
    kept = table.grad[row].clone()
    table.grad.zero_()
    table.grad[row] = kept
