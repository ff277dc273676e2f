# SPDX-License-Identifier: Apache-2.0
"""Fold keeps no history and rounds once, for any subsets, orders, dtypes, ranks and layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import make_problem
from test_reference import dense_delta

from stamina_kernels import commit, fold_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROPERTY = {"deadline": None, "derandomize": True}
# correctly rounded elements; fp32 has a bound on the error instead
SHARE = {torch.bfloat16: 0.9999, torch.float16: 0.9995}


def committed_layer(rows, columns, ranks, seed=0):
    """One adapter per rank, of sizes and scales that differ from concept to concept."""
    adapters = []
    for t, rank in enumerate(ranks):
        p = make_problem([rows], columns, (1,), rank=rank, mask_rank=3, seed=seed + t).group[0]
        scale = (-1) ** t * (0.5 + t % 7)
        adapters.append(commit(p.A, 0.05 * p.B, p.U, p.V, p.b, scale=scale, backend="reference"))
    return adapters


def initial_weight(rows, columns, dtype, seed=0):
    return make_problem([rows], columns, (1,), dtype=dtype, seed=seed).group[0].weight


def subset(adapters, kept):
    return [adapter for adapter, keep in zip(adapters, kept, strict=True) if keep]


def bits_of(weight):
    return weight.contiguous().view(torch.uint8)


@st.composite
def histories(draw):
    """Layers with their ranks, and a sequence of subsets; a subset says which concepts stay."""
    layers = draw(
        st.lists(
            st.tuples(
                st.integers(1, 70),
                st.integers(1, 140),
                st.sampled_from(DTYPES),
                st.lists(st.integers(1, 40), min_size=0, max_size=6),
            ),
            min_size=1,
            max_size=3,
        )
    )
    subsets = st.tuples(
        *(st.lists(st.booleans(), min_size=len(r), max_size=len(r)) for *_, r in layers)
    )
    return layers, draw(st.lists(subsets, min_size=1, max_size=5)), draw(st.permutations(layers))


@settings(max_examples=20, **PROPERTY)
@given(history=histories())
def test_only_the_last_subset_matters(backend_on_path, history):
    """Also with the layers folded one by one, in another order, instead of in one call."""
    layers, subsets, order = history
    adapters = [committed_layer(r, c, ranks) for r, c, _, ranks in layers]
    initial = [initial_weight(r, c, d, seed=k) for k, (r, c, d, _) in enumerate(layers)]
    weights = [torch.full_like(w, float("nan")) for w in initial]
    untouched = [w.clone() for w in initial]
    for kept in subsets:
        now = [subset(a, k) for a, k in zip(adapters, kept, strict=True)]
        fold_(weights, initial, now, backend=backend_on_path)
    alone = [torch.full_like(w, float("nan")) for w in initial]
    for k in sorted(range(len(layers)), key=lambda k: order.index(layers[k])):
        fold_([alone[k]], [initial[k]], [now[k]], backend=backend_on_path)
    for k in range(len(layers)):
        assert torch.equal(bits_of(weights[k]), bits_of(alone[k])), k
        assert torch.equal(bits_of(initial[k]), bits_of(untouched[k])), k


@settings(max_examples=5, **PROPERTY)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_fifty_concepts_come_and_go_one_at_a_time(backend_on_path, data, dtype):
    shape = (34, 67)
    ranks = [1 + 5 * t % 13 for t in range(50)]
    adapters = committed_layer(*shape, ranks)
    initial = initial_weight(*shape, dtype)
    weight, once = initial.clone(), initial.clone()
    leaving = data.draw(st.permutations(range(50)))[: data.draw(st.integers(0, 50))]
    present = set()
    for t in range(50):
        present.add(t)
        fold_(
            [weight], [initial], [[adapters[k] for k in sorted(present)]], backend=backend_on_path
        )
    for t in leaving:
        present.remove(t)
        fold_(
            [weight], [initial], [[adapters[k] for k in sorted(present)]], backend=backend_on_path
        )
    fold_([once], [initial], [[adapters[k] for k in sorted(present)]], backend=backend_on_path)
    assert torch.equal(bits_of(weight), bits_of(once))
    if not present:
        assert torch.equal(bits_of(weight), bits_of(initial))


def rounding_errors(weight, initial, adapters):
    """Elements that are not correctly rounded; worst error in units of the bound for fp32."""
    columns = weight.shape[1]
    exact = initial.double() + sum(dense_delta(a, columns) for a in adapters)
    magnitude = sum(
        abs(a.scale) * 2.0 ** sum(a.exponent) * (a.A.double().abs() @ a.B.double().abs())
        for a in adapters
    )
    rank = max((a.A.shape[1] for a in adapters), default=0)
    bound = 2.0**-24 * (exact.abs() + (rank + len(adapters)) * magnitude)
    error = (weight.double() - exact).abs()
    # fp64 to 16 bits is one rounding, of a sum whose own error is 2^-53
    return int((weight != exact.to(weight.dtype)).sum()), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("concepts", "ranks"), [(1, [16]), (7, [1, 33, 4]), (50, [4, 16, 9])])
def test_one_rounding_whatever_the_number_of_concepts(backend_on_path, dtype, concepts, ranks):
    """Random subsets of up to 50 concepts of mixed ranks, three layers in one call."""
    shapes = [(150, 333), (65, 129), (16, 31)]
    ranks = [ranks[t % len(ranks)] for t in range(concepts)]
    layers = [committed_layer(*shape, ranks, seed=k) for k, shape in enumerate(shapes)]
    initial = [initial_weight(*shape, dtype, seed=k) for k, shape in enumerate(shapes)]
    g = torch.Generator().manual_seed(concepts)
    wrong = total = 0
    for _ in range(4):
        kept = [subset(a, (torch.rand(concepts, generator=g) < 0.8).tolist()) for a in layers]
        weights = [torch.full_like(w, float("nan")) for w in initial]
        fold_(weights, initial, kept, backend=backend_on_path)
        for weight, start, adapters in zip(weights, initial, kept, strict=True):
            if not adapters:
                assert torch.equal(bits_of(weight), bits_of(start))
                continue
            misses, worst = rounding_errors(weight, start, adapters)
            wrong, total = wrong + misses, total + weight.numel()
            assert dtype != torch.float32 or worst <= 1
    assert dtype == torch.float32 or wrong <= (1 - SHARE[dtype]) * total


@settings(max_examples=20, **PROPERTY)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    magnitude=st.integers(-12, 4),
    seed=st.integers(0, 1000),
)
def test_the_error_of_fp32_is_bounded(backend_on_path, rows, columns, ranks, magnitude, seed):
    adapters = [
        a._replace(exponent=(a.exponent[0] + magnitude, a.exponent[1]))
        for a in committed_layer(rows, columns, ranks, seed)
    ]
    initial = initial_weight(rows, columns, torch.float32, seed)
    weight = torch.full_like(initial, float("nan"))
    fold_([weight], [initial], [adapters], backend=backend_on_path)
    assert rounding_errors(weight, initial, adapters)[1] <= 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_factor_that_is_not_finite_is_named(backend_on_path, value):
    layers = [committed_layer(9, 40, [3, 5]), committed_layer(7, 33, [2])]
    initial = [initial_weight(9, 40, torch.float32), initial_weight(7, 33, torch.float32)]
    wrong = layers[0][1].B.clone()
    wrong[2, 7] = value
    layers[0][1] = layers[0][1]._replace(B=wrong, bits=torch.full_like(layers[0][1].bits, -1))
    weights = [w + 1 for w in initial]
    message = r"adapters\[0\]\[1\].B must be finite, got 1 non-finite values"
    with pytest.raises(ValueError, match=message):
        fold_(weights, initial, layers, backend=backend_on_path)
    assert all(torch.equal(w, i) for w, i in zip(weights, initial, strict=True))


def test_what_the_mask_leaves_out_may_be_anything(backend_on_path):
    """A product that overflows fp32 where M = 0 is no part of D."""
    (adapter,) = committed_layer(9, 40, [3])
    huge = adapter._replace(
        A=torch.full_like(adapter.A, 6e4), B=torch.full_like(adapter.B, 6e4), exponent=(50, 50),
        bits=torch.zeros_like(adapter.bits),
    )  # fmt: skip
    initial = initial_weight(9, 40, torch.float16)
    weight = torch.full_like(initial, float("nan"))
    fold_([weight], [initial], [[huge]], backend=backend_on_path)
    assert torch.equal(weight, initial)
