# SPDX-License-Identifier: Apache-2.0
"""Signed-distance drawing for batches of pictures.

A shape is a distance field ``d`` of shape ``[n, h, w]``, negative inside. A picture is
``[n, 3, h, w]`` in [0, 1]. Coordinates run from -1 to 1, x to the right and y down.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor

# Named colours as (hue, saturation, value); identities shift the hue and the value a little.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.85, 0.85),
    "orange": (0.075, 0.9, 0.98),
    "yellow": (0.15, 0.85, 0.98),
    "green": (0.36, 0.8, 0.65),
    "blue": (0.61, 0.85, 0.88),
    "purple": (0.77, 0.65, 0.7),
    "pink": (0.91, 0.45, 0.99),
    "white": (0.12, 0.03, 0.97),
    "black": (0.65, 0.2, 0.13),
    "brown": (0.06, 0.7, 0.45),
    "gray": (0.6, 0.05, 0.6),
}


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """Convert ``[n, 3]`` hue, saturation, value to red, green, blue (hue wraps at 1)."""
    hue, saturation, value = hsv.unbind(-1)
    shift = hsv.new_tensor([5.0, 3.0, 1.0])
    k = (shift + hue[:, None] * 6.0) % 6.0
    wedge = torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)
    return value[:, None] * (1.0 - saturation[:, None] * wedge)


def palette(names: Sequence[str], index: Tensor, hue: Tensor, value: Tensor) -> Tensor:
    """Colours ``[n, 3]`` of ``names[index]`` with the hue moved by ``hue`` and the value scaled.

    The scale is ``1 + value``; results are clamped to [0, 1].
    """
    hsv = torch.tensor([COLOURS[name] for name in names])[index]
    shifted = torch.stack(
        ((hsv[:, 0] + hue) % 1.0, hsv[:, 1], (hsv[:, 2] * (1.0 + value)).clamp(0.0, 1.0)), -1
    )
    return hsv_to_rgb(shifted)


def rgb(name: str) -> Tensor:
    """The colour ``name`` as a tensor of three numbers in [0, 1]."""
    return torch.tensor(colorsys.hsv_to_rgb(*COLOURS[name]))


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel centres ``x, y`` of a square picture, each ``[1, size, size]``."""
    line = (torch.arange(size) + 0.5) * (2.0 / size) - 1.0
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x[None], y[None]


def place(size: int, shift: Tensor, scale: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The grid in an object's own coordinates, for shifts ``[n, 2]``, scales and angles ``[n]``."""
    x, y = grid(size)
    x = x - shift[:, 0, None, None]
    y = y - shift[:, 1, None, None]
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    scale = scale[:, None, None]
    return (cos * x + sin * y) / scale, (cos * y - sin * x) / scale


def ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Approximate distance to the ellipse with half axes ``a`` and ``b`` around the origin."""
    k = torch.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-9)
    slope = torch.sqrt((x / (a * a)) ** 2 + (y / (b * b)) ** 2 + 1e-9)
    return k * (k - 1.0) / slope


def box(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Distance (Chebyshev outside) to the box with half sides ``a`` and ``b``."""
    return torch.maximum(x.abs() - a, y.abs() - b)


def trapezoid(
    x: Tensor,
    y: Tensor,
    bottom: Tensor | float,
    top: Tensor | float,
    height: Tensor | float,
) -> Tensor:
    """An upright trapezoid standing on y = 0, with half widths ``bottom`` and ``top``."""
    half = bottom + (top - bottom) * (-y / height)
    return torch.maximum(x.abs() - half, torch.maximum(y, -y - height))


def union(*shapes: Tensor) -> Tensor:
    """The union of shapes."""
    out = shapes[0]
    for shape in shapes[1:]:
        out = torch.minimum(out, shape)
    return out


def intersect(*shapes: Tensor) -> Tensor:
    """The intersection of shapes."""
    out = shapes[0]
    for shape in shapes[1:]:
        out = torch.maximum(out, shape)
    return out


class Canvas:
    """A batch of pictures that shapes are painted on, anti-aliased over one pixel.

    Args:
        picture: ``[n, 3, h, w]`` in [0, 1]; painting replaces it.
        pixel: width of one pixel in the units of the distance fields, a number or ``[n]``.
    """

    def __init__(self, picture: Tensor, pixel: Tensor) -> None:
        self.picture = picture
        self.pixel = pixel[:, None, None]

    def paint(self, colour: Tensor, distance: Tensor, where: Tensor | None = None) -> None:
        """Paint ``colour`` (``[3]`` or ``[n, 3]``) inside the shape, for the rows of ``where``."""
        alpha = (0.5 - distance / self.pixel).clamp(0.0, 1.0)
        if where is not None:
            alpha = alpha * where[:, None, None]
        colour = colour.expand(self.picture.shape[0], 3)[:, :, None, None]
        self.picture = torch.lerp(self.picture, colour, alpha[:, None])

    def shade(self, gain: Tensor) -> None:
        """Multiply by ``gain``, which broadcasts to ``[n, 3, h, w]``."""
        self.picture = self.picture * gain

    def bytes(self) -> Tensor:
        """The pictures as ``uint8``, shape ``[n, 3, h, w]``."""
        return (self.picture.clamp(0.0, 1.0) * 255.0 + 0.5).to(torch.uint8)
