# SPDX-License-Identifier: Apache-2.0
"""What the metrics need from an image encoder."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from stamina_adapters.embedded import world
from stamina_adapters.embedded.encoder import Encoder


class Embedder(Protocol):
    """Turns pictures into vectors in which the same subject lies close together."""

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size to fp32 [n, d] on the CPU, rows in the order of `images`."""
        ...


class EncoderEmbedder:
    """The embedded model's image encoder; pictures are scaled to the side it was trained on."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See `Embedder`; rows have unit length."""
        side = (world.SIZE, world.SIZE)
        scaled = [
            image if image.size == side else image.resize(side, Image.Resampling.LANCZOS)
            for image in images
        ]
        return self.encoder.embed(np.stack([np.asarray(image.convert("RGB")) for image in scaled]))
