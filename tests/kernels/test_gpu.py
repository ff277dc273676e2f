# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows of its backends: bits at size, graphs, compiled steps, streams, memory."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_as_accurate, make_problem, oracle, product_eps, run
from test_mask_agreement import assert_only_the_threshold_differs
from test_triton import on_device

from stamina_kernels import backends, masked_linear, sample_mask

pytestmark = pytest.mark.gpu
PARTS = ("y", "forget", "sparse", "counts", "bits")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


def kv_pair(dtype=torch.bfloat16, rows=1280, columns=2048, tokens=154):
    """K and V of one block of SDXL."""
    return make_problem([rows, rows], columns, (tokens,), rank=16, mask_rank=16, dtype=dtype)


def train_step(problem, backend, p=None):
    """Outputs and gradients of one step; both regularisers take part."""
    p = p or problem.with_grad()
    out = masked_linear(p.x, p.group, **problem.scalars(), backend=backend)
    loss = (out.y * problem.dy).sum() + 0.3 * out.forget.sum() + 0.01 * out.sparse.sum()
    return [
        *(getattr(out, name).detach() for name in PARTS),
        *torch.autograd.grad(loss, p.leaves()),
    ]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hard", [False, True])
def test_bits_of_millions_of_weights_are_the_references(backend, hard):
    p = make_problem([2051], 2048, (1,), rank=1, mask_rank=16, initial=False).group[0]
    p = p._replace(row0=3 << 30, col0=(3 << 32) + 8)
    seed, step = torch.tensor(-(1 << 40)), torch.tensor((1 << 33) + 3)
    expected = sample_mask(p, seed=seed, step=step, hard=hard, backend="reference")
    moved = type(p)(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in p))
    where = {"seed": seed.cuda(), "step": step.cuda(), "hard": hard}
    bits = sample_mask(moved, **where, backend=backend).cpu()
    assert_only_the_threshold_differs(p, seed, step, hard, bits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_block_against_the_oracle(backend, dtype):
    problem = kv_pair(dtype, rows=640, columns=768)
    y, forget, sparse, gradients, bits = run(on_device(problem, "cuda"), backend)
    exact = oracle(problem, bits=bits.cpu())
    eager = oracle(problem, bits=bits.cpu(), dtype=torch.float32)
    allowed = product_eps(dtype, "cuda")
    for name, got, base, truth in zip("yfs", (y, forget, sparse), eager, exact, strict=False):
        assert_as_accurate(name, got.cpu(), base, truth, allowed)
    for got, base, truth in zip(gradients, eager[3], exact[3], strict=True):
        if got.dim():
            assert_as_accurate("gradient", got.cpu(), base, truth, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_steps_are_bit_equal(backend, dtype):
    problem = on_device(kv_pair(dtype), "cuda")
    assert_equal(train_step(problem, backend), train_step(problem, backend))


def test_a_captured_step_draws_anew_when_it_is_replayed(backend):
    problem = on_device(kv_pair(), "cuda")
    p = problem.with_grad()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train_step(problem, backend, p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train_step(problem, backend, p)
    bits = []
    for _ in range(2):
        problem.step.add_(1)
        graph.replay()
        bits.append(captured[PARTS.index("bits")].clone())
        assert_equal(captured, train_step(problem, backend, p))
    assert not torch.equal(*bits)


def test_a_step_compiles_as_one_graph_and_new_steps_do_not_recompile(backend):
    problem = on_device(kv_pair(torch.float32, rows=64, columns=96, tokens=5), "cuda")
    p = problem.with_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss(x, group, step):
        scalars = problem.scalars() | {"step": step}
        out = masked_linear(x, group, **scalars, backend=backend)
        return (out.y * problem.dy).sum() + 0.3 * out.forget.sum() + 0.01 * out.sparse.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for number in range(3):
        step = torch.tensor(number, device="cuda")
        expected = torch.autograd.grad(loss(p.x, p.group, step), p.leaves())
        got = torch.autograd.grad(compiled(p.x, p.group, step), p.leaves())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_work_on_another_stream(backend):
    """Launches go to the current stream: behind work that has not ended, they see its results."""
    problem = on_device(kv_pair(), "cuda")
    expected = train_step(problem, backend)
    late = replace(problem, x=torch.zeros_like(problem.x))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.x.copy_(problem.x)
        got = train_step(late, backend)
    torch.cuda.synchronize()
    assert_equal(got, expected)


def test_a_step_keeps_one_bit_per_weight(backend):
    problem = on_device(kv_pair(), "cuda")
    p = problem.with_grad()
    train_step(problem, backend, p)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = masked_linear(p.x, p.group, **problem.scalars(), backend=backend)
    inputs = {t.untyped_storage().data_ptr() for t in p.leaves() + list(problem.scalars().values())}
    inputs |= {t.untyped_storage().data_ptr() for q in p.group for t in (q.weight, q.weight_init)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = sum(size for address, size in storages.items() if address not in inputs)
    assert own <= 2 * 1280 * 2048 / 8
    assert out.bits.numel() * 4 == 2 * 1280 * 2048 / 8
