# SPDX-License-Identifier: Apache-2.0
"""The C++ backend on every instruction set of this machine, held against fp64 and the reference."""

import os
import subprocess
import sys

import pytest
import torch
from oracle import make_problem, run
from paths import ALL, supported
from test_reference import committed, dense_delta, hold_against_oracle

from stamina_kernels import (
    backends,
    commit,
    compose,
    fold_,
    masked_linear,
    sample_mask,
    unpack_bits,
)
from stamina_kernels.philox import philox4x32, uniform
from stamina_kernels.reference import mask_logits

if backends()["cpu"] is not None:
    pytest.skip(f"backend 'cpu': {backends()['cpu']}", allow_module_level=True)

LIBRARY = torch.ops.stamina_cpu
LOW = 0xFFFFFFFF
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def words(seed, step, layer_id, row0, col0, rows, columns):
    return LIBRARY.philox_words(seed, step, layer_id, row0, col0, rows, columns).long() & LOW


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW,) * 4, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_random123_known_answers(isa, counter, key, expected):
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64  # as a signed 64-bit integer
    got = words(seed, counter[2], counter[3], counter[1], 4 * counter[0], 1, 4)
    assert tuple(got[0].tolist()) == expected


def test_words_start_anywhere_and_ignore_the_high_half_of_step(isa):
    row0, col0, rows, columns = (1 << 32) - 2, 4 * 1000 + 3, 5, 77
    got = words(-3, (9 << 32) + 5, 7, row0, col0, rows, columns)
    row = torch.arange(row0, row0 + rows)[:, None] & LOW
    column = torch.arange(col0, col0 + columns)[None, :]
    key = (torch.tensor(-3) & LOW, torch.tensor(-3) >> 32 & LOW)
    counter = (column >> 2, row, torch.tensor(5), torch.tensor(7))
    every = philox4x32(tuple(torch.broadcast_tensors(*counter)), key)
    assert torch.equal(got, every.gather(-1, (column & 3).expand(rows, -1)[..., None])[..., 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "batch", "tau", "mode"),
    [
        ([33, 70], 123, (2, 5), 1.0, {"hard": False, "sparse_kind": "sigmoid"}),
        ([130], 160, (19,), 0.7, {"hard": False, "sparse_kind": "relu"}),
        ([17, 1], 300, (9,), 1.3, {"hard": True, "sparse_kind": "sigmoid"}),
        ([1], 1, (2,), 1.0, {"hard": True, "sparse_kind": "relu"}),
        ([3, 20], 131, (701,), 1.0, {"hard": False, "sparse_kind": "sigmoid"}),
    ],
)
def test_forward_and_gradients(isa, dtype, rows, columns, batch, tau, mode):
    problem = make_problem(
        rows, columns, batch, dtype=dtype, bias=True, tau=tau, rank=6, mask_rank=5
    )
    hold_against_oracle(problem, mode, "cpu")


@pytest.mark.parametrize(("rank", "mask_rank"), [(1, 128), (3, 33), (16, 16), (17, 2), (128, 1)])
def test_ranks_and_wide_weights(isa, rank, mask_rank):
    problem = make_problem(
        [63], 41, (7,), rank=rank, mask_rank=mask_rank, dtype=torch.bfloat16,
        weight_dtype=torch.float32,
    )  # fmt: skip
    hold_against_oracle(problem, {"hard": False}, "cpu")


def test_without_initial_weight_or_input_gradient(isa):
    problem = make_problem([40], 64, (6,), initial=False)
    hold_against_oracle(problem, {"hard": False}, "cpu")
    *_, gradients, _ = run(problem, "cpu")
    p = problem.with_grad()
    out = masked_linear(p.x.detach(), p.group, **p.scalars(), backend="cpu")
    alone = torch.autograd.grad(
        [out.y, out.forget, out.sparse], p.leaves()[1:], [p.dy, p.g_forget, p.g_sparse]
    )
    for got, expected in zip(alone, gradients[1:], strict=True):
        assert torch.equal(got, expected)


def test_empty_batch(isa):
    problem = make_problem([8, 40], 50, (3, 0), bias=True)
    hold_against_oracle(problem, {"hard": False}, "cpu")


def test_large_fp16_gradients_stay_finite(isa):
    """The sum over tokens of dY X exceeds fp16's range, the gradients of the factors do not."""
    problem = make_problem([16], 32, (64,), dtype=torch.float16)
    x, dy = torch.full_like(problem.x, 100.0), torch.full_like(problem.dy, 100.0)
    p = problem.with_grad()
    out = masked_linear(x, p.group, **p.scalars(), backend="cpu")
    grad = torch.autograd.grad(out.y, [p.group[0].A], dy)[0]
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


def sample_on(problem, backend, hard=False):
    return sample_mask(
        problem.group, seed=problem.seed, step=problem.step, hard=hard, backend=backend
    )


def test_bits_equal_the_reference_off_the_threshold(isa):
    rows, columns, m = 512, 1025, 16
    problem = make_problem([rows], columns, (1,), mask_rank=m)
    problem.group[0] = problem.group[0]._replace(row0=11, col0=6)
    p = problem.group[0]
    differ = unpack_bits(
        sample_on(problem, "cpu") ^ sample_on(problem, "reference"), columns
    ).nonzero(as_tuple=True)
    u = uniform(problem.seed, problem.step, p.layer_id, range(11, 11 + rows), range(6, 6 + columns))
    logits = p.U.double() @ p.V.double() + p.b.double()
    # each chain errs by at most (m + 1) 2^-24 sum |U V|, sigmoid by a quarter of that; the
    # comparison of either form rounds a few more times at 2^-24
    size = p.U.double().abs() @ p.V.double().abs() + p.b.double().abs()
    margin = 2 * (m + 1) * 2.0**-24 * size / 4 + 2.0**-21
    distance = (u.double() - torch.sigmoid(logits)).abs()
    assert (distance[differ] <= margin[differ]).all()
    assert len(differ[0]) <= 3e-6 * rows * columns


def test_every_instruction_set_draws_the_same_bits():
    problem = make_problem([200, 33], 777, (1,), mask_rank=9)
    drawn = []
    for name in filter(supported, ALL):
        LIBRARY.instruction_set(name)
        drawn += [(name, sample_on(problem, "cpu"), sample_on(problem, "cpu", hard=True))]
    for name, bits, hard in drawn[:-1]:
        assert torch.equal(bits, drawn[-1][1]), name
        assert torch.equal(hard, drawn[-1][2]), name


def test_extreme_logits_saturate(isa):
    p = make_problem([4], 64, (2,)).group[0]
    for logit, density in ((-500.0, 0), (500.0, 64 * 4)):
        member = p._replace(U=torch.zeros(4, 1), V=torch.zeros(1, 64), b=torch.tensor(logit))
        problem = make_problem([4], 64, (2,), mask_rank=1)
        problem.group[0] = member
        y, forget, sparse, gradients, bits = run(problem, "cpu")
        assert int(unpack_bits(bits, 64).sum()) == density
        torch.testing.assert_close(sparse, torch.tensor([float(density)]), atol=1e-30, rtol=0)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(isa, threads, dtype):
    problem = make_problem([320, 130], 200, (37,), dtype=dtype, bias=True)
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        y, forget, sparse, gradients, bits = run(problem, "cpu")
        results.append([y, forget, sparse, bits, *gradients])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compose_is_one_rounding_and_the_forward_uses_it(isa, dtype):
    columns = 70
    problem = make_problem([12, 7], columns, (columns,), dtype=dtype, weight_dtype=torch.float32)
    bits = sample_on(problem, "cpu")
    effective = compose(problem.group, bits, scale=problem.scale, dtype=dtype, backend="cpu")
    exact = torch.cat([
        p.weight.double()
        + problem.scale.double() * unpack_bits(b, columns) * (p.A.double() @ p.B.double())
        for p, b in zip(problem.group, bits.split([12, 7]), strict=True)
    ])  # fmt: skip
    if dtype == torch.float32:
        # roundings of W + D, of s P, and of the chain of 4 products
        torch.testing.assert_close(effective.double(), exact, rtol=0, atol=8 * 2.0**-24)
    else:
        assert (effective == exact.to(dtype)).double().mean() > 0.999
    eye = torch.eye(columns, dtype=dtype)
    out = masked_linear(eye, problem.group, **problem.scalars(), backend="cpu")
    assert torch.equal(out.y.t(), effective)


def test_flushing_subnormals_changes_no_fold(isa):
    """Another part of the program may have set the thread's flush mode."""
    subnormal = 2.0**-13  # most of A falls below fp16's smallest normal number, 2^-14
    adapters = [
        a._replace(A=a.A * subnormal, scale=a.scale / subnormal) for a in committed(40, 70, 16, 3)
    ]
    initial = make_problem([40], 70, (1,), dtype=torch.float16).group[0].weight
    plain, flushed = initial.clone(), initial.clone()
    fold_([plain], [initial], [adapters], backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        fold_([flushed], [initial], [adapters], backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain, flushed)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.9999), (torch.float16, 0.9995), (torch.float32, None)]
)
def test_fold_rounds_once_on_many_layers(isa, dtype, share):
    shapes = [(200, 301), (65, 33)]
    layers = [committed(*shape, 16, 10) for shape in shapes]
    initial = [make_problem([r], c, (1,), dtype=dtype).group[0].weight for r, c in shapes]
    weights = [w.clone() for w in initial]
    fold_(weights, initial, layers, backend="cpu")
    right = total = 0
    for weight, start, adapters in zip(weights, initial, layers, strict=True):
        columns = weight.shape[1]
        exact = start.double() + sum(dense_delta(a, columns) for a in adapters)
        magnitude = sum(
            abs(a.scale) * 2.0 ** sum(a.exponent) * a.A.double().abs() @ a.B.double().abs()
            for a in adapters
        )
        if share is None:
            bound = 2.0**-24 * exact.abs() + (16 + 10) * 2.0**-24 * magnitude
            assert ((weight.double() - exact).abs() <= bound).all()
        right, total = right + int((weight == exact.to(dtype)).sum()), total + weight.numel()
    assert share is None or right >= share * total


def test_fold_without_adapters_and_fold_that_overflows_give_back_the_initial_bits(isa):
    adapters = committed(20, 50, 3, 2)
    initial = [
        make_problem([20], 50, (1,), dtype=torch.float16, seed=s).group[0].weight for s in (0, 1, 2)
    ]
    initial[0][0, 0] = -0.0
    weights = [w + 1 for w in initial]
    fold_(weights[:1], initial[:1], [[]], backend="cpu")
    assert torch.equal(weights[0].view(torch.int16), initial[0].view(torch.int16))
    huge = adapters[0]._replace(scale=1e9, bits=torch.full_like(adapters[0].bits, -1))
    with pytest.raises(OverflowError, match="layer 1 overflows torch.float16"):
        fold_(weights, initial, [adapters, [huge], [huge]], backend="cpu")
    for weight, start in zip(weights, initial, strict=True):
        assert torch.equal(weight.view(torch.int16), start.view(torch.int16))


def test_commit_equals_the_reference_off_the_rounding_of_the_logits(isa):
    p = make_problem([40], 90, (1,)).group[0]
    factors = [getattr(p, f) for f in "ABUVb"]
    ours, expected = (commit(*factors, scale=0.3, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.A, expected.A) and torch.equal(ours.B, expected.B)
    assert ours.exponent == expected.exponent and ours.scale == 0.3
    differ = unpack_bits(ours.bits ^ expected.bits, 90)
    assert (mask_logits(p.U, p.V, p.b).abs()[differ] < 1e-6).all()


def direct_arguments():
    p = make_problem([6], 40, (3,)).group[0]
    zero = torch.tensor(0)
    return {
        "x": torch.randn(3, 40), "weight": [p.weight], "bias": [], "A": [p.A], "B": [p.B],
        "U": [p.U], "V": [p.V], "b": [p.b], "weight_init": [], "scale": torch.tensor(1.0),
        "seed": zero, "step": zero, "layer_id": [0], "row0": [0], "col0": [0], "hard": False,
        "sparse_kind": "sigmoid",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.randn(3, 41), r"x must be of shape \[..., 40\]"),
        ("x", torch.randn(3, 40, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        ("x", torch.randn(40, 3).t(), "x must be contiguous"),
        ("weight", [torch.randn(6, 41)], r"weight must be of shape \[6, 40\]"),
        ("weight", [], "one weight, A and B per member"),
        ("A", [torch.randn(5, 4)], r"A must be of shape \[6, -1\]"),
        ("B", [torch.randn(4, 40).double()], "B has the wrong dtype"),
        ("V", [torch.randn(2, 40)], r"V must be of shape \[3, 40\]"),
        ("seed", torch.tensor(0.0), "seed must be one value of the right dtype"),
        ("bias", [torch.zeros(5)], "bias must be one tensor of sum O elements"),
        ("layer_id", [], "one U, V, b, layer_id, row0 and col0 per member"),
        ("sparse_kind", "tanh", "sparse_kind must be 'sigmoid' or 'relu'"),
    ],
)
def test_the_library_itself_refuses_bad_arguments(name, value, message):
    arguments = direct_arguments()
    LIBRARY.masked_linear(**arguments)
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        LIBRARY.masked_linear(**arguments)


def in_child(program: str, **environment: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment},
        cwd=os.path.dirname(__file__), capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.parametrize("name", ["portable", "avx512_bf16"])
def test_environment_forces_an_instruction_set_and_scratch_memory_is_never_read_unwritten(name):
    if not supported(name):
        pytest.skip(f"this machine lacks {name}, or the C++ library")
    program = (
        "import torch; from oracle import make_problem;"
        "from test_reference import hold_against_oracle; from stamina_kernels import cpu;"
        "problems = [make_problem([37], 45, (5,), bias=True, dtype=dtype)"
        " for dtype in (torch.float32, torch.bfloat16)];"
        "[hold_against_oracle(problem, {'hard': False}, 'cpu') for problem in problems];"
        "print(cpu.instruction_set())"
    )
    # glibc fills fresh memory with 0x7f bytes: 3.4e38 as fp32 and bf16, and fp16's NaN
    poison = {"MALLOC_PERTURB_": str(0x80), "STAMINA_CPU_ISA": name}
    assert in_child(program, **poison) == name


def test_environment_that_names_no_instruction_set_raises_and_an_empty_one_is_as_none():
    """No other backend, slower, in its place."""
    draw = (
        "from oracle import make_problem; from stamina_kernels import sample_mask;"
        "p = make_problem([3], 4, (1,));"
        "bits = lambda: sample_mask(p.group, seed=p.seed, step=p.step).shape;"
    )
    program = f"{draw}\ntry: bits()\nexcept RuntimeError as error: print(error)"
    refusal = in_child(program, STAMINA_CPU_ISA="mmx")
    assert "STAMINA_CPU_ISA must be one of" in refusal and "'mmx'" in refusal
    assert in_child(f"{draw} print(bits())", STAMINA_CPU_ISA="") == "torch.Size([3, 1])"
