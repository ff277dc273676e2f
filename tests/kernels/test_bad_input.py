# SPDX-License-Identifier: Apache-2.0
"""Exactly one wrong argument of any public function: an exception names it, memory is unchanged."""

import re

import pytest
import torch
from corruptions import corruptions, tensors_of, valid_call
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import make_problem

from stamina_kernels import backends, checks, fold_, masked_linear

FUNCTIONS = ("masked_linear", "sample_mask", "compose", "commit", "fold_", "embedding_mlp")
AVAILABLE = [name for name in ("reference", "cpu") if backends()[name] is None]
SIZES = {"rows": 6, "columns": 10, "rank": 4, "mask_rank": 3, "dtype": torch.float32}


def bits_of(call):
    dense = [t.detach() for t in tensors_of(call.arguments) if t.layout == torch.strided]
    return [t.flatten().clone().view(torch.uint8) for t in dense]


def complaint(corruption, backend):
    """None where the call was refused as it should be, else what went wrong."""
    before = bits_of(corruption.call)
    try:
        corruption.call(backend)
    except (ValueError, TypeError) as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in corruption.names)
        verdict = None if named else f"the message names none of {corruption.names}: {error}"
    except Exception as error:
        verdict = f"raised {type(error).__name__}: {error}"
    else:
        verdict = "was accepted"
    for old, new in zip(before, bits_of(corruption.call), strict=True):
        if not torch.equal(old, new):
            return f"changed memory, and {verdict}"
    return verdict


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_corruption_of_one_call(function, backend):
    call = valid_call(function, **SIZES)
    call(backend)
    cases = corruptions(call)
    assert len(cases) > 50
    found = {c.label: complaint(c, backend) for c in cases}
    wrong = [f"{label}: {verdict}" for label, verdict in found.items() if verdict]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}", *wrong])


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    rank=st.integers(1, 20),
    mask_rank=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    backend=st.sampled_from(AVAILABLE),
)
def test_one_corruption_of_any_call(function, data, rows, columns, rank, mask_rank, dtype, backend):
    call = valid_call(
        function, rows=rows, columns=columns, rank=rank, mask_rank=mask_rank, dtype=dtype
    )
    call(backend)
    corruption = data.draw(st.sampled_from(corruptions(call)))
    assert complaint(corruption, backend) is None, corruption.label


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "initial"), [(False, False), (True, True)])
def test_a_valid_call_passes_by_the_first_condition(dtype, bias, initial, monkeypatch):
    """Every layer of a model calls this in every step: what names a defect is not asked."""
    monkeypatch.delattr(checks, "_check_projection")
    problem = make_problem([6, 4], 10, (3,), dtype=dtype, bias=bias, initial=initial)
    masked_linear(problem.x, problem.group, **problem.scalars())


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(
    "name", ["x", "weight", "A", "B", "U", "V", "b", "weight_init", "seed", "step", "scale", "tau"]
)
def test_backward_refuses_what_was_changed_since_the_forward(backend, name):
    problem = make_problem([6, 4], 10, (3,)).with_grad()
    scalars = {k: v.clone() for k, v in problem.scalars().items()}
    out = masked_linear(problem.x, problem.group, **scalars, backend=backend)
    changed = problem.x if name == "x" else scalars.get(name)
    with torch.no_grad():
        (getattr(problem.group[0], name) if changed is None else changed).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.y.sum().backward()
    assert all(leaf.grad is None for leaf in problem.leaves())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_backward_refuses_gradients_that_do_not_fit_the_output(backend):
    problem = make_problem([6], 10, (3,)).with_grad()
    out = masked_linear(problem.x, problem.group, **problem.scalars(), backend=backend)
    for wrong in (torch.ones(3, 7), torch.ones(4, 6), torch.ones(3, 6, device="meta")):
        with pytest.raises(RuntimeError):
            out.y.backward(wrong, retain_graph=True)
        assert all(leaf.grad is None for leaf in problem.leaves())
    out.y.backward(torch.ones(3, 6))
    assert all(leaf.grad is not None for leaf in problem.leaves())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_fold_accepts_neighbours_in_one_buffer_and_shared_inputs(backend):
    """Weights of a model often are slices of one buffer; layers may start from the same weight."""
    buffer = torch.full((3, 5, 7), float("nan"))
    initial = torch.randn(5, 7)
    fold_([buffer[0], buffer[2]], [initial, initial], [[], []], backend=backend)
    assert torch.equal(buffer[0], initial) and torch.equal(buffer[2], initial)
    fold_([buffer[1]], [buffer[0]], [[]], backend=backend)
    assert torch.equal(buffer[1], initial)
