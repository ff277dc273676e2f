# SPDX-License-Identifier: Apache-2.0
"""Backend `cuda` against the fp64 oracle and the reference's bits.

The kernels run on a GPU where one is at hand, and everywhere on the CPU, compiled from the same
source (`emulated.py`).
"""

from dataclasses import replace

import pytest
import torch
from corruptions import make_mlp
from oracle import FACTORS, assert_as_accurate, make_problem, oracle, product_eps, run, shifted
from test_mask_agreement import assert_only_the_threshold_differs
from test_triton import hold_missing_logits, mixed_group, on_device

from stamina_kernels import (
    EmbeddingMLP,
    commit,
    compose,
    cuda,
    embedding_mlp,
    masked_linear,
    sample_mask,
    triton,
    unpack_bits,
)
from stamina_kernels.reference import pack_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLED = {"hard": False, "sparse_kind": "sigmoid"}
HARD = {"hard": True, "sparse_kind": "relu"}


def hold_forward(problem, device, mode=SAMPLED):
    """Y, the scalars and the counts against fp64, with the bits that were drawn."""
    moved = on_device(problem, device)
    out = masked_linear(moved.x, moved.group, **moved.scalars(), **mode, backend="cuda")
    y, forget, sparse, counts, bits = (t.cpu() for t in out)
    exact = oracle(problem, bits=bits, **mode)
    eager = oracle(problem, bits=bits, dtype=torch.float32, **mode)
    results = zip(("y", "forget", "sparse"), (y, forget, sparse), eager, exact, strict=False)
    allowed = product_eps(problem.x.dtype, device)
    for name, got, base, truth in results:
        assert_as_accurate(name, got, base, truth, allowed)
    columns, first = problem.x.shape[-1], 0
    assert torch.equal(bits, pack_bits(unpack_bits(bits, columns))), "padding must be zero"
    for k, p in enumerate(problem.group):
        kept = unpack_bits(bits[first : first + p.weight.shape[0]], columns)
        changed = p.weight != (p.weight if p.weight_init is None else p.weight_init)
        assert counts[k].tolist() == [kept.sum(), (kept & changed).sum()]
        first += p.weight.shape[0]
    return bits


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_on_odd_sizes(cuda_device, dtype, mode):
    problem = make_problem([33, 7], 123, (2, 3), dtype=dtype, bias=True, rank=5, mask_rank=3)
    hold_forward(problem, cuda_device, mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_on_aligned_sizes(cuda_device, dtype):
    """16-byte copies; more rows than a task has."""
    hold_forward(make_problem([136], 160, (3,), dtype=dtype, rank=16, mask_rank=16), cuda_device)


@pytest.mark.parametrize(("rank", "mask_rank"), [(1, 128), (16, 33), (128, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranks(cuda_device, dtype, rank, mask_rank):
    problem = make_problem([40], 40, (3,), dtype=dtype, rank=rank, mask_rank=mask_rank)
    hold_forward(problem, cuda_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_of_mixed_shapes_ranks_and_dtypes(cuda_device, dtype):
    hold_forward(mixed_group(dtype), cuda_device)


def test_without_earlier_concepts_and_without_tokens(cuda_device):
    hold_forward(make_problem([9], 40, (0,), initial=False), cuda_device)


def test_more_members_than_a_launch_holds(cuda_device):
    problem = make_problem([3] * 41, 20, (2,), rank=2, mask_rank=2)
    hold_forward(problem, cuda_device)


def draw(problem, backend, hard):
    arguments = {"seed": problem.seed, "step": problem.step, "hard": hard, "backend": backend}
    return sample_mask(problem.group, **arguments).cpu()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("col0", "mask_rank"), [(0, 16), (6, 16), (6, 20), (3, 1)])
# the second of these is regular at column 0 and rank 16
@pytest.mark.parametrize("shape", [(70, 165), (64, 128)])
def test_bits_equal_the_reference_off_the_threshold(cuda_device, hard, col0, mask_rank, shape):
    rows, columns = shape
    problem = make_problem([rows], columns, (1,), mask_rank=mask_rank)
    # rows and columns beyond 31 bits
    p = problem.group[0]._replace(row0=(1 << 32) - rows, col0=(1 << 33) + col0)
    problem = replace(problem, group=[p], step=torch.tensor((1 << 32) + 5))
    bits = draw(on_device(problem, cuda_device), "cuda", hard)
    expected = draw(problem, "reference", hard)
    assert_only_the_threshold_differs(p, problem.seed, problem.step, hard, bits, expected)


def test_extreme_and_missing_logits(cuda_device):
    problem = make_problem([4], 64, (2,), mask_rank=1)
    for logit, density in ((-500.0, 0), (500.0, 4 * 64), (float("nan"), 0)):
        p = problem.group[0]._replace(U=torch.zeros(4, 1), b=torch.tensor(logit))
        bits = draw(on_device(replace(problem, group=[p]), cuda_device), "cuda", False)
        assert int(unpack_bits(bits, 64).sum()) == density


def test_missing_logits_are_seen(cuda_device):
    hold_missing_logits(make_problem([5], 14, (3,)), "cuda", cuda_device)


def hold_effective(got, p, mask):
    """W_eff of a member at scale 0.5 against fp64."""
    eager = (p.weight.float() + 0.5 * mask * (p.A @ p.B)).to(got.dtype)
    exact = p.weight.double() + 0.5 * mask * (p.A.double() @ p.B.double())
    assert_as_accurate("W_eff", got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compose_is_one_rounding_and_the_forward_uses_it(cuda_device, dtype):
    problem = mixed_group(dtype)
    eye = torch.eye(70, dtype=dtype)
    moved = on_device(replace(problem, x=eye), cuda_device)
    out = masked_linear(moved.x, moved.group, **moved.scalars(), backend="cuda")
    got = compose(moved.group, out.bits, scale=moved.scale, dtype=dtype, backend="cuda").cpu()
    assert torch.equal(out.y.cpu().t(), got)
    first, mask = 0, unpack_bits(out.bits.cpu(), 70)
    for p in problem.group:
        rows = slice(first, first + p.weight.shape[0])
        hold_effective(got[rows], p, mask[rows])
        first = rows.stop


def test_weights_at_odd_addresses_give_the_same_bits(cuda_device):
    problem = on_device(make_problem([20], 48, (5,), dtype=torch.float16), cuda_device)
    weight = problem.group[0].weight
    results = [
        compose(
            [problem.group[0]._replace(weight=w)],
            torch.full((20, 2), 0x5A5A5A5A, dtype=torch.int32, device=cuda_device),
            scale=problem.scale,
            backend="cuda",
        )
        for w in (weight, shifted(weight))
    ]
    assert torch.equal(*results)


def hold_regular_to_general(problem, mode):
    """Bits, statistics and W_eff of regular members are those at other addresses; the bits."""
    other = [p._replace(weight=shifted(p.weight)) for p in problem.group]
    results = [
        [*out, compose(group, out.bits, scale=problem.scale, backend="cuda")]
        for group in (problem.group, other)
        for out in [masked_linear(problem.x, group, **problem.scalars(), **mode, backend="cuda")]
    ]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    return results[0][-2].cpu()


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("initial", [True, False])
def test_regular_launches_give_the_bits_of_others(cuda_device, initial, dtype, mode):
    sizes = {"rank": 16, "mask_rank": 16, "dtype": dtype, "initial": initial}
    problem = make_problem([96, 160], 256, (3,), **sizes)
    hold_forward(problem, cuda_device, mode)
    regular = on_device(problem, cuda_device)
    bits = hold_regular_to_general(regular, mode)
    assert torch.equal(draw(regular, "cuda", mode["hard"]), bits), "alone and with W_eff"


ONE_THING = {
    "rows": {"out_features": [72, 64]},
    "columns": {"in_features": 160},
    "rank": {"rank": 12},
    "mask_rank": {"mask_rank": 20},
    "dtype": {"weight_dtype": torch.float32},
    "weight": {},
    "weight_init": {},
}


@pytest.mark.parametrize("thing", ONE_THING)
def test_members_that_are_regular_but_for_one_thing(cuda_device, thing):
    sizes = {"out_features": [64, 64], "in_features": 128, "rank": 16, "mask_rank": 16}
    problem = make_problem(batch=(3,), dtype=torch.bfloat16, **sizes | ONE_THING[thing])
    first, second = problem.group
    if not ONE_THING[thing]:
        first = first._replace(**{thing: shifted(getattr(first, thing))})
    hold_forward(replace(problem, group=[first, second]), cuda_device)


def test_tasks_of_several_tiles(cuda_device):
    """Only groups of 512 tasks have any. Regular, and ranks that are copied anew for every tile."""
    problem = make_problem([96], 512 * 128, (2,), rank=16, mask_rank=16, dtype=torch.bfloat16)
    bits, moved, (p,) = (
        hold_forward(problem, cuda_device),
        on_device(problem, cuda_device),
        problem.group,
    )
    got = compose(moved.group, bits.to(cuda_device), scale=moved.scale, backend="cuda").cpu()
    hold_effective(got, p, unpack_bits(bits, p.weight.shape[1]))
    hold_forward(make_problem([40] * 512, 8, (2,), rank=20, mask_rank=20), cuda_device)


def test_two_runs_are_bit_equal(cuda_device):
    problem = on_device(make_problem([40, 9], 160, (3,), dtype=torch.float16), cuda_device)
    first, second = (
        masked_linear(problem.x, problem.group, **problem.scalars(), backend="cuda")
        for _ in range(2)
    )
    for got, again in zip(first, second, strict=True):
        assert torch.equal(got, again)


def test_commit_equals_the_reference(cuda_device):
    p = make_problem([40], 90, (1,)).group[0]
    factors = [getattr(p, f) for f in FACTORS]
    ours = commit(*(f.to(cuda_device) for f in factors), scale=1.0, backend="cuda")
    expected = commit(*factors, scale=1.0, backend="reference")
    assert ours.exponent == expected.exponent
    assert torch.equal(ours.A.cpu(), expected.A) and torch.equal(ours.B.cpu(), expected.B)
    zero = torch.tensor(0)
    assert_only_the_threshold_differs(p, zero, zero, True, ours.bits.cpu(), expected.bits)


def test_gradients_and_dx_with_the_bits_of_the_forward(cuda_device):
    """In fp32 the contraction is backend `triton`'s."""
    pytest.importorskip("triton")
    problem = make_problem([20], 40, (5,))
    *_, gradients, bits = run(on_device(problem, cuda_device), "cuda")
    exact = oracle(problem, bits=bits.cpu())[3]
    eager = oracle(problem, bits=bits.cpu(), dtype=torch.float32)[3]
    for name, got, base, truth in zip("xABUV", gradients, eager, exact, strict=False):
        assert_as_accurate(f"d{name}", got.cpu(), base, truth)


def test_without_triton_the_backward_says_so(cuda_device, monkeypatch):
    monkeypatch.setattr("stamina_kernels.triton.unavailable_reason", lambda: "no Triton")
    monkeypatch.setattr(cuda, "_contraction", cuda._contraction.__wrapped__)
    problem = on_device(make_problem([4], 8, (2,)), cuda_device)
    with pytest.raises(RuntimeError, match="of this group from backend 'triton'.*no Trit"):
        run(problem, "cuda")


@pytest.mark.gpu
def test_graph_capture():
    problem = on_device(make_problem([40, 9], 160, (3,), dtype=torch.bfloat16), "cuda")

    def forward():
        return masked_linear(problem.x, problem.group, **problem.scalars(), backend="cuda")

    with torch.no_grad():
        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward()
        problem.step.add_(1)
        graph.replay()
        expected = forward()
    for got, again in zip(captured, expected, strict=True):
        assert torch.equal(got, again)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_mlps_are_tritons_or_where_it_cannot_run_the_references(
    cuda_device, monkeypatch, caplog, name
):
    if name == "reference":
        monkeypatch.setattr(triton, "unavailable_reason", lambda: "not today")
    # what was found before is remembered
    monkeypatch.setattr(cuda, "_triton_or_reference", cuda._triton_or_reference.__wrapped__)
    mlp = make_mlp(37, 5, 9, 4, transposed=True)
    given = EmbeddingMLP(*(t.to(cuda_device).requires_grad_() for t in mlp[:5]), mlp.transposed)
    caplog.set_level("INFO", "stamina_kernels.cuda")
    results = {}
    for backend in ("cuda", name):
        (y,) = embedding_mlp([given], backend=backend)
        results[backend] = [y, *torch.autograd.grad(y.square().sum(), given[:5])]
    for got, wanted in zip(results["cuda"], results[name], strict=True):
        assert torch.equal(got, wanted)
    assert f"of backend 'cuda' is that of {name!r}" in caplog.text
