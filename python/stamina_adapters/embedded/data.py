# SPDX-License-Identifier: Apache-2.0
"""Cached training material: chunks of pictures and of latents, each a function of the seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stamina_adapters.embedded.training import generator_at
from stamina_adapters.embedded.world import FAMILIES, SIZE, Sample, draw_training_sample

CHUNK = 256


def chunk(seed: int, index: int, size: int = CHUNK) -> Sample:
    """The training pictures of chunk ``index``, faces and landmarks in turn."""
    generator = generator_at(seed, "chunk", index)
    return draw_training_sample(FAMILIES[index % 2], size, generator)


def to_unit(pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pictures from ``uint8`` to [-1, 1], in the channels-last layout."""
    unit = pictures.to(dtype) / 127.5 - 1.0
    return unit.contiguous(memory_format=torch.channels_last)


def cached(
    path: Path,
    row: tuple[int, ...],
    dtype: type[np.generic],
    chunks: int,
    make: Callable[[int], np.ndarray],
    name: str,
    size: int = CHUNK,
) -> np.ndarray:
    """An array of ``chunks * size`` rows on disk, made chunk by chunk where it is not whole yet.

    A file beside it counts the chunks that are done, so an interrupted run continues.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    counter = path.with_suffix(".done")
    done = int(counter.read_text()) if counter.exists() else 0
    shape = (chunks * size, *row)
    if done:
        array = np.lib.format.open_memmap(path, mode="r+")
        if array.shape != shape:
            raise ValueError(f"{path} has the shape {array.shape}, the run wants {shape}")
    else:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    for index in tqdm(range(done, chunks), desc=name, unit="chunk", mininterval=5.0):
        array[index * size : (index + 1) * size] = make(index)
        array.flush()
        part = counter.with_suffix(".part")
        part.write_text(str(index + 1))
        os.replace(part, counter)
    return array


def pictures(folder: Path, seed: int, chunks: int, size: int = CHUNK) -> np.ndarray:
    """Training pictures, ``uint8 [chunks * size, 3, 64, 64]``, cached in ``folder``."""
    return cached(
        folder / "pictures.npy",
        (3, SIZE, SIZE),
        np.uint8,
        chunks,
        lambda index: chunk(seed, index, size).render().numpy(),
        "pictures",
        size,
    )


def labels(seed: int, chunks: Sequence[int], size: int = CHUNK) -> list[Sample]:
    """The numbers behind the pictures of the given chunks, without rendering them."""
    return [chunk(seed, index, size) for index in chunks]
