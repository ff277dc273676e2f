# SPDX-License-Identifier: Apache-2.0
"""How dense the masks are, and how far those of different concepts cover the same weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stamina_adapters.concept import ConceptState

Bits = Mapping[str, Tensor]
"""Module path -> packed mask bits, int32 [O, ceil(I / 32)], padding zero."""

_BITS = ".bits"  # ends the names of packed masks in what the eager ablations return


def mask_bits(state: Any) -> dict[str, Tensor]:
    """The masks in what a method's `finish` returned; empty for a method without masks."""
    if isinstance(state, ConceptState):
        return {path: adapter.bits.cpu() for path, adapter in state.layers.items()}
    tensors = state if isinstance(state, Mapping) else {}
    return {
        name.removesuffix(_BITS): bits.cpu()
        for name, bits in tensors.items()
        if name.endswith(_BITS)
    }


def _ones(words: Tensor) -> int:
    # bytes through a table: torch has no population count
    table = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.int64)
    return int(table[words.contiguous().view(torch.uint8).long()].sum())


def shared(mask: Bits, earlier: Bits) -> float:
    """Share of `mask`'s weights that are in `earlier` too; 0 for an empty mask."""
    kept = sum(_ones(words) for words in mask.values())
    both = sum(_ones(words & earlier[path]) for path, words in mask.items() if path in earlier)
    return both / kept if kept else 0.0


def overlaps(mask: Bits, earlier: Sequence[Bits]) -> list[float]:
    """`shared` with each earlier concept; empty for a method without masks."""
    return [shared(mask, one) for one in earlier] if mask else []


def union(masks: Sequence[Bits]) -> dict[str, Tensor]:
    """The weights that are in any of the masks."""
    found: dict[str, Tensor] = {}
    for mask in masks:
        for path, words in mask.items():
            found[path] = found[path] | words if path in found else words
    return found


def weighted_density(densities: Mapping[str, float], pipe: Any) -> float | None:
    """Mean of densities by module path over all their weights; None without masks."""
    if not densities:
        return None
    sizes = {path: pipe.unet.get_submodule(path).weight.numel() for path in densities}
    return sum(densities[path] * sizes[path] for path in densities) / sum(sizes.values())
