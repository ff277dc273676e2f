# SPDX-License-Identifier: Apache-2.0
"""Pictures from a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


def _channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # convolutions keep the order: on CPUs a decoder takes three fifths of the time in this one
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)


def generate_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One picture for each prompt, its noise drawn from the seed beside it.

    `on_batch` is called with the number of pictures after each batch. The pipeline's own progress
    bar is switched off for the time of the call.

    Raises `ValueError` when prompts and seeds differ in number.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds must pair up, not {len(prompts)} and {len(seeds)}")
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    images: list[Image.Image] = []
    reorder = pipe.vae.decoder.register_forward_pre_hook(_channels_last)
    try:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            noise = [
                torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]
            ]
            images += pipe(
                batch,
                generator=noise,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        reorder.remove()
        pipe.set_progress_bar_config(**shown)
    return images
