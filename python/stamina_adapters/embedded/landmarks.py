# SPDX-License-Identifier: Apache-2.0
"""Landmarks: what an identity is, what varies between its pictures, and how both are drawn."""

from __future__ import annotations

from collections.abc import Callable

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

WALL = ("red", "orange", "yellow", "blue", "purple", "white", "brown", "gray")
TOP = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
FLAG = ("red", "yellow", "green", "blue")

# Discrete identity attributes, in the order of the columns, with the words that captions use.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": (
        "castle", "tower", "lighthouse", "pyramid", "temple", "bridge", "windmill", "church",
    ),
    "wall": WALL,
    "top": TOP,
    "flag": ("none", *FLAG),
    "plant": ("none", "pine", "tree", "cactus"),
}  # fmt: skip
WEIGHTS: dict[str, tuple[float, ...]] = {
    "flag": (0.4, 0.15, 0.15, 0.15, 0.15),
    "plant": (0.4, 0.2, 0.2, 0.2),
}
# Continuous identity parameters, each uniform in [-1, 1]; captions never tell them.
CONTINUOUS = (
    "width", "height", "taper", "roof", "wall_hue", "wall_value", "top_hue", "top_value",
    "door_hue", "door_value", "windows", "flag_size", "plant_size", "plant_hue",
)  # fmt: skip
# What varies between pictures of one identity: named attributes and continuous ones.
NUISANCE: dict[str, tuple[str, ...]] = {
    "sky": ("day", "sunset", "night", "cloudy"),
    "ground": ("grass", "sand", "snow", "water"),
}
NUISANCE_CONTINUOUS = (
    "x", "y", "scale", "angle", "light", "sun_x", "sun_y", "cloud_x", "cloud_y", "horizon",
)  # fmt: skip

_SKY_TOP = ((0.30, 0.60, 0.98), (0.45, 0.25, 0.60), (0.04, 0.05, 0.20), (0.60, 0.64, 0.70))
_SKY_LOW = ((0.75, 0.90, 1.00), (1.00, 0.62, 0.30), (0.16, 0.18, 0.42), (0.82, 0.84, 0.87))
_GROUND = ((0.35, 0.66, 0.25), (0.90, 0.78, 0.48), (0.94, 0.96, 1.00), (0.16, 0.42, 0.75))
_SUN = ((1.0, 0.95, 0.45), (1.0, 0.45, 0.20), (0.95, 0.95, 0.85), (0.88, 0.89, 0.91))
_LIGHT = ((1.0, 1.0, 1.0), (1.0, 0.87, 0.78), (0.66, 0.68, 0.82), (0.93, 0.93, 0.95))

# A part of a building: its distance field, painted in a named role's colour.
Parts = list[tuple[str, Tensor]]
Form = dict[str, Tensor]


def _windows(x: Tensor, y: Tensor, form: Form, low: float, reach: float) -> Tensor:
    """One to three dark windows side by side, by the identity's parameter ``windows``."""
    count = (1.5 + 1.5 * form["windows"]).floor().clamp(0.0, 2.0)
    outer = box(x.abs() - reach, y + low, 0.055, 0.085)
    inner = box(x, y + low, 0.055, 0.085)
    far = torch.full_like(inner, 9.0)
    return union(torch.where(count >= 1, outer, far), torch.where(count != 1, inner, far))


def _castle(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.4 + 0.06 * form["width"], 0.66 + 0.1 * form["height"]
    side = x.abs() - w
    merlons = 0.5 - (((x / 0.2) % 1.0) > 0.5).float()
    roof = 0.36 + 0.1 * form["roof"]
    return [
        ("wall", trapezoid(x, y, w, w, h + 0.1 * merlons)),
        ("wall", trapezoid(side, y, 0.16, 0.16, h + 0.2)),
        ("top", trapezoid(side, y + h + 0.2, 0.21, 0.0, roof)),
        ("door", union(box(x, y - 0.0, 0.12, 0.22), ellipse(x, y + 0.22, 0.12, 0.12))),
        ("dark", _windows(x, y, form, 0.48, 0.24)),
    ]


def _tower(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.24 + 0.05 * form["width"], 0.98 + 0.1 * form["height"]
    foot = w * (1.2 + 0.2 * form["taper"])
    return [
        ("wall", trapezoid(x, y, foot, w, h)),
        ("top", trapezoid(x, y + h - 0.08, w, w + 0.14, 0.3 + 0.06 * form["roof"])),
        ("door", box(x, y, 0.1, 0.24)),
        ("dark", _windows(x, y, form, 0.6, 0.14)),
    ]


def _lighthouse(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.26 + 0.04 * form["width"], 0.96 + 0.1 * form["height"]
    neck = w * (0.65 + 0.15 * form["taper"])
    body = trapezoid(x, y, w, neck, h)
    stripes = ((-y / h * 2.5) % 1.0 - 0.5) * 0.4
    return [
        ("wall", body),
        ("top", intersect(body, stripes)),
        ("lamp", box(x, y + h + 0.09, neck * 0.7, 0.1)),
        ("top", trapezoid(x, y + h + 0.18, neck * 1.1, 0.0, 0.2 + 0.06 * form["roof"])),
        ("door", box(x, y, 0.09, 0.2)),
    ]


def _pyramid(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.72 + 0.08 * form["width"], 0.95 + 0.14 * form["height"]
    body = intersect(trapezoid(x, y, w, 0.0, h) * 0.75, y)
    cut = h * (0.52 - 0.12 * form["roof"])
    return [
        ("wall", body),
        ("top", intersect(body, y + cut)),
        ("door", trapezoid(x, y, 0.16, 0.1, 0.28)),
    ]


def _temple(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.58 + 0.08 * form["width"], 0.6 + 0.1 * form["height"]
    count = 4.0 + (1.5 + 1.5 * form["windows"]).floor().clamp(0.0, 2.0)
    period = 2.0 * w / count
    columns = ((((x + w) / period) % 1.0) - 0.5).abs() * period - 0.3 * period
    hall = trapezoid(x, y, w, w, h)
    return [
        ("door", hall),
        ("wall", intersect(hall, columns)),
        ("wall", box(x, y + 0.04, w + 0.08, 0.07)),
        ("wall", box(x, y + h, w + 0.06, 0.05)),
        ("top", trapezoid(x, y + h + 0.04, w + 0.1, 0.0, 0.36 + 0.1 * form["roof"])),
    ]


def _bridge(x: Tensor, y: Tensor, form: Form) -> Parts:
    gap, h = 0.42 + 0.06 * form["width"], 0.92 + 0.12 * form["height"]
    deck = 0.26 + 0.05 * form["taper"]
    side = x.abs() - gap
    sag = (deck + 0.08) + (h - deck - 0.1) * (x.abs() / gap).clamp(max=1.0) ** 2
    drop = h - (h - deck) * ((x.abs() - gap) / (1.0 - gap)).clamp(min=0.0)
    cable = torch.where(x.abs() < gap, sag, drop)
    return [
        ("top", (y + cable).abs() - 0.035),
        ("wall", trapezoid(side, y, 0.1, 0.08, h + 0.06)),
        ("top", box(x, y + deck, 1.4, 0.075 + 0.02 * form["roof"])),
    ]


def _windmill(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.34 + 0.05 * form["width"], 0.72 + 0.08 * form["height"]
    neck = w * (0.6 + 0.1 * form["taper"])
    u, v = 0.7071 * (x + y + h), 0.7071 * (y + h - x)
    blade = 0.5 + 0.08 * form["roof"]
    return [
        ("wall", trapezoid(x, y, w, neck, h)),
        ("top", ellipse(x, y + h, neck * 1.1, 0.2)),
        ("door", box(x, y, 0.1, 0.24)),
        ("top", union(box(u, v, blade, 0.06), box(u, v, 0.06, blade))),
        ("lamp", ellipse(x, y + h, 0.07, 0.07)),
    ]


def _church(x: Tensor, y: Tensor, form: Form) -> Parts:
    w, h = 0.5 + 0.06 * form["width"], 0.44 + 0.06 * form["height"]
    s = 0.19 + 0.03 * form["taper"]
    steeple = x + w - s
    return [
        ("wall", trapezoid(x, y, w, w, h)),
        ("top", trapezoid(x, y + h, w + 0.06, w - 0.16, 0.24)),
        ("wall", trapezoid(steeple, y, s, s, h + 0.3)),
        ("top", trapezoid(steeple, y + h + 0.3, s + 0.05, 0.0, 0.4 + 0.1 * form["roof"])),
        ("door", box(steeple, y, 0.09, 0.24)),
        ("dark", _windows(x - s, y, form, 0.22, 0.17)),
    ]


_DRAW: tuple[Callable[[Tensor, Tensor, Form], Parts], ...] = (
    _castle, _tower, _lighthouse, _pyramid, _temple, _bridge, _windmill, _church,
)  # fmt: skip


def _draw(
    discrete: Tensor,
    continuous: Tensor,
    varied: Tensor,
    varied_continuous: Tensor,
    size: int,
    kind: int,
) -> Tensor:
    who = dict(zip(ATTRIBUTES, discrete.unbind(-1), strict=True))
    flat = dict(zip(CONTINUOUS, continuous.unbind(-1), strict=True))
    form = {name: value[:, None, None] for name, value in flat.items()}
    sky, ground = varied.unbind(-1)
    move = dict(zip(NUISANCE_CONTINUOUS, varied_continuous.unbind(-1), strict=True))
    n = len(discrete)

    columns, rows = grid(size)
    horizon = (0.5 + 0.06 * move["horizon"])[:, None, None]
    high = torch.tensor(_SKY_TOP)[sky][:, :, None, None]
    low = torch.tensor(_SKY_LOW)[sky][:, :, None, None]
    blend = ((rows + 1.0) / 1.5).clamp(0.0, 1.0)
    scale = 1.0 + 0.08 * move["scale"]
    canvas = Canvas(torch.lerp(high, low, blend.expand(n, 1, size, size)), (2.0 / size) / scale)
    sun_x = columns - 0.75 * move["sun_x"][:, None, None]
    sun_y = rows + 0.62 + 0.18 * move["sun_y"][:, None, None]
    canvas.paint(torch.tensor(_SUN)[sky], ellipse(sun_x, sun_y, 0.13, 0.13))
    cloud_x = columns - 0.6 * move["cloud_x"][:, None, None]
    cloud_y = rows + 0.6 + 0.15 * move["cloud_y"][:, None, None]
    clouds = union(
        ellipse(cloud_x, cloud_y, 0.34, 0.13),
        ellipse(cloud_x - 0.95, cloud_y - 0.22, 0.3, 0.12),
        ellipse(cloud_x + 0.95, cloud_y - 0.14, 0.3, 0.12),
    )
    canvas.paint(torch.tensor([0.97, 0.97, 0.98]), clouds, sky == 3)
    light = torch.tensor(_LIGHT)[sky] * (1.0 + 0.1 * move["light"][:, None])
    canvas.paint(torch.tensor(_GROUND)[ground] * light, horizon - rows)

    x, y = place(
        size,
        torch.stack((0.1 * move["x"], 0.62 + 0.05 * move["y"]), -1),
        scale,
        0.04 * move["angle"],
    )
    zero = torch.zeros(n)
    wall = palette(WALL, who["wall"], 0.02 * flat["wall_hue"], 0.15 * flat["wall_value"])
    top = palette(TOP, who["top"], 0.02 * flat["top_hue"], 0.15 * flat["top_value"])
    door = hsv_to_rgb(
        torch.stack((0.5 + 0.5 * flat["door_hue"], zero + 0.6, 0.4 + 0.2 * flat["door_value"]), -1)
    )
    leaf = hsv_to_rgb(torch.stack((0.3 + 0.1 * flat["plant_hue"], zero + 0.75, zero + 0.5), -1))
    roles = {
        "wall": wall,
        "top": top,
        "door": door,
        "dark": torch.tensor([0.1, 0.1, 0.16]).expand(n, 3),
        "lamp": torch.tensor([1.0, 0.93, 0.5]).expand(n, 3),
    }

    # The flag stands to the left, the plant to the right, both behind the building.
    flag = palette(TOP, torch.tensor([0, 0, 2, 3, 4])[who["flag"]], zero, zero)
    big = 1.0 + 0.2 * form["flag_size"]
    canvas.paint(rgb("gray") * light, box(x + 0.72, y + 0.6, 0.025, 0.62), who["flag"] > 0)
    canvas.paint(
        flag * light, box(x + 0.72 - 0.19 * big, y + 1.05, 0.19 * big, 0.14 * big), who["flag"] > 0
    )
    right, grown = x - 0.74, 1.0 + 0.2 * form["plant_size"]
    canvas.paint(torch.tensor([0.36, 0.22, 0.12]) * light, box(right, y + 0.15, 0.05, 0.2),
                 (who["plant"] == 1) | (who["plant"] == 2))  # fmt: skip
    canvas.paint(leaf * light, trapezoid(right, y + 0.2, 0.22, 0.0, 0.7 * grown), who["plant"] == 1)
    canvas.paint(leaf * light, ellipse(right, y + 0.5 * grown, 0.22, 0.22 * grown),
                 who["plant"] == 2)  # fmt: skip
    arm = union(
        box(right, y + 0.3, 0.065, 0.38 * grown),
        box(right.abs() - 0.17, y + 0.42, 0.045, 0.13),
        box(right, y + 0.33, 0.2, 0.045),
    )
    canvas.paint(leaf * light, arm, who["plant"] == 3)
    for role, distance in _DRAW[kind](x, y, form):
        canvas.paint(roles[role] * light, intersect(distance, y))
    return canvas.bytes()


def render(
    discrete: Tensor, continuous: Tensor, varied: Tensor, varied_continuous: Tensor, size: int
) -> Tensor:
    """Draw landmarks.

    Args:
        discrete: identity attributes, ``int64 [n, len(ATTRIBUTES)]``.
        continuous: identity parameters in [-1, 1], ``[n, len(CONTINUOUS)]``.
        varied: nuisance attributes, ``int64 [n, len(NUISANCE)]``.
        varied_continuous: nuisance parameters in [-1, 1], ``[n, len(NUISANCE_CONTINUOUS)]``.
        size: height and width in pixels.

    Returns:
        ``uint8 [n, 3, size, size]``.
    """
    out = torch.empty(len(discrete), 3, size, size, dtype=torch.uint8)
    for kind in range(len(_DRAW)):
        rows = (discrete[:, 0] == kind).nonzero()[:, 0]
        if len(rows):
            out[rows] = _draw(
                discrete[rows], continuous[rows], varied[rows], varied_continuous[rows], size, kind
            )
    return out
