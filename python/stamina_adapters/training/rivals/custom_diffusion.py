# SPDX-License-Identifier: Apache-2.0
"""Custom Diffusion in sequence: all of the keys' and values' weights are trained.

    min_{W^K, W^V, v}  L_diff(x, W^K, W^V, v)        starting from W_{t-1}

Source: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion" (arXiv 2212.04488),
section 3.2. Left out: the class noun and the 200 regularisation images with it (no method here is
given other pictures), the vector that starts from a rare word (the token MLP makes it), and the
closed-form merge of models that were trained apart.
"""

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from stamina_adapters.training.rivals.base import RivalMethod, RivalSettings
from stamina_adapters.training.rivals.delta import DenseDelta


class CustomDiffusionSettings(RivalSettings):
    """A full weight is trained at a lower rate than factors."""

    learning_rate: float = Field(3e-4, gt=0, description="rate of the weights")


class CustomDiffusion(RivalMethod):
    """Sequential training of full W^K and W^V."""

    kind = "custom-diffusion"
    settings_type: ClassVar[type[BaseModel]] = CustomDiffusionSettings

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> DenseDelta:
        return DenseDelta(*weight.shape)
