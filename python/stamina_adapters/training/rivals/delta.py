# SPDX-License-Identifier: Apache-2.0
"""W + D: the one way in which every rival changes a weight while it learns a concept.

Plain PyTorch: rivals are compared by what they learn and forget. Their times say nothing of how
fast their own authors' code is.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stamina_adapters.linear import change_class


class Delta(nn.Module):
    """What a method adds to one weight; `forward()` returns D [O, I] in fp32."""

    def forward(self) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + D)^T + bias."""
        return F.linear(x, (weight + self()).to(x.dtype), bias)

    def factors(self) -> list[nn.Parameter]:
        """What AdamW trains at the method's main rate."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def learned(self) -> dict[str, Tensor]:
        """What a concept's file keeps of this layer."""
        return dict(self.named_parameters())


class DenseDelta(Delta):
    """D is a parameter, zero at the start: W itself is trained, in fp32 whatever its dtype."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(rows, columns))

    def forward(self) -> Tensor:
        return self.D


def initial_B(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """B [r, I] at the start: uniform within 1 / sqrt(I), as `StaminaLinear` draws it."""
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


class LowRankDelta(Delta):
    """D = s A B with A [O, r] zero at the start; B [r, I] is trained too unless `freeze_B`."""

    def __init__(self, rows: int, B: Tensor, scale: float = 1.0, freeze_B: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rows, len(B)))
        self.B = nn.Parameter(B, requires_grad=not freeze_B)
        self.scale = scale

    @property
    def right_factor(self) -> Tensor:
        """B [r, I] as it enters the product A B."""
        return self.B

    def forward(self) -> Tensor:
        return self.scale * (self.A @ self.right_factor)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        thin = F.linear(F.linear(x, self.right_factor.to(x.dtype)), self.A.to(x.dtype))
        return F.linear(x, weight, bias) + self.scale * thin


class DeltaLinear(nn.Linear):
    """A linear layer that computes with W + D; the object and its Parameters stay what they were.

    `attach` turns an existing `nn.Linear` into one in place, `detach` turns it back.
    """

    delta: Delta

    @classmethod
    def attach(cls, linear: nn.Module, delta: Delta) -> "DeltaLinear":
        """Give `linear` a delta. Raises TypeError where it is not exactly an `nn.Linear`."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"only a plain nn.Linear can be adapted, not {type(linear).__name__}")
        change_class(linear, cls)
        layer = cast(DeltaLinear, linear)
        layer.delta = delta.to(linear.weight.device)
        return layer

    def detach(self) -> Delta:
        """Become a plain `nn.Linear` again and return the delta."""
        delta = self.delta
        del self.delta
        change_class(self, nn.Linear)
        return delta

    def change(self, x: Tensor) -> Tensor:
        """x D^T."""
        return F.linear(x, self.delta().to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return self.delta.project(x, self.weight, self.bias)
