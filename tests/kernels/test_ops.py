# SPDX-License-Identifier: Apache-2.0
"""Contracts of the operations on whatever backend is the default: registration, compile, memory."""

import threading
from dataclasses import replace

import pytest
import torch
from corruptions import make_mlp
from oracle import make_problem, run
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from stamina_kernels import (
    backends,
    commit,
    cost,
    embedding_mlp,
    fold_,
    masked_linear,
    ops,
    sample_mask,
)

AVAILABLE = [name for name in ("reference", "cpu") if backends()[name] is None]


def op_arguments(problem, backend):
    def column(field):
        return [getattr(p, field) for p in problem.group]

    factors = [column(f) for f in ("A", "B", "U", "V", "b")]
    scalars = [problem.scale, problem.tau, problem.seed, problem.step]
    where = [column(f) for f in ("layer_id", "row0", "col0")]
    return factors, scalars, where, backend


@pytest.mark.parametrize("backend", AVAILABLE)
def test_opcheck(backend):
    problem = make_problem([7, 5], 37, (2, 3), bias=True).with_grad()
    factors, scalars, where, backend = op_arguments(problem, backend)
    weight = [p.weight for p in problem.group]
    bias = [p.bias for p in problem.group]
    initial = [p.weight_init for p in problem.group]
    ops = torch.ops.stamina
    opcheck(
        ops.masked_linear.default,
        (problem.x, weight, bias, *factors, initial, *scalars, *where, False, "sigmoid", backend),
    )
    factors = [[t.detach() for t in group] for group in factors]
    bits = ops.sample(*factors[2:], *scalars[2:], *where, False, backend)
    opcheck(ops.sample.default, (*factors[2:], *scalars[2:], *where, False, backend))
    opcheck(ops.compose.default, (weight, *factors[:2], bits, scalars[0], torch.bfloat16, backend))
    opcheck(
        ops.masked_linear_backward.default,
        (problem.dy, problem.x.detach(), weight, *factors, initial, bits, *scalars,
         problem.g_forget, problem.g_sparse, *where, False, "relu", True, backend),
    )  # fmt: skip
    concept = commit(*(group[0] for group in factors), scale=0.5, backend=backend)
    deltas = ([concept.A], [concept.B], [concept.scale], [concept.bits], [0, 1])
    opcheck(ops.fold_.default, ([weight[0].clone()], [weight[0]], *deltas, backend))


def train_step(problem, backend):
    p = problem.with_grad()

    def loss(x, group, scale, tau, seed, step):
        out = masked_linear(x, group, scale=scale, tau=tau, seed=seed, step=step, backend=backend)
        return (out.y * problem.dy).sum() + 0.3 * out.forget.sum() + 0.1 * out.sparse.sum()

    return p, loss


@pytest.mark.parametrize("backend", AVAILABLE)
def test_compiles_as_one_graph_and_new_steps_do_not_recompile(backend):
    problem = make_problem([8, 6], 20, (3,))
    p, loss = train_step(problem, backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    frames = []
    for step in range(4):
        scalars = (p.scale, p.tau, p.seed, torch.tensor(step))
        expected = torch.autograd.grad(loss(p.x, p.group, *scalars), p.leaves())
        got = torch.autograd.grad(compiled(p.x, p.group, *scalars), p.leaves())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames == [1, 1, 1, 1]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(backend, reentrant):
    problem = make_problem([9], 31, (4,))
    p, loss = train_step(problem, backend)
    scalars = (p.scale, p.tau, p.seed, p.step)
    plain = torch.autograd.grad(loss(p.x, p.group, *scalars), p.leaves())
    q, _ = train_step(problem, backend)
    value = torch.utils.checkpoint.checkpoint(
        loss, q.x, q.group, *scalars, use_reentrant=reentrant, preserve_rng_state=False
    )
    value.backward()
    for expected, leaf in zip(plain, q.leaves(), strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_users_dtype_and_backward_ignores_it(backend, dtype):
    problem = make_problem([8], 16, (4,))
    p = problem.with_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = masked_linear(p.x, p.group, **p.scalars(), backend=backend)
        inside = torch.autograd.grad(
            out.y.float().sum() + out.forget.sum(), p.leaves(), retain_graph=True
        )
    outside = torch.autograd.grad(out.y.float().sum() + out.forget.sum(), p.leaves())
    assert out.y.dtype == dtype and out.forget.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    lowered = masked_linear(p.x.to(dtype), p.group, **p.scalars(), backend=backend)
    assert torch.equal(lowered.y, out.y) and torch.equal(lowered.bits, out.bits)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_backward_keeps_one_bit_per_weight(backend, strided):
    problem = make_problem([320, 320], 768, (154,))
    if strided:
        by_columns = [
            p._replace(**{f: getattr(p, f).t().contiguous().t() for f in ("weight", "weight_init")})
            for p in problem.group
        ]
        problem = replace(problem, group=by_columns, x=problem.x.t().contiguous().t())
    problem = problem.with_grad()
    inputs = {
        t.untyped_storage().data_ptr() for t in problem.leaves() + list(problem.scalars().values())
    }
    for p in problem.group:
        inputs |= {t.untyped_storage().data_ptr() for t in (p.weight, p.weight_init)}
    saved = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        out = masked_linear(problem.x, problem.group, **problem.scalars(), backend=backend)
    assert out.y.requires_grad
    assert 8 * sum(saved.values()) <= 640 * 768


@pytest.mark.parametrize("backend", AVAILABLE)
def test_frozen_input_gets_no_gradient(backend):
    problem = make_problem([5], 8, (2,))
    p = problem.with_grad()
    out = masked_linear(problem.x, p.group, **p.scalars(), backend=backend)
    out.y.sum().backward()
    assert problem.x.grad is None and p.group[0].A.grad is not None


@pytest.mark.parametrize("backend", AVAILABLE)
def test_second_derivatives_raise(backend):
    p = make_problem([5], 8, (2,)).with_grad()
    out = masked_linear(p.x, p.group, **p.scalars(), backend=backend)
    (dx,) = torch.autograd.grad(out.y.square().sum(), p.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.square().sum().backward()


def test_forward_mode_derivatives_raise():
    """torch.library's autograd would leave them out: zero, and no word."""
    p = make_problem([5], 8, (2,))

    def y(x, scale=p.scale):
        return masked_linear(x, p.group, **p.scalars() | {"scale": scale}).y

    mlp = make_mlp(4, 3, 2, 2)
    calls = [
        lambda: torch.func.jvp(y, (p.x,), (p.x,)),
        lambda: torch.func.jacfwd(y)(p.x),
        lambda: torch.func.jvp(lambda E: embedding_mlp([mlp._replace(E=E)])[0], (mlp.E,), (mlp.E,)),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call()
    with torch.no_grad(), forward_ad.dual_level():
        y(p.x)
        for duals in (
            (forward_ad.make_dual(p.x, p.x),),
            (p.x, forward_ad.make_dual(*[p.scale] * 2)),
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                y(*duals)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_threads_do_not_disturb_each_other(backend):
    problems = [make_problem([24], 40, (6,), seed=s) for s in range(4)]
    expected = [run(p, backend)[3] for p in problems]
    results = {}

    def work(k):
        results[k] = run(problems[k], backend)[3]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert all(torch.equal(a, b) for a, b in zip(results[k], expected[k], strict=True))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_strided_input_gives_the_bits_of_its_contiguous_copy(backend):
    problem = make_problem([6], 14, (5,))
    wide = torch.randn(14, 5)
    p = problem.group[0]
    strided = p._replace(A=p.A.t().contiguous().t(), V=p.V.t().contiguous().t())
    a = masked_linear(wide.t(), strided, **problem.scalars(), backend=backend)
    b = masked_linear(wide.t().contiguous(), p, **problem.scalars(), backend=backend)
    assert torch.equal(a.y, b.y) and torch.equal(a.bits, b.bits)


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


@pytest.mark.parametrize("backend", AVAILABLE)
def test_strided_tensors_of_a_subclass(backend):
    problem = make_problem([6], 14, (5,))
    p = problem.group[0]
    out = masked_linear(problem.x, p, **problem.scalars(), backend=backend)
    x, A = (t.t().contiguous().t().as_subclass(Tagged) for t in (problem.x, p.A))
    tagged = masked_linear(x, p._replace(A=A), **problem.scalars(), backend=backend)
    assert torch.equal(tagged.y.as_subclass(torch.Tensor), out.y)


@pytest.mark.parametrize("backend", [*AVAILABLE, "triton"])
@pytest.mark.parametrize("strategy", ["compose", "generate"])
def test_the_operation_itself_takes_strided_tensors(backend, strategy):
    problem = make_problem([6], 14, (5,))
    out = masked_linear(problem.x, problem.group, **problem.scalars(), backend=backend)
    factors, scalars, where, backend = op_arguments(problem, backend)
    weight, initial = ([getattr(p, f) for p in problem.group] for f in ("weight", "weight_init"))
    lists = [[t.t().contiguous().t() if t.dim() else t for t in f] for f in (*factors, initial)]
    with cost.forced(strategy):
        y, *_, bits = torch.ops.stamina.masked_linear(
            problem.x.t().contiguous().t(), weight, [], *lists, *scalars, *where, False, "sigmoid",
            backend,
        )  # fmt: skip
    torch.testing.assert_close(y, out.y, rtol=0, atol=1e-5)
    assert torch.equal(bits, out.bits)


def test_fold_of_tensors_without_memory():
    p = make_problem([5], 8, (2,)).group[0]
    adapter = commit(p.A, p.B, p.U, p.V, p.b, scale=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weight = mode.from_tensor(p.weight)
        fold_([weight], [mode.from_tensor(p.weight_init)], [[adapter]])
    assert weight.shape == p.weight.shape


def test_step_counts_modulo_two_to_the_32():
    p = make_problem([8], 40, (1,)).group[0]
    seed = torch.tensor(3)
    masks = [sample_mask(p, seed=seed, step=torch.tensor(t)) for t in (5, 5 + (1 << 32), 6)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_eager_calls_equal_the_registered_operation(monkeypatch, bias, initial):
    problem = make_problem([9, 14], 33, (2, 3), bias=bias, initial=initial)
    short = run(problem, "reference")
    monkeypatch.setattr(ops, "_is_plain_eager", lambda tensors: False)
    for got, expected in zip(short, run(problem, "reference"), strict=True):
        pairs = zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_without_gradients_a_call_gives_the_same_bits(backend):
    problem = make_problem([7, 5], 37, (2, 3), bias=True).with_grad()
    scalars = {name: getattr(problem, name) for name in ("scale", "tau", "seed", "step")}

    def call():
        return masked_linear(problem.x, problem.group, **scalars, backend=backend)

    trained = call()
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            drawn = call()
        assert all(torch.equal(a, b) for a, b in zip(drawn, trained, strict=True))
        assert not any(t.requires_grad for t in drawn)
