# SPDX-License-Identifier: Apache-2.0
"""Orthogonal adaptation: deltas that read the input in subspaces orthogonal to each other.

    W = W_init + sum_t s A_t B_t        B_t [r, I] fixed, B_t B_u^T = 0 for t != u, only A_t trained

Source: Po et al., "Orthogonal Adaptation for Modular Customization of Diffusion Models" (arXiv
2312.02432), which writes B_t transposed and gives two ways to choose it: columns of a shared random
orthogonal basis, and Gaussian columns. This is the first. The paper's concepts are learned by
people who do not know of each other; here each takes the next r rows of the basis, so that
B_t B_u^T = 0 up to rounding while t r <= I, and after that another basis begins, nearly orthogonal
to the first. As in the paper every concept is learned on W_init and the deltas are summed. Left
out: what the paper trains besides keys and values of cross-attention.
"""

import hashlib

import torch
from pydantic import Field
from torch import Tensor

from stamina_adapters.training.rivals.base import LowRankSettings
from stamina_adapters.training.rivals.delta import LowRankDelta
from stamina_adapters.training.rivals.lora import MergedLoRA


def basis(columns: int, seed: int, path: str, number: int) -> Tensor:
    """A random orthogonal matrix [I, I], fp32: the layer's `number`-th basis."""
    digest = hashlib.sha256(f"{seed}/{path}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    gaussian = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float()


class OrthogonalSettings(LowRankSettings):
    """A small rank leaves room for more concepts in one basis."""

    r: int = Field(4, ge=1, le=256)


class OrthogonalAdaptation(MergedLoRA):
    """Only A_t is trained; B_t is the next r rows of the layer's orthogonal basis."""

    kind = "orthogonal"
    settings_type = OrthogonalSettings

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> LowRankDelta:
        rows, columns = weight.shape
        rank = self._settings.r
        if rank > columns:
            raise ValueError(f"r must be at most {columns}, the inputs of {path!r}, got {rank}")
        number, place = divmod(self._learned, columns // rank)
        rows_of_basis = basis(columns, self._config.seed, path, number)
        B = rows_of_basis[place * rank : (place + 1) * rank].clone()
        return LowRankDelta(rows, B, self._settings.scale, freeze_B=True)
