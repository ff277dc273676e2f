# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA: earlier directions stay fixed, their magnitudes are trained on.

    W_t = W_init + sum_{k<t} alpha_k  A_k B_k / ||A_k B_k||_F  +  s A_t B_t

with A_t, B_t and every alpha_k trained on concept t. Source: Wu et al., "SD-LoRA: Scalable
Decoupled Low-Rank Adaptation for Class Incremental Learning" (ICLR 2025, arXiv 2501.13198). Here
alpha_k = g_k ||A_k B_k||_F with g_k = 1 when concept t begins: it goes on from the magnitude that
it has, the norms cancel, and one rate suits every layer. When the concept ends, g_k goes into A_k.

The paper classifies, adapting queries and values; here, as everywhere, keys and values of
cross-attention. Left out: its two variants that save parameters (shrinking ranks; dropping a new
direction that earlier ones nearly span). It stores every concept's factors, so its memory and its
time for a step grow with the number of concepts.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stamina_adapters.training.rivals.base import LowRankSettings, RivalMethod
from stamina_adapters.training.rivals.delta import DeltaLinear, LowRankDelta, initial_B


class DecoupledDelta(LowRankDelta):
    """D = sum_k g_k A_k B_k + s A B; earlier factors stacked, [O, (t-1) r] and [(t-1) r, I]."""

    earlier_A: Tensor
    earlier_B: Tensor

    def __init__(
        self, rows: int, B: Tensor, scale: float, earlier_A: Tensor, earlier_B: Tensor
    ) -> None:
        super().__init__(rows, B, scale)
        self.rank = len(B)
        self.register_buffer("earlier_A", earlier_A, persistent=False)
        self.register_buffer("earlier_B", earlier_B, persistent=False)
        self.gain = nn.Parameter(torch.ones(len(earlier_B) // self.rank))

    def scaled_A(self) -> Tensor:
        """All left factors beside each other, gains and scale in them: [O, t r]."""
        gains = self.gain.repeat_interleave(self.rank)
        return torch.cat([self.earlier_A * gains, self.scale * self.A], dim=1)

    def all_B(self) -> Tensor:
        """All right factors below each other: [t r, I]."""
        return torch.cat([self.earlier_B, self.B])

    def forward(self) -> Tensor:
        return self.scaled_A() @ self.all_B()

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        thin = F.linear(F.linear(x, self.all_B().to(x.dtype)), self.scaled_A().to(x.dtype))
        return F.linear(x, weight, bias) + thin

    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B]


class SDLoRASettings(LowRankSettings):
    """The magnitudes have a rate of their own."""

    magnitude_learning_rate: float = Field(1e-3, gt=0, description="rate of the gains g_k")


class SDLoRA(RivalMethod):
    """Carries W_init and every concept's factors."""

    kind = "sd-lora"
    settings_type = SDLoRASettings
    carries = ("initial", "A", "B")

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> DecoupledDelta:
        rows, columns = weight.shape
        B = initial_B(self._settings.r, columns, generator)
        A = self._carried["A"].get(path, weight.new_zeros(rows, 0, dtype=torch.float32))
        earlier = self._carried["B"].get(path, weight.new_zeros(0, columns, dtype=torch.float32))
        return DecoupledDelta(rows, B, self._settings.scale, A, earlier)

    def _groups(self, token: nn.Module) -> list[dict]:
        groups = super()._groups(token)
        if self._learned:
            gains: list[Any] = [layer.delta.gain for layer in self._layers.values()]
            groups.append({"params": gains, "lr": self._settings.magnitude_learning_rate})
        return groups

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        delta: Any = layer.delta
        A, B = delta.scaled_A(), delta.all_B()
        self._carried["A"][path], self._carried["B"][path] = A, B
        return self._carried["initial"][path] + A @ B
