# SPDX-License-Identifier: Apache-2.0
"""The procedural world: identities of two families and pictures of them.

An identity is what a concept *is*: discrete attributes, which captions name, and continuous
parameters, which they never tell. Nuisance is what varies between the pictures of one identity.
Everything is a function of a seed. The held-out identities are a fixed list; identities drawn
for training differ from each of them in at least two discrete attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from stamina_adapters.embedded import faces, landmarks

SIZE = 64
FAMILIES = ("face", "landmark")
_WORLD: dict[str, ModuleType] = {"face": faces, "landmark": landmarks}

HELDOUT_SEED = 20261123
HELDOUT_PER_FAMILY = 58
# Two held-out identities of a family differ in at least this many discrete attributes.
HELDOUT_GAP = 3
# A training identity differs from every held-out one in at least this many.
TRAINING_GAP = 2


@dataclass(frozen=True)
class Sample:
    """A batch of pictures of one family, as numbers.

    Attributes:
        family: ``"face"`` or ``"landmark"``.
        discrete: identity attributes, ``int64 [n, a]``.
        continuous: identity parameters in [-1, 1], ``[n, c]``.
        varied: nuisance attributes, ``int64 [n, v]``.
        varied_continuous: nuisance parameters in [-1, 1], ``[n, w]``.
    """

    family: str
    discrete: Tensor
    continuous: Tensor
    varied: Tensor
    varied_continuous: Tensor

    def render(self, size: int = SIZE) -> Tensor:
        """The pictures, ``uint8 [n, 3, size, size]``."""
        return _WORLD[self.family].render(
            self.discrete, self.continuous, self.varied, self.varied_continuous, size
        )


@dataclass(frozen=True, eq=False)
class Identity:
    """A held-out identity.

    Attributes:
        id: its stable name, such as ``"face-007"``.
        family: ``"face"`` or ``"landmark"``.
        split: ``"sequence"``, ``"tuning"`` or ``"distractor"``.
        discrete: attributes, ``int64 [a]``; `describe` puts them in words.
        continuous: parameters in [-1, 1], ``[c]``.
    """

    id: str
    family: str
    split: str
    discrete: Tensor
    continuous: Tensor

    def describe(self) -> dict[str, str]:
        """The discrete attributes in words."""
        table = attributes(self.family)
        return {
            name: words[int(value)]
            for (name, words), value in zip(table.items(), self.discrete, strict=True)
        }


def attributes(family: str) -> dict[str, tuple[str, ...]]:
    """The discrete identity attributes of a family and their words, in column order."""
    return dict(_WORLD[_known(family)].ATTRIBUTES)


def nuisance(family: str) -> dict[str, tuple[str, ...]]:
    """The named nuisance attributes of a family and their words, in column order."""
    return dict(_WORLD[_known(family)].NUISANCE)


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, not {family!r}")
    return family


def _uniform(generator: torch.Generator, n: int, width: int) -> Tensor:
    return torch.rand(n, width, generator=generator) * 2.0 - 1.0


def draw_identities(family: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``n`` identities, near to held-out ones or not: ``int64 [n, a]`` and ``[n, c]``."""
    module = _WORLD[_known(family)]
    columns = []
    for name, words in module.ATTRIBUTES.items():
        weights = torch.tensor(module.WEIGHTS.get(name, (1.0,) * len(words)))
        columns.append(torch.multinomial(weights, n, replacement=True, generator=generator))
    return torch.stack(columns, -1), _uniform(generator, n, len(module.CONTINUOUS))


def visible(family: str, discrete: Tensor) -> Tensor:
    """Copy of ``discrete`` where attributes that do not show are 0 (a missing hat's colour)."""
    discrete = discrete.clone()
    if _known(family) == "face":
        names = list(faces.ATTRIBUTES)
        hat, colour = names.index("hat"), names.index("hat_colour")
        discrete[:, colour] *= discrete[:, hat] > 0
    return discrete


def gaps(family: str, left: Tensor, right: Tensor) -> Tensor:
    """Number of visible discrete attributes that differ, ``[len(left), len(right)]``."""
    a, b = visible(family, left), visible(family, right)
    return (a[:, None] != b[None]).sum(-1)


def draw_training_identities(
    family: str, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``n`` identities that differ from every held-out one in ``TRAINING_GAP`` attributes."""
    held = torch.stack([i.discrete for i in heldout_identities() if i.family == family])
    kept: list[tuple[Tensor, Tensor]] = []
    found = 0
    while found < n:
        discrete, continuous = draw_identities(family, n, generator)
        far = gaps(family, discrete, held).min(1).values >= TRAINING_GAP
        kept.append((discrete[far], continuous[far]))
        found += int(far.sum())
    return torch.cat([d for d, _ in kept])[:n], torch.cat([c for _, c in kept])[:n]


def draw_nuisance(family: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what varies between pictures: ``int64 [n, v]`` and ``[n, w]``."""
    module = _WORLD[_known(family)]
    columns = [
        torch.randint(len(words), (n,), generator=generator) for words in module.NUISANCE.values()
    ]
    return torch.stack(columns, -1), _uniform(generator, n, len(module.NUISANCE_CONTINUOUS))


def draw_training_sample(family: str, n: int, generator: torch.Generator, views: int = 1) -> Sample:
    """Draw ``n`` training identities with ``views`` pictures each (rows of one identity adjoin)."""
    discrete, continuous = draw_training_identities(family, n, generator)
    return Sample(
        family,
        discrete.repeat_interleave(views, 0),
        continuous.repeat_interleave(views, 0),
        *draw_nuisance(family, n * views, generator),
    )


@lru_cache(maxsize=1)
def heldout_identities() -> tuple[Identity, ...]:
    """The identities that no training ever sees, faces and landmarks in turn.

    The first 100 are the split ``"sequence"``, the next 6 ``"tuning"``, the rest
    ``"distractor"``. Within a family any two differ in at least ``HELDOUT_GAP`` visible
    discrete attributes.
    """
    chosen = {}
    for offset, family in enumerate(FAMILIES):
        generator = torch.Generator().manual_seed(HELDOUT_SEED + offset)
        discrete, continuous = draw_identities(family, 4096, generator)
        distance = gaps(family, discrete, discrete)
        rows: list[int] = []
        for row in range(len(discrete)):
            if len(rows) == HELDOUT_PER_FAMILY:
                break
            if all(int(distance[row, other]) >= HELDOUT_GAP for other in rows):
                rows.append(row)
        chosen[family] = (discrete[rows], continuous[rows])
    out = []
    for index in range(HELDOUT_PER_FAMILY):
        for family in FAMILIES:
            split = "sequence" if index < 50 else "tuning" if index < 53 else "distractor"
            discrete, continuous = chosen[family]
            out.append(
                Identity(f"{family}-{index:03d}", family, split, discrete[index], continuous[index])
            )
    return tuple(out)


def sample_identity(identity: Identity, n: int, seed: int) -> Sample:
    """``n`` pictures of one identity under nuisance drawn from ``seed``, as numbers."""
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        identity.family,
        identity.discrete.expand(n, -1),
        identity.continuous.expand(n, -1),
        *draw_nuisance(identity.family, n, generator),
    )


def render(identity: Identity, n: int, seed: int, size: int = SIZE) -> np.ndarray:
    """``n`` pictures of one identity under nuisance drawn from ``seed``.

    Returns:
        ``uint8 [n, size, size, 3]``. Equal arguments give equal pictures.

    Raises:
        ValueError: ``n`` or ``size`` is not positive.
    """
    if n < 1 or size < 1:
        raise ValueError(f"n and size must be positive, not n={n}, size={size}")
    pictures = sample_identity(identity, n, seed).render(size)
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()
