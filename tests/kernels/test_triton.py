# SPDX-License-Identifier: Apache-2.0
"""The Triton backend against the fp64 oracle: on the GPU, or in Triton's interpreter on the CPU.

The interpreter multiplies bfloat16's bit patterns, so bf16 runs on GPUs only.
"""

from dataclasses import fields, replace

import pytest
import torch
from oracle import FACTORS, assert_as_accurate, make_problem, oracle, product_eps, run

from stamina_kernels import commit, compose, fold_, masked_linear, sample_mask, unpack_bits
from stamina_kernels import triton as backend
from stamina_kernels.philox import uniform
from stamina_kernels.reference import pack_bits

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from stamina_kernels.triton import config, tile  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GPU_ONLY = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, GPU_ONLY]
SAMPLED = {"hard": False, "sparse_kind": "sigmoid"}
HARD = {"hard": True, "sparse_kind": "relu"}


def on_device(problem, device=DEVICE):
    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    moved = {f.name: move(getattr(problem, f.name)) for f in fields(problem)}
    moved["group"] = [type(p)(*map(move, p)) for p in problem.group]
    return replace(problem, **moved)


def cancelled(problem, bits, mode):
    """sum |dL| of every member: what db = sum dL is a small difference of."""
    whole = [p._replace(b=p.b.expand(p.weight.shape)) for p in problem.group]
    gradients = oracle(replace(problem, group=whole), bits=bits, **mode)[3]
    return [float(dL.abs().sum()) for dL in gradients[5::5]]


def hold_missing_logits(problem, backend, device):
    """A row of logits that are NaN: the sums and gradients of the definition that are NaN are."""
    p = problem.group[0]
    U = p.U.clone()
    U[1] = float("nan")
    problem = replace(problem, group=[p._replace(U=U)])
    for mode in (SAMPLED, HARD, HARD | {"hard": False}):
        *sums, gradients, _ = run(on_device(problem, device), backend, **mode)
        *expected_sums, expected, _ = run(problem, "reference", **mode)
        assert expected_sums[2].isnan().all() and expected[-1].isnan()
        results = zip((*sums, *gradients), (*expected_sums, *expected), strict=True)
        for got, wanted in results:
            assert torch.equal(got.cpu().isnan(), wanted.isnan())


def hold_against_oracle(problem, mode):
    y, forget, sparse, gradients, bits = run(on_device(problem), "triton", **mode)
    bits = bits.cpu()
    allowed = product_eps(problem.x.dtype, DEVICE)
    exact = oracle(problem, bits=bits, **mode)
    eager = oracle(problem, bits=bits, dtype=torch.float32, **mode)
    for name, got, base, truth in zip(
        ("y", "forget", "sparse"), (y, forget, sparse), eager, exact, strict=False
    ):
        assert_as_accurate(name, got.cpu(), base, truth, allowed)
    names = ["x"] + [f"{f}[{k}]" for k in range(len(problem.group)) for f in FACTORS]
    magnitudes = iter(cancelled(problem, bits, mode))
    for name, got, base, truth in zip(names, gradients, eager[3], exact[3], strict=True):
        if got.dim() == 0:
            # one number, where eager's error may be zero by luck: a few eps of each term instead
            error, luck = (abs(v.cpu().double() - truth) for v in (got, base))
            eps = max(torch.finfo(got.dtype).eps, allowed)
            assert error <= 2 * luck + 4 * eps * next(magnitudes), name
        else:
            assert_as_accurate(f"d{name}", got.cpu(), base, truth, allowed)


def mixed_group(dtype=torch.float32, **options):
    """Two members of different height, rank, mask rank and weight dtype."""
    first = make_problem([40], 70, (9,), rank=3, mask_rank=20, dtype=dtype, seed=1, **options)
    second = make_problem(
        [13],
        70,
        (9,),
        rank=17,
        mask_rank=2,
        dtype=dtype,
        weight_dtype=torch.float32,
        seed=2,
        **options,
    )
    return replace(
        first,
        group=[p._replace(layer_id=k) for k, p in enumerate([*first.group, *second.group])],
        dy=torch.cat([first.dy, second.dy], -1),
        g_forget=torch.cat([first.g_forget, second.g_forget]),
        g_sparse=torch.cat([first.g_sparse, second.g_sparse]),
    )


@triton.jit
def uniform_kernel(p_seed, p_step, p_member, p_out, QUADS: tl.constexpr):
    o_row = tl.arange(0, 16)
    b_u = tile.uniform_tile(p_seed, p_step, p_member, 0, 0, o_row, 32, QUADS)
    tl.store(p_out + o_row[:, None] * 32 + tl.arange(0, 32)[None, :], b_u)


def draw(seed, step, layer_id, row0, col0):
    member = torch.zeros(tile.FIELDS.value, dtype=torch.int64)
    member[tile.LAYER_ID.value] = layer_id
    member[tile.ROW0.value] = row0
    member[tile.COL0.value] = col0
    out = torch.empty(16, 32, device=DEVICE)
    scalars = [torch.tensor(value, device=DEVICE) for value in (seed, step)]
    uniform_kernel[(1,)](
        *scalars, member.to(DEVICE), out, QUADS=col0 % 4 == 0, enable_fp_fusion=True
    )
    return out.cpu()


def test_missing_logits_are_seen():
    hold_missing_logits(make_problem([5], 14, (3,)), "triton", DEVICE)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    block, row, step, layer_id = counter
    seed = key[0] | key[1] << 32
    got = draw(seed - (seed >> 63 << 64), step, layer_id, row, 4 * block)
    expected = torch.tensor([(2 * (w >> 9) + 1) * 2.0**-24 for w in words])
    assert torch.equal(got[0, :4], expected)


@pytest.mark.parametrize("col0", [0, 8, 3])
def test_uniforms_equal_the_reference_bit_for_bit(col0):
    seed, step = torch.tensor(-987654321), torch.tensor((1 << 32) + 5)
    expected = uniform(seed, step, 77, range(1000, 1016), range(col0, col0 + 32))
    assert torch.equal(draw(int(seed), int(step), 77, 1000, col0), expected)


@pytest.mark.parametrize("mode", [SAMPLED, HARD], ids=["sampled", "hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(dtype, mode):
    hold_against_oracle(make_problem([20, 37], 70, (2, 5), dtype=dtype, bias=True, tau=0.7), mode)


def test_odd_sizes():
    hold_against_oracle(make_problem([63], 123, (41,)), SAMPLED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 33, 128])
def test_ranks(rank, dtype):
    problem = make_problem([18], 33, (7,), rank=rank, mask_rank=rank, dtype=dtype)
    hold_against_oracle(problem, SAMPLED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_of_mixed_shapes_ranks_and_dtypes(dtype):
    hold_against_oracle(mixed_group(dtype), SAMPLED)


def test_without_earlier_concepts():
    problem = make_problem([20], 40, (5,), initial=False)
    hold_against_oracle(problem, SAMPLED)
    assert run(on_device(problem), "triton")[1].item() == 0


def test_empty_batch_still_serves_the_regularisers():
    hold_against_oracle(make_problem([20], 40, (0,)), SAMPLED)


def test_weights_at_odd_addresses():
    problem = on_device(make_problem([20], 40, (5,)))
    weight = problem.group[0].weight
    shifted = torch.empty(weight.numel() + 1, device=DEVICE)[1:].view_as(weight).copy_(weight)
    moved = replace(problem, group=[problem.group[0]._replace(weight=shifted)])
    for got, expected in zip(run(moved, "triton")[3], run(problem, "triton")[3], strict=True):
        assert torch.equal(got, expected)


def test_frozen_x_gets_no_gradient_and_the_factors_do():
    problem = on_device(make_problem([20], 40, (5,))).with_grad()
    x = problem.x.detach()
    out = masked_linear(x, problem.group, **problem.scalars(), backend="triton")
    out.y.sum().backward()
    assert x.grad is None
    assert all(getattr(problem.group[0], f).grad.abs().sum() > 0 for f in FACTORS)


def test_two_runs_are_bit_equal():
    problem = on_device(mixed_group())
    first, second = run(problem, "triton"), run(problem, "triton")
    for got, again in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert torch.equal(got, again)


def logits(p):
    return p.U.double() @ p.V.double() + p.b.double()


@pytest.mark.parametrize("hard", [False, True])
def test_bits_equal_the_reference_off_the_rounding_of_the_threshold(hard):
    problem = mixed_group()
    scalars = {"seed": problem.seed, "step": problem.step, "hard": hard}
    expected = sample_mask(problem.group, **scalars, backend="reference")
    moved = on_device(problem)
    scalars = {"seed": moved.seed, "step": moved.step, "hard": hard}
    bits = sample_mask(moved.group, **scalars, backend="triton").cpu()
    drawn = masked_linear(moved.x, moved.group, **moved.scalars(), hard=hard, backend="triton").bits
    assert torch.equal(drawn.cpu(), bits)
    assert torch.equal(bits, pack_bits(unpack_bits(bits, 70))), "padding must be zero"
    first = 0
    for p in problem.group:
        rows = slice(first, first + p.weight.shape[0])
        differ = unpack_bits(bits[rows], 70) != unpack_bits(expected[rows], 70)
        u = uniform(problem.seed, problem.step, p.layer_id, range(differ.shape[0]), range(70))
        margin = logits(p) if hard else logits(p).sigmoid() - u
        # the chain of mask_rank terms is rounded mask_rank times, the sigmoid a few times
        rounding = (p.U.shape[1] + 8) * 2.0**-24 * (p.U.abs() @ p.V.abs() + 1)
        assert not (differ & (margin.abs() > rounding)).any()
        first = rows.stop


def test_bits_of_a_shard_are_those_of_the_whole():
    problem = on_device(make_problem([40], 64, (1,)))
    whole = problem.group[0]
    scalars = {"seed": problem.seed, "step": problem.step, "backend": "triton"}
    shard = whole._replace(
        weight=whole.weight[7:30, 34:], A=whole.A[7:30], B=whole.B[:, 34:],
        U=whole.U[7:30], V=whole.V[:, 34:], weight_init=None, row0=7, col0=34,
    )  # fmt: skip
    expected = unpack_bits(sample_mask(whole, **scalars), 64)[7:30, 34:]
    assert torch.equal(unpack_bits(sample_mask(shard, **scalars), 30), expected)


def test_counts_are_the_statistics_of_the_bits():
    problem = mixed_group()
    moved = on_device(problem)
    out = masked_linear(moved.x, moved.group, **moved.scalars(), backend="triton")
    mask = unpack_bits(out.bits.cpu(), 70)
    changed = torch.cat([p.weight != p.weight_init for p in problem.group])
    for k, rows in enumerate((slice(0, 40), slice(40, 53))):
        kept = mask[rows]
        assert out.counts[k].tolist() == [kept.sum(), (kept & changed[rows]).sum()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compose_from_bits(dtype):
    problem = mixed_group(dtype)
    bits = sample_mask(problem.group, seed=problem.seed, step=problem.step, backend="reference")
    moved = on_device(problem)
    got = compose(
        moved.group, bits.to(DEVICE), scale=moved.scale, dtype=dtype, backend="triton"
    ).cpu()
    mask, first = unpack_bits(bits, 70), 0
    for p in problem.group:
        rows = slice(first, first + p.weight.shape[0])
        exact = p.weight.double() + 0.5 * mask[rows] * (p.A.double() @ p.B.double())
        eager = (p.weight.float() + 0.5 * mask[rows] * (p.A @ p.B)).to(dtype)
        assert_as_accurate("W_eff", got[rows], eager, exact)
        first = rows.stop


def adapters_of(shape, count, seed=0):
    out_features, in_features = shape
    problem = make_problem(
        [out_features] * count, in_features, (1,), rank=5 + count, mask_rank=3, seed=seed
    )
    return [
        commit(*(getattr(p, f).to(DEVICE) for f in FACTORS), scale=0.3, backend="triton")
        for p in problem.group
    ]


def delta(adapter, columns):
    product = adapter.A.double() @ adapter.B.double()
    factor = adapter.scale * 2.0 ** sum(adapter.exponent)
    return factor * unpack_bits(adapter.bits, columns) * product


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_rounds_once_and_unfolds_exactly(dtype):
    shapes, counts = [(40, 70), (9, 33), (20, 64)], [3, 0, 1]
    initial = [torch.randn(s, device=DEVICE).mul(0.05).to(dtype) for s in shapes]
    initial[1][0, 0] = -0.0
    weights = [torch.zeros_like(w) for w in initial]
    adapters = [adapters_of(s, n) for s, n in zip(shapes, counts, strict=True)]
    fold_(weights, initial, adapters, backend="triton")
    for k, layer in enumerate(adapters):
        exact = initial[k].double() + sum(delta(a, shapes[k][1]) for a in layer)
        # one rounding to W's dtype, and fp32's over rank + concepts terms before it
        terms = sum(
            abs(a.scale) * 2.0 ** sum(a.exponent) * (a.A.double().abs() @ a.B.double().abs())
            for a in layer
        )
        bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 12 * 2.0**-24 * terms + 1e-12
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((weights[k].double() - exact).abs() <= bound + smallest).all()
    same_bits = weights[1].view(torch.uint8), initial[1].view(torch.uint8)
    assert torch.equal(*same_bits)

    rest = [torch.empty_like(w) for w in initial]
    fold_(rest, initial, [adapters[0][:1], [], []], backend="triton")
    fold_(weights, initial, [adapters[0][:1], [], []], backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(rest, weights, strict=True))


def test_fold_serves_layers_of_different_dtypes():
    initial = [torch.randn(9, 33, device=DEVICE).to(d) for d in (torch.float16, torch.float32)]
    weights = [torch.zeros_like(w) for w in initial]
    adapter = adapters_of((9, 33), 1)
    fold_(weights, initial, [adapter, adapter], backend="triton")
    for weight, start in zip(weights, initial, strict=True):
        torch.testing.assert_close(
            weight.double(), start.double() + delta(adapter[0], 33), rtol=1e-3, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_fold_that_overflows_restores_every_weight():
    initial = [torch.full((9, 33), 60000.0, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    weights = [torch.zeros_like(w) for w in initial]
    ones = [torch.ones(s, device=DEVICE) for s in ((9, 1), (1, 33), (9, 1), (1, 33), ())]
    huge = commit(*ones, scale=1e5, backend="triton")
    with pytest.raises(OverflowError, match=r"layer 1 overflows torch.float16"):
        fold_(weights, initial, [[], [huge]], backend="triton")
    assert all(torch.equal(w, start) for w, start in zip(weights, initial, strict=True))


def test_commit_equals_the_reference():
    factors = [getattr(make_problem([20], 40, (1,)).group[0], f) for f in FACTORS]
    expected = commit(*factors, scale=1.0, backend="reference")
    got = commit(*(f.to(DEVICE) for f in factors), scale=1.0, backend="triton")
    assert got.exponent == expected.exponent
    assert torch.equal(got.A.cpu(), expected.A) and torch.equal(got.B.cpu(), expected.B)
    margin = (factors[2].double() @ factors[3].double() + factors[4].double()).abs() > 1e-6
    differ = unpack_bits(got.bits.cpu(), 40) != unpack_bits(expected.bits, 40)
    assert not (differ & margin).any()
    factors[1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="B must be finite, got 1 non-finite values"):
        commit(*(f.to(DEVICE) for f in factors), scale=1.0, backend="triton")


@pytest.mark.skipif(ON_GPU, reason="the GPU multiplies bfloat16 correctly")
def test_the_interpreter_refuses_bfloat16():
    problem = make_problem([5], 9, (2,), dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="interpreter .* bit patterns of bfloat16"):
        masked_linear(problem.x, problem.group, **problem.scalars(), backend="triton")
    bits = sample_mask(problem.group, seed=problem.seed, step=problem.step, backend="triton")
    with pytest.raises(NotImplementedError, match="bfloat16"):
        compose(problem.group, bits, scale=problem.scale, backend="triton")
    weight = problem.group[0].weight
    with pytest.raises(NotImplementedError, match="bfloat16"):
        fold_([weight.clone()], [weight], [[]], backend="triton")


def test_unavailable_reason_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable_reason() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no GPU is visible" in backend.unavailable_reason()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable_reason() == "the package triton is not installed"


def test_launch_configuration_covers_every_rank():
    for rank in range(1, 257):
        step = config.rank_step(rank)
        assert 16 <= step <= 64 and step & (step - 1) == 0
