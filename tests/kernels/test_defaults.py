# SPDX-License-Identifier: Apache-2.0
"""What a program sets for itself changes no result; what is changed in place is known."""

import pytest
import torch
from emulated import emulated
from oracle import make_problem, run

from stamina_kernels import commit, fold_, masked_linear
from stamina_kernels.triton import launch

BACKENDS = ["reference", "cpu", "triton"]


def _everything(problem, backend):
    y, forget, sparse, gradients, bits = run(problem, backend)
    p = problem.group[0]
    adapter = commit(p.A, p.B, p.U, p.V, p.b, scale=0.7, backend=backend)
    W = torch.empty_like(p.weight)
    fold_([W], [p.weight.detach()], [[adapter]], backend=backend)
    return [y, forget, sparse, bits, W, *(g for g in gradients if g is not None)]


@pytest.fixture(params=[*BACKENDS, "cuda"])
def problem_of(request):
    """Backend, and what makes the problem; that of `cuda` is one its own backward serves."""
    if request.param != "cuda":
        yield request.param, lambda: make_problem([9, 5], 35, (6,))
        return
    with emulated():
        ranks = {"rank": 16, "mask_rank": 16}
        yield "cuda", lambda: make_problem([16, 8], 40, (6,), dtype=torch.bfloat16, **ranks)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_bit(problem_of, default):
    backend, make = problem_of
    expected = _everything(make(), backend)
    problem = make()
    torch.set_default_dtype(default)
    try:
        found = _everything(problem, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_default_device_changes_nothing(problem_of):
    backend, make = problem_of
    expected, problem = _everything(make(), backend), make()
    launch._tile_table.cache_clear()
    with torch.device("meta"):
        found = _everything(problem, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fold_between_forward_and_backward_is_noticed(backend):
    problem = make_problem([9], 35, (6,))
    (p,) = problem.group
    x = problem.x.detach().clone().requires_grad_()
    out = masked_linear(
        x, [p], scale=problem.scale, tau=problem.tau, seed=problem.seed, step=problem.step,
        backend=backend,
    )  # fmt: skip
    fold_([p.weight], [torch.zeros_like(p.weight)], [[]], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.y.sum().backward()
