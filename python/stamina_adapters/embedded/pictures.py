# SPDX-License-Identifier: Apache-2.0
"""Real pictures of held-out identities, and the seeds that keep them apart."""

from __future__ import annotations

from PIL import Image

from stamina_adapters.embedded.world import Identity, render

TRAINING_PICTURES_SEED = 1
"""Seed of the nuisance in the pictures that concepts are learned from; metrics use others."""
REAL_PICTURES_SEED = 1_000
"""Seed of the nuisance in the real pictures that generated ones are compared with."""


def pictures(identity: Identity, count: int, seed: int) -> list[Image.Image]:
    """`count` real pictures of an identity."""
    return [Image.fromarray(picture) for picture in render(identity, count, seed)]
