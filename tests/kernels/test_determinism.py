# SPDX-License-Identifier: Apache-2.0
"""The same bits from run to run, for any number of threads, and from several callers at once."""

import threading
from dataclasses import replace

import pytest
import torch
from corruptions import make_mlp
from oracle import make_problem, run
from test_reference import committed

from stamina_kernels import backends, commit, compose, embedding_mlp, fold_, sample_mask

if backends()["cpu"] is not None:
    pytest.skip(f"backend 'cpu': {backends()['cpu']}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# out_features of the group, in_features, batch: ragged against every block, tile and vector
SIZES = [
    ([320, 130], 200, (37,)),
    ([1, 257, 16], 129, (2, 5)),
    ([515], 31, (1,)),
    ([7], 1030, (3,)),
    ([3, 3], 5, (0,)),
]


def mixed(out_features, in_features, batch, dtype):
    """A group whose members differ in rank and mask rank."""
    members = [
        make_problem(
            [rows], in_features, batch, rank=1 + 8 * k, mask_rank=17 - 7 * k, dtype=dtype,
            bias=True, tau=0.7, seed=k,
        )
        for k, rows in enumerate(out_features)
    ]  # fmt: skip
    return replace(
        members[0],
        group=[p._replace(layer_id=k) for k, m in enumerate(members) for p in m.group],
        dy=torch.cat([m.dy for m in members], -1),
        g_forget=torch.cat([m.g_forget for m in members]),
        g_sparse=torch.cat([m.g_sparse for m in members]),
    )


def everything(problem, hard=False):
    """What every operation makes of the problem, in one flat list."""
    where = {"seed": problem.seed, "step": problem.step, "hard": hard, "backend": "cpu"}
    y, forget, sparse, gradients, bits = run(problem, "cpu", hard=hard)
    sampled = sample_mask(problem.group, **where)
    composed = compose(problem.group, bits, scale=problem.scale, backend="cpu")
    results = [y, forget, sparse, bits, *gradients, sampled, composed]
    weights = [torch.empty_like(p.weight) for p in problem.group]
    adapters = [
        [commit(p.A, p.B, p.U, p.V, p.b, scale=s, backend="cpu") for s in (0.5, -1.5)]
        for p in problem.group
    ]
    fold_(weights, [p.weight for p in problem.group], adapters, backend="cpu")
    results += weights + [t for a in adapters for c in a for t in (c.A, c.B, c.bits)]
    return results + factors(problem)


def factors(problem):
    """What MLPs of the problem's sizes compute, and their gradients."""
    mlps = [
        make_mlp(side, p.U.shape[1], 32, p.U.shape[1], transposed=side == p.V.shape[1], seed=k)
        for k, p in enumerate(problem.group)
        for side in (p.U.shape[0], p.V.shape[1])
    ]
    leaves = [t.requires_grad_() for mlp in mlps for t in mlp[:5]]
    outputs = embedding_mlp(mlps, backend="cpu")
    gradients = torch.autograd.grad([y.square().sum() for y in outputs], leaves)
    return [y.detach() for y in outputs] + list(gradients)


def assert_equal(results, expected):
    for k, pair in enumerate(zip(results, expected, strict=True)):
        got, wanted = (t.reshape(-1).view(torch.uint8) for t in pair)
        assert torch.equal(got, wanted), f"result {k}"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_and_every_run_give_the_same_bits(isa, threads, dtype, sizes):
    problem = mixed(*sizes, dtype)
    threads(1)
    expected = everything(problem)
    for count in (1, 2, 3, 8, 8):
        threads(count)
        assert_equal(everything(problem), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_callers_at_once_get_what_they_get_one_after_the_other(isa, threads, dtype):
    threads(2)
    problems = [mixed(*sizes, dtype) for sizes in SIZES]
    expected = [everything(problem, hard=k == 1) for k, problem in enumerate(problems)]
    # every caller meets every other, and two work on the same tensors
    barrier, rounds, failures = threading.Barrier(2 * len(problems)), 4, []

    def work(caller):
        k = caller % len(problems)
        try:
            for _ in range(rounds):
                barrier.wait(timeout=60)
                assert_equal(everything(problems[k], hard=k == 1), expected[k])
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    callers = [threading.Thread(target=work, args=(c,)) for c in range(2 * len(problems))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures, failures[0]


def test_many_layers_fold_the_same_for_any_number_of_threads(isa, threads):
    shapes = [(200, 301), (1, 1), (65, 129), (64, 128), (33, 500)]
    layers = [committed(*shape, 5, k) for k, shape in enumerate(shapes)]
    initial = [make_problem([r], c, (1,), dtype=torch.bfloat16).group[0].weight for r, c in shapes]
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append([torch.full_like(w, float("nan")) for w in initial])
        fold_(results[-1], initial, layers, backend="cpu")
    for other in results[1:]:
        assert_equal(other, results[0])
