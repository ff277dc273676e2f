# SPDX-License-Identifier: Apache-2.0
"""LoRA on keys and values, one for each concept: folded in turn, or merged afterwards.

    W_t = W_{t-1} + s A_t B_t

Source: Hu et al., "LoRA" (arXiv 2106.09685), eq. 3. In `LoRA` concept t is learned on W_{t-1}, so
later deltas overwrite earlier ones. In `MergedLoRA` each is learned on W_init as if it were alone,
and the model is W_init + sum_t s A_t B_t: the plainest way of merging.
"""

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from stamina_adapters.training.rivals.base import LowRankSettings, RivalMethod
from stamina_adapters.training.rivals.delta import DeltaLinear, LowRankDelta, initial_B


class LoRA(RivalMethod):
    """Sequential LoRA."""

    kind = "lora"
    settings_type: ClassVar[type[BaseModel]] = LowRankSettings

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> LowRankDelta:
        rows, columns = weight.shape
        B = initial_B(self._settings.r, columns, generator)
        return LowRankDelta(rows, B, self._settings.scale)


class MergedLoRA(LoRA):
    """Every LoRA learned on W_init; their sum is in the model after each concept."""

    kind = "lora-merge"
    carries = ("initial", "change")

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        return self._carried["initial"][path] + self._add_to_change(path, layer.delta())
