# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation of full keys and values.

    L = L_diff + lambda / 2  sum_{k<t} sum_i F_{k,i} (theta_i - theta*_{k,i})^2
    F_{k,i} = mean over single noisy latents of concept k of (d L_diff / d theta_i)^2  at theta*_k

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (PNAS 2017,
arXiv 1612.00796), eq. 3, with one quadratic for each earlier concept. Their sum is a quadratic:
with theta = theta_{t-1} + D,

    sum_k F_k (.) (theta - theta*_k)^2 = F (.) D^2 - 2 h (.) D + c
    F = sum_k F_k    h = sum_k F_k (.) a_k    c = sum_k F_k (.) a_k^2

where a_k = theta*_k - theta_{t-1}. So F, h and the sum of c are all that is carried, whatever the
number of concepts. A concept that ends with D moves the origin by D: c -= sum (2 h - F (.) D) D,
then h -= F (.) D, then F += F_t, whose own h is zero.

The Fisher information is the empirical one, of the training loss. It is taken after training, from
forward and backward passes that come on top of the other methods' budget. Words have rows of
their own and are not penalised.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from stamina_adapters.training.rivals.custom_diffusion import (
    CustomDiffusion,
    CustomDiffusionSettings,
)
from stamina_adapters.training.rivals.delta import DeltaLinear


class EWCSettings(CustomDiffusionSettings):
    """Strength of the penalty and size of the sample it is estimated on."""

    fisher_weight: float = Field(1e6, ge=0, description="lambda of the penalty")
    fisher_samples: int = Field(64, ge=1, description="noisy latents that F_t is a mean over")


class EWC(CustomDiffusion):
    """Custom Diffusion with the quadratic penalties of earlier concepts."""

    kind = "ewc"
    settings_type = EWCSettings
    carries = ("fisher", "pull", "constant")

    def penalty(self) -> Tensor | None:
        if not self._learned:
            return None
        terms = []
        for path, layer in self._layers.items():
            fisher, pull, constant = (
                self._carried[name][path] for name in ("fisher", "pull", "constant")
            )
            D = layer.delta()
            terms.append(((fisher * D - 2 * pull) * D).sum() + constant)
        return self._settings.fisher_weight / 2 * torch.stack(terms).sum()

    def consolidate(self, loss: Callable[[], Tensor]) -> None:
        parameters = {path: layer.delta.factors()[0] for path, layer in self._layers.items()}
        self._fisher = {path: torch.zeros_like(p) for path, p in parameters.items()}
        count = self._settings.fisher_samples
        for _ in range(count):
            gradients = torch.autograd.grad(loss(), list(parameters.values()))
            for path, gradient in zip(parameters, gradients, strict=True):
                self._fisher[path].addcmul_(gradient, gradient, value=1 / count)

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        D = layer.delta()
        fisher = self._carried["fisher"].get(path, torch.zeros_like(D))
        pull = self._carried["pull"].get(path, torch.zeros_like(D))
        constant = self._carried["constant"].get(path, D.new_zeros(()))
        self._carried["constant"][path] = constant - ((2 * pull - fisher * D) * D).sum()
        self._carried["pull"][path] = pull - fisher * D
        self._carried["fisher"][path] = fisher + self._fisher[path]
        return super()._fold(path, layer)
