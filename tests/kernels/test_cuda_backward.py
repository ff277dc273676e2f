# SPDX-License-Identifier: Apache-2.0
"""Backend `cuda`: the factors' gradients by its own kernel, emulated on the CPU and on a GPU.

Emulated twice: as a GPU of compute capability 9.0 runs it, and as the others do, whose blocks have
less shared memory, with warps and blocks in the reverse order. Strips are of up to four tiles,
which on a GPU takes groups of 512 tasks.
"""

from dataclasses import replace

import pytest
import torch
from emulated import cuda_on, emulated
from oracle import assert_as_accurate, make_problem, oracle, run, shifted
from test_cuda import HARD, SAMPLED
from test_triton import cancelled, hold_missing_logits, on_device

from stamina_kernels import cuda

DTYPES = [torch.bfloat16, torch.float16]
RANKS = {"rank": 16, "mask_rank": 16}
# Products on the matrix units have 16 bits of their fp32 operands.
PRODUCT_EPS = 2.0**-16


@pytest.fixture(params=[(9, 2), (8, 2, 1), pytest.param("gpu", marks=pytest.mark.gpu)], ids=str)
def own_kernel(request, monkeypatch):
    """Where the kernel runs; another backend's must not be asked."""

    def refuse():
        raise AssertionError("the gradients were left to another backend")

    monkeypatch.setattr(cuda, "_contraction", refuse)
    with cuda_on(request.param) as device:
        yield device


def hold_gradients(problem, device, mode=SAMPLED):
    """Every factor's gradient against fp64."""
    *_, gradients, bits = run(on_device(problem, device), "cuda", **mode)
    gradients, bits = [g.cpu() for g in gradients], bits.cpu()
    exact = oracle(problem, bits=bits, **mode)[3]
    eager = oracle(problem, bits=bits, dtype=torch.float32, **mode)[3]
    magnitudes = iter(cancelled(problem, bits, mode))
    for k, (got, base, truth) in enumerate(zip(gradients[1:], eager[1:], exact[1:], strict=True)):
        name = f"d{'ABUVb'[k % 5]}[{k // 5}]"
        if got.dim() == 0:
            # a sum that may be a small difference: a few eps of each term instead
            assert abs(got - truth) <= 2 * abs(base - truth) + 4 * PRODUCT_EPS * next(magnitudes), (
                name
            )
        else:
            assert_as_accurate(name, got, base, truth, PRODUCT_EPS)


def test_missing_logits_are_seen(own_kernel):
    problem = make_problem([24], 40, (3,), dtype=torch.bfloat16, **RANKS)
    hold_missing_logits(problem, "cuda", own_kernel)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("sparse_kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles(own_kernel, dtype, hard, sparse_kind, initial):
    problem = make_problem([64, 128], 128, (40,), dtype=dtype, initial=initial, **RANKS)
    hold_gradients(problem, own_kernel, {"hard": hard, "sparse_kind": sparse_kind})


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
# ranks that take vectors and that do not; rows and columns that end within a tile, a warp, 16
@pytest.mark.parametrize(("rank", "mask_rank"), [(4, 7), (1, 16), (15, 12)])
@pytest.mark.parametrize("shape", [(72, 152), (8, 8), (40, 264)])
def test_tiles_that_are_not_whole(own_kernel, shape, rank, mask_rank, mode):
    rows, columns = shape
    sizes = {"rank": rank, "mask_rank": mask_rank, "dtype": torch.bfloat16}
    hold_gradients(make_problem([rows, 24], columns, (3, 11), **sizes), own_kernel, mode)


# none, and what ends before, at and after the steps of 32 that are in flight at a time
@pytest.mark.parametrize("tokens", [0, 1, 32, 33, 64, 96, 130])
def test_tokens(own_kernel, tokens):
    problem = make_problem([136], 40, (tokens,), dtype=torch.bfloat16, **RANKS)
    hold_gradients(problem, own_kernel)


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_temperatures(own_kernel, tau, mode):
    hold_gradients(
        make_problem([64], 64, (5,), dtype=torch.float16, tau=tau, **RANKS), own_kernel, mode
    )


def test_shards(own_kernel):
    """Rows and columns beyond 31 bits, and blocks of the stream that begin in a tile's middle."""
    problem = make_problem([64], 72, (5,), dtype=torch.bfloat16, **RANKS)
    p = problem.group[0]._replace(row0=(1 << 32) - 64, col0=(1 << 33) + 12)
    hold_gradients(replace(problem, group=[p], step=torch.tensor((1 << 32) + 5)), own_kernel)


def test_more_members_than_a_launch_holds(own_kernel):
    problem = make_problem([8] * 38, 16, (2,), dtype=torch.bfloat16, **RANKS)
    # so large that the forget term is most of every gradient
    hold_gradients(replace(problem, g_forget=1e4 * problem.g_forget), own_kernel)


def test_more_tasks_than_a_warp_has_lanes(own_kernel):
    hold_gradients(make_problem([8], 33 * 128 + 8, (2,), dtype=torch.bfloat16, **RANKS), own_kernel)


def test_factors_at_odd_addresses_give_the_same_bits(own_kernel):
    problem = on_device(make_problem([40], 136, (9,), dtype=torch.bfloat16, **RANKS), own_kernel)
    p = problem.group[0]
    moved = p._replace(**{f: shifted(getattr(p, f)) for f in "ABUV"})
    results = []
    for member in (p, moved):
        lists = [[getattr(member, f)] for f in ("weight", *"ABUVb", "weight_init")]
        bits = torch.full((40, 5), 0x5A5A5A5A, dtype=torch.int32, device=own_kernel)
        arguments = (bits, *problem.scalars().values(), problem.g_forget, problem.g_sparse)
        results.append(
            cuda.masked_linear_backward(
                problem.dy, problem.x, *lists, *arguments, [1], [0], [0], False, "sigmoid", False
            )[1]
        )
    assert torch.equal(*results)


def test_strips_of_several_tiles(own_kernel):
    rows, columns = ([136, 328], 136) if own_kernel == "cpu" else ([136] * 512, 8)
    problem = make_problem(rows, columns, (40,), dtype=torch.bfloat16, **RANKS)
    hold_gradients(problem, own_kernel)


@pytest.mark.parametrize("hard", [False, True])
def test_logits_far_from_zero(own_kernel, hard):
    """Slopes end at zero, not at infinity over infinity; a logit that is none is passed on."""
    problem = make_problem([8], 64, (2,), dtype=torch.bfloat16, **RANKS)
    for logit in (-1e30, -500.0, -60.0, 60.0, 500.0, 1e30):
        p = problem.group[0]._replace(U=torch.zeros(8, 16), b=torch.tensor(logit))
        far = replace(problem, group=[p])
        *_, (_, _, _, dU, dV, db), _ = run(
            on_device(far, own_kernel), "cuda", hard=hard, sparse_kind="sigmoid"
        )
        for gradient in (dU, dV, db):
            # one rounding of z, 2^-24, for 64 columns of |s G P V| < 10
            assert gradient.abs().max() <= 64 * 10 * 2.0**-24, logit
    p = problem.group[0]._replace(U=torch.zeros(8, 16), b=torch.tensor(0.0))
    zero = replace(problem, group=[p], dy=0 * problem.dy, g_forget=0 * problem.g_forget)
    *_, gradients, _ = run(on_device(zero, own_kernel), "cuda", hard=hard, sparse_kind="relu")
    assert gradients[5] == 0, "relu has no slope at zero"
    p = problem.group[0]._replace(b=torch.tensor(float("nan")))
    *_, gradients, _ = run(on_device(replace(problem, group=[p]), own_kernel), "cuda", hard=hard)
    assert gradients[3].isnan().all() and gradients[5].isnan()


def test_two_runs_are_bit_equal(own_kernel):
    problem = make_problem([136, 64], 264, (70,), dtype=torch.bfloat16, **RANKS)
    first, second = (run(on_device(problem, own_kernel), "cuda")[3] for _ in range(2))
    for got, again in zip(first[1:], second[1:], strict=True):
        assert torch.equal(got, again)


OTHERS = {
    "dtype": {"dtype": torch.float32},
    "weight_dtype": {"weight_dtype": torch.float32},
    "rank": {"rank": 17},
    "mask_rank": {"mask_rank": 17},
    "rows": {"out_features": [8, 12]},
    "columns": {"in_features": 12},
    "col0": {},
    "unequal ranks": {},
    "unequal mask ranks": {},
    "weight": {},
    "weight_init": {},
    "x": {},
}


@pytest.mark.parametrize("thing", OTHERS)
def test_groups_that_are_tritons(thing, monkeypatch):
    """One thing that the kernel does not serve; what it would misread never reaches it."""
    sizes = {"out_features": [8, 16], "in_features": 16, "dtype": torch.float16, **RANKS}
    problem = make_problem(batch=(3,), **sizes | OTHERS[thing])
    first, second = problem.group
    if thing == "col0":
        second = second._replace(col0=2)
    elif thing == "unequal ranks":
        second = second._replace(A=second.A[:, :4].contiguous(), B=second.B[:4])
    elif thing == "unequal mask ranks":
        second = second._replace(U=second.U[:, :4].contiguous(), V=second.V[:4])
    elif thing in ("weight", "weight_init"):
        second = second._replace(**{thing: shifted(getattr(second, thing))})
    elif thing == "x":
        problem = replace(problem, x=shifted(problem.x))
    asked = []

    def contraction(*arguments):
        asked.append(arguments)
        return torch.empty(0), torch.zeros(sum(t.numel() for ts in arguments[3:8] for t in ts))

    monkeypatch.setattr(cuda, "_contraction", lambda: contraction)
    with emulated():
        p = replace(problem, group=[first, second])
        if thing != "x":
            run(p, "cuda")
        else:  # what `run` makes a leaf of is a copy
            arguments = [
                [getattr(m, f) for m in p.group] for f in ("weight", *"ABUVb", "weight_init")
            ]
            bits = torch.zeros(24, 1, dtype=torch.int32)
            places = [[getattr(m, f) for m in p.group] for f in ("layer_id", "row0", "col0")]
            cuda.masked_linear_backward(
                p.dy, p.x, *arguments, bits, p.scale, p.tau, p.seed, p.step, p.g_forget,
                p.g_sparse, *places, False, "sigmoid", False,
            )  # fmt: skip
    assert len(asked) == 1
