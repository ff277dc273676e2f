# SPDX-License-Identifier: Apache-2.0
"""The reference backend is the definition: held against fp64, autograd and statistics."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_as_accurate, make_problem, oracle, run

from stamina_kernels import (
    commit,
    compose,
    fold_,
    masked_linear,
    reference,
    sample_mask,
    unpack_bits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [
    pytest.param({"hard": False, "sparse_kind": "sigmoid"}, id="sampled"),
    pytest.param({"hard": True, "sparse_kind": "relu"}, id="hard"),
]


FEW = 16


def term_norms(problem, bits, mode):
    """Of y and of every gradient, the norm of the terms that each of its elements sums: an element
    of dV, say, is a sum of U dL over the rows. In the order y, dx, dA, dB, dU, dV, db, dA, ..."""
    group = [p._replace(b=p.b.expand(p.weight.shape)) for p in problem.group]
    logit_gradients = oracle(replace(problem, group=group), bits=bits, **mode)[3][5::5]
    x, dy = problem.x.double().flatten(0, -2), problem.dy.double().flatten(0, -2)
    y_squares, x_squares, factors, first = [], 0, [], 0
    for k, (p, dL) in enumerate(zip(problem.group, logit_gradients, strict=True)):
        span = slice(first, first + p.weight.shape[0])
        A, B, U, V = (t.double() for t in (p.A, p.B, p.U, p.V))
        mask = problem.scale.double() * unpack_bits(bits[span], p.weight.shape[1])
        effective = (p.weight.double() + mask * (A @ B)).square()
        y_squares.append(x**2 @ effective.t() + (0 if p.bias is None else p.bias.double() ** 2))
        x_squares = x_squares + dy[:, span] ** 2 @ effective
        change = 0 if p.weight_init is None else p.weight.double() - p.weight_init.double()
        G = dy[:, span].t() @ x + 2 * problem.g_forget[k] * change**2 * mask * (A @ B)
        dP, dL = (mask * G).square(), dL.double().square()
        factors += [dP @ B.t() ** 2, A.t() ** 2 @ dP, dL @ V.t() ** 2, U.t() ** 2 @ dL, dL.sum()]
        first = span.stop
    y_squares = torch.cat(y_squares, -1).view_as(problem.dy)
    return [square.sqrt() for square in (y_squares, x_squares.view_as(problem.x), *factors)]


def hold_against_oracle(problem, mode, backend="reference"):
    y, forget, sparse, gradients, bits = run(problem, backend, **mode)
    exact = oracle(problem, bits=bits, **mode)
    eager = oracle(problem, bits=bits, dtype=torch.float32, **mode)
    assert_as_accurate("forget", forget, eager[1], exact[1])
    assert_as_accurate("sparse", sparse, eager[2], exact[2])
    names = ["y", "dx"] + [f"d{f}[{k}]" for k in range(len(problem.group)) for f in "ABUVb"]
    results = ([y, *gradients], [eager[0], *eager[3]], [exact[0], *exact[3]])
    for name, got, base, truth, terms in zip(
        names, *results, term_norms(problem, bits, mode), strict=True
    ):
        if got.numel() == 0 or got.numel() >= FEW:
            assert_as_accurate(name, got, base, truth)
        else:
            # A few sums of terms that may cancel: eager's errors are a few random draws, no
            # yardstick. About 8 independent roundings a term have a standard deviation below eps
            # times the terms' norm; take four. The result itself, and the oracle's, are rounded
            # once each.
            limit = 2 * (base - truth).abs().max() + 4 * torch.finfo(problem.x.dtype).eps * terms
            limit = limit + 2 * torch.finfo(got.dtype).eps * truth.abs()
            assert ((got - truth).abs() <= limit).all(), f"{name}: {got} for {truth} +- {limit}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, mode):
    hold_against_oracle(make_problem([33, 70], 123, (2, 5), dtype=dtype, bias=True, tau=0.7), mode)


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_ranks_and_wide_weights(rank):
    problem = make_problem(
        [63], 41, (7,), rank=rank, mask_rank=rank, dtype=torch.bfloat16, weight_dtype=torch.float32
    )
    hold_against_oracle(problem, {"hard": False})


def test_gradients_equal_autograd_of_the_straight_through_form_in_fp64():
    wide = torch.float64
    problem = make_problem([7, 5], 9, (3,), dtype=wide, weight_dtype=wide, factor_dtype=wide)
    *_, gradients, bits = run(problem, "reference")
    exact = oracle(problem, bits=bits)[3]
    for got, truth in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)


def test_gradcheck_with_frozen_bits():
    """x, A and B against finite differences: a tiny logit slope keeps every bit where it is."""
    wide = torch.float64
    p = make_problem([4, 3], 6, (2,), dtype=wide, weight_dtype=wide, factor_dtype=wide).with_grad()

    def function(x, A0, B0, A1, B1):
        group = [
            p.group[0]._replace(A=A0, B=B0),
            p.group[1]._replace(A=A1, B=B1),
        ]
        out = masked_linear(x, group, **p.scalars(), backend="reference")
        return out.y, out.forget

    leaves = (p.x, p.group[0].A, p.group[0].B, p.group[1].A, p.group[1].B)
    assert torch.autograd.gradcheck(function, leaves)


def test_every_leaf_gets_a_gradient_and_dx_sees_the_mask():
    problem = make_problem([16], 24, (5,))
    *_, gradients, bits = run(problem, "reference")
    assert all(g.abs().max() > 0 for g in gradients)
    p = problem.group[0]
    unmasked = problem.dy @ (p.weight + problem.scale * p.A @ p.B)
    assert (gradients[0] - unmasked).abs().max() > 1e-2 * unmasked.abs().max()


def test_empty_batch_gives_scalars_and_their_gradients():
    problem = make_problem([8], 12, (0,))
    y, forget, sparse, gradients, _ = run(problem, "reference")
    assert y.shape == (0, 8) and forget > 0 and sparse > 0
    assert all(g.abs().max() > 0 for g in gradients[1:])


def test_group_equals_its_members():
    problem = make_problem([6, 9, 4], 33, (3,), bias=True)
    y, forget, sparse, gradients, bits = run(problem, "reference")
    first = 0
    for k, member in enumerate(problem.group):
        rows = member.weight.shape[0]
        out = masked_linear(problem.x, member, **problem.scalars(), backend="reference")
        assert torch.equal(out.bits, bits[first : first + rows])
        torch.testing.assert_close(out.y, y[:, first : first + rows])
        torch.testing.assert_close(out.forget[0], forget[k])
        torch.testing.assert_close(out.sparse[0], sparse[k])
        first += rows


def test_counts_are_density_and_overlap():
    problem = make_problem([40], 50, (1,))
    p = problem.group[0]
    out = masked_linear(problem.x, p, **problem.scalars(), backend="reference")
    mask = unpack_bits(out.bits, 50)
    overlap = mask & (p.weight != p.weight_init)
    assert out.counts.tolist() == [[int(mask.sum()), int(overlap.sum())]]
    assert 0 < overlap.sum() < mask.sum()


def test_packing_round_trips_and_pads_with_zeros():
    mask = torch.rand(5, 70) < 0.5
    bits = reference.pack_bits(mask)
    assert torch.equal(unpack_bits(bits, 70), mask)
    assert not unpack_bits(bits, 96)[:, 70:].any()


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_sampled_density_is_the_sigmoid_of_the_logit(logit):
    problem = make_problem([256], 512, (1,))
    p = problem.group[0]._replace(
        U=torch.zeros(256, 1), V=torch.zeros(1, 512), b=torch.tensor(logit)
    )
    steps = 8
    kept = sum(
        int(
            unpack_bits(
                sample_mask(p, seed=problem.seed, step=torch.tensor(t), backend="reference"), 512
            ).sum()
        )
        for t in range(steps)
    )
    n, keep = 256 * 512 * steps, float(torch.sigmoid(torch.tensor(logit)))
    # binomial: 5 standard deviations
    assert abs(kept - n * keep) < 5 * (n * keep * (1 - keep)) ** 0.5


def test_hard_mask_is_the_sign_of_the_logit():
    p = make_problem([20], 37, (1,)).group[0]
    bits = sample_mask(
        p, seed=torch.tensor(0), step=torch.tensor(0), hard=True, backend="reference"
    )
    assert torch.equal(unpack_bits(bits, 37), reference.mask_logits(p.U, p.V, p.b) > 0)


def committed(rows, columns, rank, count, seed=0):
    adapters = []
    for t in range(count):
        p = make_problem([rows], columns, (1,), rank=rank, seed=seed + t).group[0]
        adapters.append(commit(p.A, 1e-3 * p.B, p.U, p.V, p.b, scale=0.5 + t, backend="reference"))
    return adapters


def dense_delta(adapter, columns):
    mask = unpack_bits(adapter.bits, columns)
    scale = adapter.scale * 2.0 ** sum(adapter.exponent)
    return scale * mask * (adapter.A.double() @ adapter.B.double())


def test_commit_rounds_once_to_fp16_with_power_of_two_scales():
    p = make_problem([30], 20, (1,)).group[0]
    A = p.A * 1e-6  # far below fp16's normal range without the exponent
    adapter = commit(A, p.B, p.U, p.V, p.b, scale=1.0, backend="reference")
    for factor, half, exponent in zip((A, p.B), adapter[:2], adapter.exponent, strict=True):
        assert 0.5 <= half.abs().max() <= 1.0
        error = (half.double() * 2.0**exponent - factor.double()).abs()
        # half an ulp of fp16 below 1 is 2^-12; the scale is exact
        assert error.max() <= 2.0 ** (exponent - 12)


def test_commit_names_the_factor_that_is_not_finite():
    p = make_problem([4], 5, (1,)).group[0]
    for k, name in enumerate("ABUVb"):
        factors = [t.clone() for t in (p.A, p.B, p.U, p.V, p.b)]
        factors[k].view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=f"{name} must be finite, got 1 non-finite values"):
            commit(*factors, scale=1.0, backend="reference")


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.9999), (torch.float16, 0.9995), (torch.float32, None)]
)
def test_fold_rounds_once(dtype, share):
    columns, adapters = 300, committed(200, 300, 16, 10)
    initial = make_problem([200], columns, (1,), dtype=dtype).group[0].weight
    weight = initial.clone()
    fold_([weight], [initial], [adapters], backend="reference")
    exact = initial.double() + sum(dense_delta(a, columns) for a in adapters)
    if share is not None:
        # double rounding fp64 -> fp32 -> 16 bit is avoided: fp64 -> 16 bit rounds once
        assert (weight == exact.to(dtype)).double().mean() >= share
        return
    magnitude = sum(
        abs(a.scale) * 2.0 ** sum(a.exponent) * a.A.double().abs() @ a.B.double().abs()
        for a in adapters
    )
    # one rounding of W plus (r + T) roundings of the accumulation
    bound = 2.0**-24 * exact.abs() + (16 + 10) * 2.0**-24 * magnitude
    assert ((weight.double() - exact).abs() <= bound).all()


def test_unfolding_any_subset_gives_the_bits_of_folding_the_rest():
    adapters = committed(31, 45, 4, 5)
    initial = make_problem([31], 45, (1,), dtype=torch.bfloat16).group[0].weight
    everything, rest, none = initial.clone(), initial.clone(), initial.clone()
    fold_([everything], [initial], [adapters], backend="reference")
    fold_([everything], [initial], [[adapters[0], adapters[3]]], backend="reference")
    fold_([rest], [initial], [[adapters[0], adapters[3]]], backend="reference")
    assert torch.equal(everything, rest)
    fold_([everything], [initial], [[]], backend="reference")
    assert torch.equal(everything, none)


def test_fold_that_overflows_restores_every_weight():
    adapters = committed(6, 8, 2, 1)
    huge = adapters[0]._replace(scale=1e9, bits=torch.full_like(adapters[0].bits, -1))
    initial = [
        make_problem([6], 8, (1,), dtype=torch.float16, seed=s).group[0].weight for s in (0, 1)
    ]
    weights = [w + 1 for w in initial]
    with pytest.raises(OverflowError, match="layer 1 overflows torch.float16"):
        fold_(weights, initial, [adapters, [huge]], backend="reference")
    assert all(torch.equal(w, i) for w, i in zip(weights, initial, strict=True))


def test_compose_is_the_effective_weight_of_the_forward():
    problem = make_problem([12, 7], 40, (40,))
    bits = sample_mask(problem.group, seed=problem.seed, step=problem.step, backend="reference")
    effective = compose(problem.group, bits, scale=problem.scale, backend="reference")
    out = masked_linear(torch.eye(40), problem.group, **problem.scalars(), backend="reference")
    assert torch.equal(out.y.t(), effective)
