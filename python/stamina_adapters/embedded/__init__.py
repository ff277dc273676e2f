# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a small latent diffusion model, its world, and its metric encoder.

``assets_dir()`` is a folder that ``StableDiffusionPipeline.from_pretrained`` loads;
``load_encoder()`` gives the encoder that the metrics need; ``heldout_identities()`` lists the
concepts that no training has seen, and ``render`` draws pictures of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stamina_adapters.embedded.world import (
    FAMILIES,
    SIZE,
    Identity,
    heldout_identities,
    render,
)

if TYPE_CHECKING:
    from stamina_adapters.embedded.encoder import Encoder

__all__ = [
    "FAMILIES",
    "SIZE",
    "Identity",
    "assets_dir",
    "heldout_identities",
    "load_encoder",
    "render",
]


def assets_dir() -> Path:
    """The folder of the shipped pipeline; the encoder is in its subfolder ``encoder``."""
    return Path(__file__).parent / "assets"


def load_encoder() -> Encoder:
    """The shipped metric encoder, in fp32 and evaluation mode."""
    from stamina_adapters.embedded.encoder import read_encoder

    return read_encoder(assets_dir() / "encoder")
