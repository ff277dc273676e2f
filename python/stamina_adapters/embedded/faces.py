# SPDX-License-Identifier: Apache-2.0
"""Faces: what an identity is, what varies between its pictures, and how both are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from stamina_adapters.embedded.sdf import (
    Canvas,
    box,
    ellipse,
    grid,
    hsv_to_rgb,
    intersect,
    palette,
    place,
    rgb,
    trapezoid,
    union,
)

HAIR = ("black", "brown", "yellow", "red", "white", "blue", "green", "pink")
CLOTH = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SKIN = ("pale", "tan", "dark")
_SKIN_HSV = ((0.07, 0.26, 0.98), (0.075, 0.5, 0.85), (0.065, 0.62, 0.48))

# Discrete identity attributes, in the order of the columns, with the words that captions use.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair_style": ("short", "long", "curly", "spiky", "bald"),
    "hair": HAIR,
    "skin": SKIN,
    "hat": ("none", "cap", "crown", "beanie"),
    "hat_colour": CLOTH,
    "glasses": ("none", "glasses", "sunglasses"),
    "beard": ("none", "beard", "moustache"),
    "shirt": CLOTH,
}
# How often each value of an attribute is drawn, where not uniform.
WEIGHTS: dict[str, tuple[float, ...]] = {
    "hat": (0.52, 0.16, 0.16, 0.16),
    "glasses": (0.5, 0.25, 0.25),
    "beard": (0.5, 0.3, 0.2),
}
# Continuous identity parameters, each uniform in [-1, 1]; captions never tell them.
CONTINUOUS = (
    "width", "height", "jaw", "eye_gap", "eye_size", "brow", "nose", "mouth", "ears",
    "hair_size", "hair_hue", "hair_value", "skin_value", "shirt_hue", "shirt_value",
    "hat_hue", "hat_size", "collar_hue", "collar_value", "iris_hue",
)  # fmt: skip
# What varies between pictures of one identity: named attributes and continuous ones.
NUISANCE: dict[str, tuple[str, ...]] = {
    "expression": ("neutral", "smiling", "sad", "surprised"),
    "background": ("blue", "green", "pink", "yellow", "gray"),
}
NUISANCE_CONTINUOUS = (
    "x", "y", "scale", "angle", "light", "light_angle", "back_hue", "back_value",
)  # fmt: skip


def _columns(values: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    return dict(zip(names, values.unbind(-1), strict=True))


def render(
    discrete: Tensor, continuous: Tensor, varied: Tensor, varied_continuous: Tensor, size: int
) -> Tensor:
    """Draw faces.

    Args:
        discrete: identity attributes, ``int64 [n, len(ATTRIBUTES)]``.
        continuous: identity parameters in [-1, 1], ``[n, len(CONTINUOUS)]``.
        varied: nuisance attributes, ``int64 [n, len(NUISANCE)]``.
        varied_continuous: nuisance parameters in [-1, 1], ``[n, len(NUISANCE_CONTINUOUS)]``.
        size: height and width in pixels.

    Returns:
        ``uint8 [n, 3, size, size]``.
    """
    who = _columns(discrete, tuple(ATTRIBUTES))
    form = _columns(continuous, CONTINUOUS)
    now = _columns(varied, tuple(NUISANCE))
    move = _columns(varied_continuous, NUISANCE_CONTINUOUS)

    def level(name: str, middle: float, reach: float) -> Tensor:
        return (middle + reach * form[name])[:, None, None]

    back = palette(
        NUISANCE["background"], now["background"], 0.02 * move["back_hue"], 0.1 * move["back_value"]
    )
    back = 0.35 + 0.65 * back
    _, rows = grid(size)
    canvas = Canvas(
        back[:, :, None, None] * (0.9 - 0.14 * rows[:, None]).expand(len(back), 1, size, size),
        (2.0 / size) / (1.0 + 0.08 * move["scale"]),
    )
    x, y = place(
        size,
        torch.stack((0.08 * move["x"], 0.06 * move["y"]), -1),
        1.0 + 0.08 * move["scale"],
        0.12 * move["angle"],
    )
    side = x.abs()

    hair = palette(HAIR, who["hair"], 0.02 * form["hair_hue"], 0.15 * form["hair_value"])
    skin_hsv = torch.tensor(_SKIN_HSV)[who["skin"]]
    skin = hsv_to_rgb(
        torch.stack(
            (
                skin_hsv[:, 0],
                skin_hsv[:, 1],
                (skin_hsv[:, 2] * (1.0 + 0.1 * form["skin_value"])).clamp(max=1.0),
            ),
            -1,
        )
    )
    shirt = palette(CLOTH, who["shirt"], 0.025 * form["shirt_hue"], 0.15 * form["shirt_value"])
    hat = palette(CLOTH, who["hat_colour"], 0.025 * form["hat_hue"], torch.zeros(len(skin)))
    collar = hsv_to_rgb(
        torch.stack(
            (
                (0.5 + 0.5 * form["collar_hue"]) % 1.0,
                torch.full_like(form["collar_hue"], 0.6),
                0.7 + 0.3 * form["collar_value"],
            ),
            -1,
        )
    )
    iris = hsv_to_rgb(
        torch.stack(
            (
                (0.4 + 0.3 * form["iris_hue"]) % 1.0,
                torch.full_like(form["iris_hue"], 0.8),
                torch.full_like(form["iris_hue"], 0.6),
            ),
            -1,
        )
    )

    wide, tall = level("width", 0.44, 0.07), level("height", 0.56, 0.05)
    grown = level("hair_size", 1.0, 0.3)
    short, long, curly, spiky = (who["hair_style"] == k for k in range(4))

    # Shoulders and the hair that hangs behind the head.
    canvas.paint(shirt, ellipse(x, y - 1.15, 0.88, 0.58))
    canvas.paint(
        hair, union(box(x, y - 0.22, wide + 0.14 * grown, 0.5), ellipse(x, y + 0.22,
              wide + 0.14 * grown, 0.52)), long,
    )  # fmt: skip
    canvas.paint(hair, ellipse(x, y + 0.22, wide + 0.25 * grown, 0.42 + 0.2 * grown), curly)
    canvas.paint(skin * 0.85, box(x, y - 0.58, 0.17, 0.2))
    canvas.paint(collar, intersect(ellipse(x, y - 0.72, 0.36, 0.24), 0.72 - y))
    ears = level("ears", 0.1, 0.04)
    canvas.paint(skin * 0.92, ellipse(side - wide, y - 0.02, ears, ears * 1.2))

    # The head: an ellipse that narrows below the eyes.
    narrow = wide * (1.0 - level("jaw", 0.16, 0.16) * y.clamp(min=0.0) / tall)
    head = ellipse(x * (wide / narrow), y, wide, tall)
    canvas.paint(skin, head)
    canvas.paint(hair, intersect(head, 0.14 - y), who["beard"] == 1)

    # Hair on top.
    fringe = -0.26 + 0.08 * form["hair_size"][:, None, None]
    cap = ellipse(x, y + 0.04, wide + 0.05, tall + 0.04)
    canvas.paint(hair, intersect(cap, y - fringe), short | long | curly)
    teeth = 0.16 * ((x * 4.0) % 1.0 - 0.5).abs() * grown
    canvas.paint(
        hair, intersect(ellipse(x, y + 0.3, wide + 0.06, 0.42 + 0.22 * grown - 2.0 * teeth),
                        y + 0.3), spiky,
    )  # fmt: skip

    # The face.
    gap, eye = level("eye_gap", 0.19, 0.03), level("eye_size", 0.1, 0.02)
    eye_x, eye_y = side - gap, y + 0.04
    canvas.paint(rgb("white"), ellipse(eye_x, eye_y, eye, eye * 0.8))
    canvas.paint(iris, ellipse(eye_x, eye_y, eye * 0.6, eye * 0.6))
    canvas.paint(hair * 0.7, box(eye_x, y + 0.2, 0.1, level("brow", 0.028, 0.016)))
    nose = level("nose", 0.06, 0.025)
    canvas.paint(skin * 0.78, trapezoid(x, y - 0.16, nose, 0.3 * nose, 0.17))
    lips = level("mouth", 0.17, 0.05)
    bend = torch.tensor([0.0, -1.0, 1.0, 0.0])[now["expression"]][:, None, None]
    curve = y - 0.32 - bend * 0.9 * (x * x - 0.4 * lips * lips) / lips
    lip = torch.tensor([0.72, 0.16, 0.2])
    mouth = intersect(curve.abs() - 0.04, side - lips)
    open_mouth = ellipse(x, y - 0.34, 0.5 * lips, 0.11)
    surprised = now["expression"] == 3
    canvas.paint(
        hair, intersect(ellipse(x, y - 0.23, lips + 0.06, 0.07), y - 0.26), who["beard"] == 2
    )
    canvas.paint(lip, mouth, ~surprised)
    canvas.paint(lip * 0.6, open_mouth, surprised)

    # Glasses.
    lens = ellipse(eye_x, eye_y, 0.165, 0.145)
    bridge = box(x, y + 0.06, gap, 0.02)
    frame = union(lens.abs() - 0.026, bridge)
    canvas.paint(rgb("black"), frame, who["glasses"] == 1)
    canvas.paint(rgb("black"), union(lens, bridge), who["glasses"] == 2)

    # Hats.
    big = level("hat_size", 0.0, 0.06)
    crown_of_head = intersect(ellipse(x, y + 0.3, wide + 0.1, 0.46 + big), y + 0.32)
    brim = box(x - 0.25, y + 0.33, 0.45, 0.06)
    canvas.paint(hat, union(crown_of_head, brim), who["hat"] == 1)
    zigzag = 0.22 * (((x + 0.15) / 0.3) % 1.0 - 0.5).abs()
    canvas.paint(hat, intersect(side - 0.45, y + 0.4, -y - 0.76 - big - zigzag), who["hat"] == 2)
    canvas.paint(hat, crown_of_head, who["hat"] == 3)
    canvas.paint(
        1.0 - 0.6 * (1.0 - hat), union(box(x, y + 0.36, wide + 0.11, 0.08),
                                       ellipse(x, y + 0.8, 0.14, 0.13)), who["hat"] == 3,
    )  # fmt: skip

    turn = 3.14159 * move["light_angle"][:, None, None]
    frame_x, frame_y = grid(size)
    tilt = torch.cos(turn) * frame_x + torch.sin(turn) * frame_y
    canvas.shade((1.0 + 0.1 * move["light"][:, None, None] + 0.1 * tilt)[:, None])
    return canvas.bytes()
