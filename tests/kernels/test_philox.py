# SPDX-License-Identifier: Apache-2.0
"""The random stream: known answers, addressing, statistics."""

import pytest
import torch

from stamina_kernels.philox import philox4x32, uniform

# Random123 1.14, kat_vectors: philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert words.tolist() == list(expected)


def test_uniform_is_the_documented_function_of_its_coordinates():
    seed, step, layer = 0x299F31D0_A4093822, (1 << 32) + 0x13198A2E, 0x03707344
    row, block = 0x85A308D3, 0x243F6A88
    u = uniform(
        torch.tensor(seed),
        torch.tensor(step),
        layer,
        range(row, row + 1),
        range(4 * block, 4 * block + 4),
    )
    expected = [(2 * (w >> 9) + 1) * 2.0**-24 for w in KNOWN_ANSWERS[2][2]]
    assert u.tolist() == [expected]


def test_a_shard_sees_the_same_numbers_as_the_whole():
    seed, step = torch.tensor(-5), torch.tensor(3)
    whole = uniform(seed, step, 9, range(0, 13), range(0, 30))
    part = uniform(seed, step, 9, range(4, 11), range(5, 27))
    assert torch.equal(part, whole[4:11, 5:27])


def test_uniforms_are_strictly_inside_and_uniform():
    u = uniform(torch.tensor(1), torch.tensor(0), 0, range(1000), range(1000))
    assert u.min() > 0 and u.max() < 1
    # chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6; 6 sigma
    observed = torch.histc(u, bins=256, min=0.0, max=1.0)
    expected = u.numel() / 256
    chi_square = ((observed - expected).square() / expected).sum()
    assert abs(chi_square - 255) < 6 * 22.6


@pytest.mark.parametrize("other", ["seed", "step", "layer", "row", "column"])
def test_streams_are_uncorrelated(other):
    base = {"seed": 11, "step": 5, "layer": 2, "row": 0, "column": 0}

    def draw(coordinates):
        r, c = coordinates["row"], coordinates["column"]
        return uniform(
            torch.tensor(coordinates["seed"]),
            torch.tensor(coordinates["step"]),
            coordinates["layer"],
            range(r, r + 500),
            range(c, c + 500),
        )

    first, second = draw(base), draw(base | {other: base[other] + 1})
    pair = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    # the correlation of n independent pairs has standard deviation n^-1/2 = 0.002; 5 sigma
    assert abs(pair) < 0.01
