# SPDX-License-Identifier: Apache-2.0
"""Pictures small enough to stand in a row of a result."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

SIDE = 96
_QUALITY = 82


def encode(images: Sequence[Image.Image]) -> list[str]:
    """Each picture as WebP in base64, at most `SIDE` pixels on its longer side."""
    encoded = []
    for image in images:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=_QUALITY, method=6)
        encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return encoded


def decode(data: str) -> Image.Image:
    """A picture from its text."""
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=("WEBP",)) as image:
        image.load()
        return image.convert("RGB")
