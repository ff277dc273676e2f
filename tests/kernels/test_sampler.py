# SPDX-License-Identifier: Apache-2.0
"""The sampler: draws are uniform, and those of neighbouring coordinates are independent.

Every stream is fixed, so each verdict is the same on every run. A correct generator passes all
tests of one backend with probability 1 - 1e-6: each of the 18 tests has its share of that, and
shares it equally among its p-values (Bonferroni).
"""

import math

import pytest
import torch
from oracle import make_problem

from stamina_kernels import sample_mask, unpack_bits
from stamina_kernels.philox import philox4x32, uniform

LOW = 0xFFFFFFFF
SHARE = 1e-6 / 18
LOGITS = (-4.0, -1.5, -0.3, 0.0, 0.7, 2.5)


def upper_tail(statistic, freedom=1):
    """p-values of chi-square statistics, where too large is wrong."""
    x = torch.as_tensor(statistic, dtype=torch.float64)
    return torch.special.gammaincc(torch.full_like(x, freedom / 2), x / 2)


def both_tails(statistic, freedom):
    """The same where too small, that is too regular, is as wrong; for many degrees of freedom."""
    upper = upper_tail(statistic, freedom)
    return 2 * torch.minimum(upper, 1 - upper)


def accept(p_values):
    p_values = torch.as_tensor(p_values)
    limit = SHARE / p_values.numel()
    assert p_values.min() > limit, f"{p_values.min():.2e}, allowed {limit:.2e}"


def draw(backend, logit, rows, columns, *, seed=0, step=0, layer_id=0, row0=0, col0=0):
    """Mask of a layer whose every logit is the same."""
    p = make_problem([1], 1, (1,), initial=False).group[0]._replace(
        weight=torch.zeros(rows, columns), A=torch.zeros(rows, 1), B=torch.zeros(1, columns),
        U=torch.zeros(rows, 1), V=torch.zeros(1, columns), b=torch.tensor(logit),
        layer_id=layer_id, row0=row0, col0=col0,
    )  # fmt: skip
    scalars = {"seed": torch.tensor(seed), "step": torch.tensor(step)}
    return unpack_bits(sample_mask(p, **scalars, backend=backend), columns)


def density(logit):
    return 1 / (1 + math.exp(-logit))


# per axis: coordinates of a second draw that must be independent of the first, close by in the
# counter or the key, where a weak generator shows first
NEIGHBOURS = {
    "seed": [{"seed": d} for d in (1, 2, 1 << 31, 1 << 32, 1 << 62, -1)],
    "step": [{"step": d} for d in (1, 2, 1 << 16, (1 << 32) - 1)],
    "layer": [{"layer_id": d} for d in (1, 2, 1 << 16, 1 << 31)],
    "row": [{"row0": d} for d in (128, 1 << 16, 1 << 31)],
    "column": [{"col0": d} for d in (512, 1 << 16, 1 << 33)],
    # the words of the counter and the key trade places
    "two at once": [{"step": 1, "layer_id": 1}, {"seed": 1, "step": 1}, {"row0": 128, "col0": 512}],
}
BASES = [
    {"seed": 0, "step": 0, "layer_id": 0},
    {"seed": 1, "step": 17, "layer_id": 0x9E3779B9 >> 1},
    {"seed": 0x123456789ABCDEF, "step": 1000, "layer_id": 12345},
    {"seed": -(1 << 40) - 3, "step": 3, "layer_id": 77},
]


def contingency(first, second):
    """Chi-square statistic, one degree of freedom, of the 2 x 2 table of paired bits."""
    n = first.numel()
    both = int((first & second).sum())
    a, b = int(first.sum()), int(second.sum())
    return n * (n * both - a * b) ** 2 / (a * (n - a) * b * (n - b))


def test_density_is_the_sigmoid_of_the_logit_for_every_seed(backend_on_path):
    rows, columns = 96, 256
    n, p_values = rows * columns, []
    for logit in LOGITS:
        keep = density(logit)
        z_square = []
        for k in range(64):
            seed = (-1) ** k * (k // 2 << (k % 48))
            kept = draw(
                backend_on_path, logit, rows, columns, seed=seed, step=k // 3, layer_id=7 * k
            ).sum()
            z_square.append((int(kept) - n * keep) ** 2 / (n * keep * (1 - keep)))
        # every stream by itself, and all of them together
        p_values += [*upper_tail(z_square), both_tails(sum(z_square), 64)]
    accept(p_values)


@pytest.mark.parametrize("axis", NEIGHBOURS)
def test_draws_of_neighbouring_coordinates_are_independent(backend_on_path, axis):
    rows, columns, p_values = 128, 512, []
    for logit in (-1.5, 0.7):
        for change in NEIGHBOURS[axis]:
            statistics = []
            for base in BASES:
                moved = {**base, **{k: base.get(k, 0) + d for k, d in change.items()}}
                pair = (draw(backend_on_path, logit, rows, columns, **c) for c in (base, moved))
                statistics.append(contingency(*pair))
            p_values += [*upper_tail(statistics), upper_tail(sum(statistics), len(BASES))]
    accept(p_values)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8, 32, 128])
def test_elements_of_one_mask_are_independent(backend_on_path, distance):
    """Along rows and columns: within one Philox block, from block to block, from tile to tile."""
    p_values = []
    for logit in (-1.5, 0.0, 0.7):
        for base in BASES:
            mask = draw(backend_on_path, logit, 512, 512, **base)
            for lines in (mask, mask.t()):
                # pairs that share no element: blocks of `distance` against the next one
                whole = lines[:, : 512 // (2 * distance) * 2 * distance]
                first, second = whole.unflatten(1, (-1, 2, distance)).unbind(2)
                p_values.append(upper_tail(contingency(first, second)))
    accept(p_values)


def test_masks_of_one_layer_at_many_steps_are_uncorrelated(backend_on_path):
    steps, rows, columns, logit = 64, 64, 1024, -0.3
    keep, n = density(logit), rows * columns
    masks = torch.stack([
        draw(backend_on_path, logit, rows, columns, seed=5, step=100 + t, layer_id=9).flatten()
        for t in range(steps)
    ]).double()  # fmt: skip
    standard = (masks - keep) / (keep * (1 - keep)) ** 0.5
    correlation = standard @ standard.t() / n**0.5
    pairs = correlation[tuple(torch.triu_indices(steps, steps, 1))]
    # How often each weight is kept is binomial. The mean over weights of the squared deviation, in
    # units of the variance, has mean 1 and variance (2 + excess kurtosis) / n: a weight that is
    # kept too often, or too regularly, moves it.
    spread = (standard.sum(0) / steps**0.5).square().mean()
    excess = (1 - 6 * keep * (1 - keep)) / (steps * keep * (1 - keep))
    z = (spread - 1) / ((2 + excess) / n) ** 0.5
    accept([*upper_tail(pairs.square()), upper_tail(z.square())])


def words(backend, seed, step, layer_id, row0, rows, columns):
    """Words of the stream, int64 in [0, 2^32), from either implementation."""
    if backend == "reference":
        block, row = torch.arange(columns // 4)[None], torch.arange(row0, row0 + rows)[:, None]
        one = torch.ones_like(block)
        key = torch.tensor(seed & LOW), torch.tensor(seed >> 32 & LOW)
        return philox4x32((block, row, step * one, layer_id * one), key).flatten(1)
    got = torch.ops.stamina_cpu.philox_words(seed, step, layer_id, row0, 0, rows, columns)
    return got.long() & LOW


def test_every_part_of_a_word_is_uniform_and_independent_of_the_next(backend_on_path):
    """Chi-square over 256 bins of each byte, and over 16 x 16 bins of consecutive words."""
    p_values = []
    for base in BASES:
        tiles = [
            words(backend_on_path, **{**base, "step": base["step"] + t}, row0=8 * t, rows=8,
                  columns=128)
            for t in range(200)
        ]  # fmt: skip
        stream = torch.stack(tiles)
        for shift in (24, 16, 8, 0):
            observed = torch.bincount((stream >> shift & 255).flatten(), minlength=256).double()
            expected = stream.numel() / 256
            p_values.append(both_tails(((observed - expected) ** 2 / expected).sum(), 255))
        pairs = (stream >> 28).unflatten(-1, (-1, 2))
        for first, second in (pairs.unbind(-1), (pairs[:, ::2, :, 0], pairs[:, 1::2, :, 0])):
            cell = torch.bincount((16 * first + second).flatten(), minlength=256).double()
            expected = first.numel() / 256
            p_values.append(both_tails(((cell - expected) ** 2 / expected).sum(), 255))
    accept(p_values)


def test_every_bit_of_a_coordinate_flips_half_of_the_bits_of_the_words(backend_on_path):
    """Avalanche: seed, step, layer and row; each flip changes Binomial(n, 1/2) of n bits."""
    flips = [("seed", k) for k in range(64)]
    flips += [(name, k) for name in ("step", "layer_id", "row0") for k in range(32)]
    p_values = []
    for name, bit in flips:
        changed = total = 0
        for k in range(12):
            base = {"seed": k * 0x1234567, "step": k * k, "layer_id": 3 * k, "row0": 5 * k}
            moved = {**base, name: base[name] ^ 1 << bit}
            if name == "seed":
                moved["seed"] -= moved["seed"] >> 63 << 64  # as a signed 64-bit integer
            both = (words(backend_on_path, **c, rows=1, columns=32) for c in (base, moved))
            difference = next(both) ^ next(both)
            changed += int((difference[..., None] >> torch.arange(32) & 1).sum())
            total += 32 * difference.numel()
        p_values.append(upper_tail((2 * changed - total) ** 2 / total))
    accept(p_values)


def test_uniforms_of_the_reference_come_from_the_upper_bits_of_the_words():
    seed, step, layer = 3, 4, 5
    u = uniform(torch.tensor(seed), torch.tensor(step), layer, range(9), range(64))
    w = words("reference", seed, step, layer, 0, 9, 64)
    assert torch.equal(u.double(), (2 * (w >> 9) + 1).double() * 2.0**-24)
