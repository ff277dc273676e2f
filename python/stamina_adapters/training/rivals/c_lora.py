# SPDX-License-Identifier: Apache-2.0
"""C-LoRA: low-rank deltas kept off the weights that earlier concepts changed.

    W_t = W_init + sum_{t'<t} A_t' B_t' + A_t B_t
    L   = L_diff + lambda sum_layers || |sum_{t'<t} A_t' B_t'| (.) A_t B_t ||_F^2

Source: Smith et al., "Continual Diffusion" (arXiv 2304.06027), eqs. 1 to 3. The sum in the bars is
the carried change S, and the bars make no difference under the square. The word's vector is
trained itself, from a random start. Ranks, rates and lambda are this library's own, and lambda
multiplies the plain sum of squares. Left out: regularisation pictures.
"""

import torch
from pydantic import Field
from torch import Tensor

from stamina_adapters.config import TokenConfig
from stamina_adapters.training.rivals.base import LowRankSettings
from stamina_adapters.training.rivals.delta import DeltaLinear
from stamina_adapters.training.rivals.lora import LoRA


class CLoRASettings(LowRankSettings):
    """lambda, and a vector in the place of the token MLP, which needs a higher rate."""

    token: TokenConfig = TokenConfig(generator="direct")
    token_learning_rate: float = Field(2e-2, gt=0, description="rate of the token's vector")
    forget_weight: float = Field(10.0, ge=0, description="lambda of the forgetting term")


class CLoRA(LoRA):
    """LoRA with the self-regularisation of eq. 3."""

    kind = "c-lora"
    settings_type = CLoRASettings
    carries = ("change",)

    def penalty(self) -> Tensor | None:
        if not self._learned:
            return None
        terms = [
            (self._carried["change"][path] * layer.delta()).square().sum()
            for path, layer in self._layers.items()
        ]
        return self._settings.forget_weight * torch.stack(terms).sum()

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        self._add_to_change(path, layer.delta())
        return super()._fold(path, layer)
