# SPDX-License-Identifier: Apache-2.0
"""Modules of custom tokens: what makes a word's vector, and the table that puts it in."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stamina_adapters.linear import change_class, keep_dtype
from stamina_adapters.masks import FP32


class TokenMLP(nn.Module):
    """A vector of size `dim`: an MLP 1 -> hidden -> dim with SiLU on the constant 1, in fp32."""

    def __init__(self, dim: int, norm: float, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(hidden, generator=generator, **FP32))
        self.bias1 = nn.Parameter(torch.zeros(hidden, **FP32))
        self.weight2 = nn.Parameter(torch.randn(dim, hidden, generator=generator, **FP32))
        self.bias2 = nn.Parameter(torch.zeros(dim, **FP32))
        with torch.no_grad():
            self.weight2.mul_(norm / self().norm())

    def forward(self) -> Tensor:
        with torch.autocast(self.bias2.device.type, enabled=False):
            return F.linear(F.silu(self.weight1 + self.bias1), self.weight2, self.bias2)


class TokenVector(nn.Module):
    """A vector of size `dim` that is itself the parameter, in fp32."""

    def __init__(self, dim: int, norm: float, generator: torch.Generator) -> None:
        super().__init__()
        vector = torch.randn(dim, generator=generator, **FP32)
        self.vector = nn.Parameter(vector * (norm / vector.norm()))

    def forward(self) -> Tensor:
        return self.vector


class TokenEmbedding(nn.Embedding):
    """An embedding table, some of whose rows are replaced by the outputs of modules.

    `attach` turns an existing `nn.Embedding` into one in place, `detach` turns it back.
    """

    live: nn.ModuleList
    live_ids: list[int]

    @classmethod
    def attach(cls, embedding: nn.Embedding) -> "TokenEmbedding":
        """`embedding` with no row replaced yet."""
        change_class(embedding, cls)
        table = cast(TokenEmbedding, embedding)
        table.live, table.live_ids = nn.ModuleList(), []
        return table

    def detach(self) -> nn.Embedding:
        """A plain `nn.Embedding` again."""
        del self.live, self.live_ids
        change_class(self, nn.Embedding)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """input [...] of row numbers -> [..., dim] in the table's dtype."""
        rows = super().forward(input)
        for number, module in zip(self.live_ids, self.live, strict=True):
            rows = torch.where((input == number)[..., None], module().to(rows.dtype), rows)
        return rows

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keep_dtype(fn, lambda t: t is self.weight), recurse)
