# SPDX-License-Identifier: Apache-2.0
"""Both strategies of the Triton backend against the oracle, and tiles shared among programs."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_as_accurate, make_problem, oracle, run
from test_triton import DEVICE, DTYPES, HARD, SAMPLED, hold_against_oracle, mixed_group, on_device

from stamina_kernels import masked_linear, unpack_bits
from stamina_kernels.triton import launch, operations


@pytest.fixture(params=["compose", "generate"])
def strategy(request, monkeypatch):
    monkeypatch.setenv("STAMINA_STRATEGY", request.param)
    return request.param


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.setenv("STAMINA_STRATEGY", "generate")


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(generate, dtype, mode):
    hold_against_oracle(make_problem([20, 77], 70, (2, 5), dtype=dtype, bias=True, tau=0.7), mode)


def test_odd_sizes_and_several_tiles_of_tokens(generate):
    hold_against_oracle(make_problem([63], 123, (41,)), SAMPLED)


@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, torch.float16), (17, torch.float32), (128, torch.float16)]
)
def test_ranks(generate, rank, dtype):
    problem = make_problem([18], 33, (7,), rank=rank, mask_rank=rank, dtype=dtype)
    hold_against_oracle(problem, SAMPLED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_of_mixed_shapes_ranks_and_dtypes(generate, dtype):
    hold_against_oracle(mixed_group(dtype), SAMPLED)


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
def test_bfloat16_inputs_in_fp32_kernels(strategy, mode):
    """Where no GPU multiplies bf16: its values computed in fp32, rounded once at the end."""
    problem = make_problem([20, 37], 70, (9,), dtype=torch.bfloat16, bias=True)
    group = [
        p._replace(**{f: getattr(p, f).float() for f in ("weight", "bias", "weight_init")})
        for p in problem.group
    ]
    widened = replace(problem, x=problem.x.float(), dy=problem.dy.float(), group=group)
    y, _, _, gradients, bits = run(on_device(widened), "triton", **mode)
    exact = oracle(problem, bits=bits.cpu(), **mode)
    eager = oracle(problem, bits=bits.cpu(), dtype=torch.float32, **mode)
    assert_as_accurate("y", y.cpu().bfloat16(), eager[0], exact[0])
    for got, base, truth in zip(gradients, eager[3], exact[3], strict=True):
        if got.dim():
            assert_as_accurate("gradient", got.cpu().to(base.dtype), base, truth)


def test_the_backward_multiplies_with_the_weights_of_the_forward(strategy):
    columns, rows = 40, 33
    problem = on_device(make_problem([rows], columns, (columns,)))
    x = torch.eye(columns, device=DEVICE, requires_grad=True)
    out = masked_linear(x, problem.group, **problem.scalars(), backend="triton")
    seen = out.y.detach().T
    stacked = []
    for first in range(0, rows, columns):
        dy = torch.zeros(columns, rows, device=DEVICE)
        dy[: rows - first] = torch.eye(rows, device=DEVICE)[first : first + columns]
        stacked.append(torch.autograd.grad(out.y, x, dy, retain_graph=True)[0])
    used = torch.cat(stacked)[:rows]
    # one addition apart, which another order of the rank's sum may round otherwise
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(used, seen, rtol=2 * eps, atol=2 * eps)
    kept = unpack_bits(out.bits, columns)
    assert torch.equal(used != problem.group[0].weight, kept)
    assert torch.equal(seen != problem.group[0].weight, kept)


def test_both_strategies_draw_the_same(monkeypatch):
    problem, outputs = on_device(mixed_group()), []
    for name in ("compose", "generate"):
        monkeypatch.setenv("STAMINA_STRATEGY", name)
        outputs.append(masked_linear(problem.x, problem.group, **problem.scalars()))
    for field in ("forget", "sparse", "counts", "bits"):
        assert torch.equal(*(getattr(out, field) for out in outputs)), field


def test_two_runs_are_bit_equal(generate):
    problem = on_device(mixed_group())
    first, second = run(problem, "triton"), run(problem, "triton")
    for got, again in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert torch.equal(got, again)


def test_an_empty_batch(strategy):
    problem = on_device(make_problem([20], 40, (2, 0), bias=True))
    out = masked_linear(problem.x, problem.group, **problem.scalars(), backend="triton")
    assert out.y.shape == (2, 0, 20)
    assert out.counts[0, 0] > 0


def test_an_unknown_strategy_is_refused(monkeypatch):
    problem = on_device(make_problem([5], 9, (2,)))
    monkeypatch.setenv("STAMINA_STRATEGY", "guess")
    with pytest.raises(ValueError, match="STAMINA_STRATEGY must be compose or generate, got 'g"):
        masked_linear(problem.x, problem.group, **problem.scalars(), backend="triton")


def test_the_list_holds_every_tile_once():
    shapes = [(33, 70), (1, 1), (16, 129)]
    tiles = launch.tile_list(shapes, 16, 64, torch.device("cpu"))
    expected = [(k, n) for k, count in enumerate((3 * 2, 1, 1 * 3)) for n in range(count)]
    assert [tuple(row) for row in tiles.table.tolist()] == expected
    assert (tiles.number, tiles.most) == (10, 6)


def test_the_number_of_programs_changes_nothing(monkeypatch):
    problem, results = on_device(mixed_group()), []
    for count in (1, 2, 1000):
        monkeypatch.setattr(
            operations, "programs", lambda tiles, entry, device, most=count: (min(tiles, most),)
        )
        y, forget, sparse, gradients, bits = run(problem, "triton")
        results.append((y, forget, sparse, bits, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_launch_serves_members_of_every_height(monkeypatch):
    problem, launches = on_device(make_problem([40, 1, 13, 200], 33, (3,))), []
    kernel = operations.sample_compose_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(operations, "sample_compose_kernel", Counting())
    masked_linear(problem.x, problem.group, **problem.scalars(), backend="triton")
    assert len(launches) == 1
