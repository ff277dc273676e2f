# SPDX-License-Identifier: Apache-2.0
"""Random shapes, ranks, dtypes and modes: every backend that runs here keeps the contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import make_problem
from test_reference import committed, hold_against_oracle

from stamina_kernels import backends, compose, fold_, masked_linear, sample_mask, unpack_bits
from stamina_kernels.philox import uniform
from stamina_kernels.reference import mask_logits

AVAILABLE = [name for name in ("reference", "cpu") if backends()[name] is None]

problems = st.fixed_dictionaries(
    {
        "out_features": st.lists(st.integers(1, 90), min_size=1, max_size=3),
        "in_features": st.integers(1, 200),
        "batch": st.sampled_from([(1,), (17,), (2, 5), (3, 1, 4)]),
        "rank": st.integers(1, 40),
        "mask_rank": st.integers(1, 40),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "bias": st.booleans(),
        "initial": st.booleans(),
        "tau": st.sampled_from([0.5, 1.0, 2.0]),
        "seed": st.integers(0, 1000),
    }
)
modes = st.fixed_dictionaries(
    {"hard": st.booleans(), "sparse_kind": st.sampled_from(["sigmoid", "relu"])}
)


@pytest.mark.parametrize("backend", AVAILABLE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems, mode=modes)
def test_accuracy_rule(backend, problem, mode):
    hold_against_oracle(make_problem(**problem), mode, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_product_that_overflows_where_the_mask_is_zero_changes_nothing(backend):
    problem = make_problem([9, 5], 40, (3,), bias=True)
    group = [p._replace(A=p.A * 1e30, B=p.B * 1e30, b=torch.tensor(-1e3)) for p in problem.group]
    assert not torch.isfinite(group[0].A @ group[0].B).all()
    out = masked_linear(problem.x, group, **problem.scalars(), hard=True, backend=backend)
    still = [p._replace(A=0 * p.A) for p in group]
    expected = masked_linear(problem.x, still, **problem.scalars(), hard=True, backend=backend)
    assert torch.equal(out.y, expected.y)
    assert torch.equal(out.forget, torch.zeros(2))
    effective = compose(group, out.bits, scale=problem.scale, backend=backend)
    assert torch.equal(effective, torch.cat([p.weight for p in group]))


@pytest.mark.parametrize("backend", AVAILABLE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 300),
    rank=st.integers(1, 64),
    row0=st.integers(0, (1 << 32) - 60),
    col0=st.integers(0, (1 << 34) - 300),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    step=st.integers(0, (1 << 63) - 1),
    layer_id=st.integers(0, (1 << 32) - 1),
)
def test_bits_are_the_documented_function(
    backend, rows, columns, rank, row0, col0, seed, step, layer_id
):
    p = make_problem([rows], columns, (1,), mask_rank=rank).group[0]
    p = p._replace(row0=row0, col0=col0, layer_id=layer_id)
    where = {"seed": torch.tensor(seed), "step": torch.tensor(step)}
    mask = unpack_bits(sample_mask(p, **where, backend=backend), columns)
    u = uniform(
        *where.values(), layer_id, range(row0, row0 + rows), range(col0, col0 + columns)
    ).double()
    keep = torch.sigmoid(mask_logits(p.U.double(), p.V.double(), p.b.double()))
    # a chain of rank + 1 fp32 roundings, the slope of the sigmoid is at most 1/4, and one more
    # rounding on either side of the comparison
    magnitude = p.U.double().abs() @ p.V.double().abs() + p.b.double().abs()
    doubtful = 2.0**-24 * ((rank + 1) * magnitude / 4 + 4)
    decided = (u - keep).abs() > doubtful
    assert torch.equal(mask[decided], (u < keep)[decided])
    assert decided.double().mean() > 0.99


@pytest.mark.parametrize("backend", AVAILABLE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    order=st.permutations(range(4)),
    kept=st.integers(0, 4),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 80)),
)
def test_unfolding_in_any_order_is_folding_the_rest(backend, dtype, order, kept, shape):
    adapters = committed(*shape, 3, 4)
    initial = make_problem([shape[0]], shape[1], (1,), dtype=dtype).group[0].weight
    weight, expected = initial.clone(), initial.clone()
    for count in range(4, kept - 1, -1):
        present = sorted(order[:count])
        fold_([weight], [initial], [[adapters[t] for t in present]], backend=backend)
    rest = [adapters[t] for t in sorted(order[:kept])]
    fold_([expected], [initial], [rest], backend=backend)
    assert torch.equal(weight, expected)
