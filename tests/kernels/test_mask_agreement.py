# SPDX-License-Identifier: Apache-2.0
"""Every path draws the reference's bits, off the rounding of the threshold, on 10^8 weights."""

import pytest
import torch
from oracle import make_problem
from paths import ALL, forced, supported

from stamina_kernels import sample_mask, unpack_bits
from stamina_kernels.philox import uniform

LOW = 0xFFFFFFFF


def differing(bits, expected, columns):
    """Row and column of every bit that differs, without unpacking all of them."""
    row, word = (bits ^ expected).nonzero(as_tuple=True)
    inside = unpack_bits((bits ^ expected)[row, word][:, None], 32)
    which, bit = inside.nonzero(as_tuple=True)
    return row[which], 32 * word[which] + bit


def assert_only_the_threshold_differs(p, seed, step, hard, bits, expected):
    rows, columns = differing(bits, expected, p.weight.shape[1])
    m = p.U.shape[1]
    U, V, b = p.U.double()[rows], p.V.double()[:, columns].t(), p.b.double()
    logits, size = (U * V).sum(1) + b, (U * V).abs().sum(1) + b.abs()
    # One of the two is on the wrong side of the exact comparison, so its own error bounds the
    # distance: a chain of m products and m additions errs by (m + 1) 2^-24 sum |U V| at most.
    chain = (m + 1) * 2.0**-24 * size
    if hard:
        assert (logits.abs() <= chain).all()
        return
    where = zip((p.row0 + rows).tolist(), (p.col0 + columns).tolist(), strict=True)
    lines = [uniform(seed, step, p.layer_id, range(i, i + 1), range(j, j + 1)) for i, j in where]
    u = torch.cat([logits.new_empty(0), *(line.double().flatten() for line in lines)])
    # The sigmoid passes the chain's error on with a slope of at most 1/4; then exponential,
    # quotient and comparison round a few times at 2^-24, eight in all.
    assert ((u - torch.sigmoid(logits)).abs() <= chain / 4 + 8 * 2.0**-24).all()


@pytest.mark.slow
def test_bits_of_a_hundred_million_weights_agree_on_every_path():
    """Off the rounding of the threshold; layers of different mask ranks, shapes and places."""
    names = [name for name in ALL if supported(name)]
    if not names:
        pytest.skip("the C++ library is not here")
    sampled = 0
    for k in range(28):
        rows, columns, m = 2048 + k, 2048 + 13 * k, (1, 4, 16, 33)[k % 4]
        p = make_problem([rows], columns, (1,), rank=1, mask_rank=m, initial=False, seed=k).group[0]
        # every alignment of the first column, rows and columns beyond 31 bits
        p = p._replace(layer_id=LOW - k, row0=k << 27, col0=(k << 28) + k)
        seed, step = torch.tensor((-1) ** k * (k << 40) - k), torch.tensor((k << 31) + 3 * k)
        hard = k % 14 == 13
        where = {"seed": seed, "step": step, "hard": hard}
        expected = sample_mask(p, **where, backend="reference")
        for name in names:
            with forced(name):
                bits = sample_mask(p, **where, backend="cpu")
            assert_only_the_threshold_differs(p, seed, step, hard, bits, expected)
        sampled += 0 if hard else rows * columns
    assert sampled >= 10**8
