# SPDX-License-Identifier: Apache-2.0
"""What the metrics need from an image encoder."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from stamina_adapters.embedded import world
from stamina_adapters.embedded.encoder import Encoder


class Embedder(Protocol):
    """Turns pictures into vectors in which the same subject lies close together."""

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size to fp32 [n, d] on the CPU, rows in the order of `images`."""
        ...


class EncoderEmbedder:
    """The embedded model's image encoder.

    A picture's shorter side is scaled to the side that the encoder was trained on (Lanczos) and the
    centre is cut out, as it is for training.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See `Embedder`; rows have unit length."""
        side = (world.SIZE, world.SIZE)
        square = [ImageOps.fit(image, side, Image.Resampling.LANCZOS) for image in images]
        return self.encoder.embed(np.stack([np.asarray(image.convert("RGB")) for image in square]))
