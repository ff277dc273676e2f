# SPDX-License-Identifier: Apache-2.0
"""Bad input raises before anything is changed, and the message names the argument."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from oracle import make_problem

from stamina_kernels import (
    EmbeddingMLP,
    backends,
    commit,
    compose,
    dispatch,
    embedding_mlp,
    fold_,
    info,
    masked_linear,
    sample_mask,
    unpack_bits,
    use_backend,
)

PROBLEM = make_problem([6], 10, (3,), bias=True)
MEMBER = PROBLEM.group[0]


def call(x=PROBLEM.x, member=MEMBER, **changes):
    return masked_linear(x, member, **(PROBLEM.scalars() | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": MEMBER.weight.clone().requires_grad_()}, r"weight.requires_grad must be False"),
        ({"weight": torch.randn(6, 11)}, r"weight must be of shape \[\*, 10\], got \[6, 11\]"),
        ({"weight": torch.randn(6, 10).double()}, r"weight must be of dtype torch.float32"),
        (
            {"weight": torch.randn(6, 10).bfloat16(), "weight_init": None},
            r"weight must be torch.float32 as x, or wider",
        ),
        ({"weight": torch.empty(0, 10), "A": torch.empty(0, 4)}, r"weight must be of at least one"),
        ({"A": torch.randn(7, 4)}, r"A must be of shape \[6, \*\], got \[7, 4\]"),
        ({"A": torch.randn(6, 4).half()}, r"A must be of dtype torch.float32, got torch.float16"),
        ({"A": torch.randn(6, 0), "B": torch.randn(0, 10)}, r"rank of .*A and B must be between 1"),
        ({"A": torch.randn(6, 300), "B": torch.randn(300, 10)}, r"rank of .* between 1 and 256"),
        ({"B": torch.randn(4, 9)}, r"B must be of shape \[4, 10\], got \[4, 9\]"),
        ({"B": None}, r"B must be a tensor, got NoneType"),
        ({"U": torch.randn(5, 3)}, r"U must be of shape \[6, \*\]"),
        ({"V": torch.randn(2, 10)}, r"V must be of shape \[3, 10\], got \[2, 10\]"),
        ({"b": torch.zeros(1)}, r"b must be a 0-dim tensor, got \[1\]"),
        ({"b": torch.zeros((), device="meta")}, r"b must be on device cpu, got meta"),
        ({"bias": torch.zeros(5)}, r"bias must be of shape \[6\], got \[5\]"),
        ({"weight_init": torch.zeros(6, 10).half()}, r"weight_init must be of dtype torch.float32"),
        ({"weight_init": torch.zeros(6, 9)}, r"weight_init must be of shape \[6, 10\]"),
        ({"weight_init": torch.zeros(6, 10).requires_grad_()}, "weight_init.requires_grad must be"),
        ({"layer_id": 1 << 32}, r"layer_id must be an integer in \[0, 2\^32\), got 4294967296"),
        ({"row0": -1}, r"row0 and col0 must be rows below 2\^32"),
        ({"row0": (1 << 32) - 5}, r"row0 and col0 must be rows below 2\^32"),
        ({"col0": (1 << 34) - 9}, r"columns below 2\^34, got \(0, 17179869175\)"),
    ],
)
def test_bad_projection(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(member=MEMBER._replace(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 1.0}, "scale must be a tensor, got float"),
        ({"scale": torch.tensor(1.0, requires_grad=True)}, "scale.requires_grad must be False"),
        ({"tau": torch.ones(1)}, r"tau must be a 0-dim tensor, got \[1\]"),
        ({"seed": torch.tensor(1.0)}, "seed must be of dtype torch.int64, got torch.float32"),
        ({"step": 3}, "step must be a tensor, got int"),
        ({"sparse_kind": "l1"}, "sparse_kind must be 'sigmoid' or 'relu', got 'l1'"),
        ({"backend": "gpu"}, "backend must be one of reference, cpu, triton, cuda, got 'gpu'"),
        ({"x": torch.tensor(1.0)}, "x must be of shape"),
        ({"x": torch.zeros(2, 10, dtype=torch.int32)}, "x must be of dtype"),
        ({"member": []}, "projections must be at least one projection"),
    ],
)
def test_bad_argument(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**change)


@pytest.mark.parametrize(("row0", "col0"), [(0, 0), (5, 0), (0, 9)])
def test_projections_of_one_layer_are_apart(row0, col0):
    """Or their masks would be the same, where they overlap."""
    other = MEMBER._replace(row0=row0, col0=col0)
    message = r"projections\[1\].layer_id must be another than that of projections\[0\]"
    scalars = {"seed": PROBLEM.seed, "step": PROBLEM.step}
    for refused in (
        lambda: call(member=[MEMBER, other]),
        lambda: sample_mask([MEMBER, other], **scalars),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    call(member=[MEMBER, other], hard=True)
    for apart in ({"row0": 6}, {"col0": 12}, {"layer_id": MEMBER.layer_id + 1}):
        call(member=[MEMBER, MEMBER._replace(**apart)])


def test_group_must_agree_on_optional_tensors():
    with pytest.raises(ValueError, match=r"bias must be given for all of a group or for none"):
        call(member=[MEMBER, MEMBER._replace(bias=None)])


def test_mask_compose_and_commit_check_their_arguments():
    scalars = {"seed": PROBLEM.seed, "step": PROBLEM.step}
    with pytest.raises(ValueError, match="projections must be at least one"):
        sample_mask([], **scalars)
    bits = sample_mask(MEMBER, **scalars)
    with pytest.raises(ValueError, match=r"bits must be of shape \[6, 1\], got \[6, 2\]"):
        compose(MEMBER, torch.cat([bits, bits], 1), scale=PROBLEM.scale)
    with pytest.raises(TypeError, match="dtype must be torch.float32, "):
        compose(MEMBER, bits, scale=PROBLEM.scale, dtype=torch.int8)
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        commit(*MEMBER[1:6], scale=float("inf"))
    for k, empty, shape in ((1, "A", [0, 4]), (2, "B", [4, 0])):
        factors = [*MEMBER[1:6]]
        factors[k - 1] = torch.empty(shape)
        with pytest.raises(ValueError, match=rf"{empty} must be of at least one row and one col"):
            commit(*factors, scale=1.0)


def test_unpack_bits_checks_its_arguments():
    bits = sample_mask(MEMBER, seed=PROBLEM.seed, step=PROBLEM.step)
    assert unpack_bits(bits, 10).shape == (6, 10)
    for wrong, columns, error, message in [
        (bits, 33, ValueError, r"bits must be of shape \[\*, 2\], got \[6, 1\]"),
        (bits[0], 10, ValueError, r"bits must be of shape \[\*, 1\], got \[1\]"),
        (bits.long(), 10, TypeError, "bits must be of dtype torch.int32, got torch.int64"),
        (None, 10, TypeError, "bits must be a tensor, got NoneType"),
        (bits, 0, ValueError, "in_features must be an integer in"),
        (bits, 10.0, TypeError, "in_features must be an integer, got 10.0"),
    ]:
        with pytest.raises(error, match=message):
            unpack_bits(wrong, columns)


def test_what_autocast_makes_of_x_is_said():
    half = MEMBER._replace(weight=MEMBER.weight.half(), weight_init=None)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight must be torch.bfloat16 as x under autocast, or wi"),
    ):
        call(x=PROBLEM.x.detach().half(), member=half)


def test_one_mlp_is_no_list_of_them():
    mlp = EmbeddingMLP(*(torch.zeros(s) for s in ((3, 4), (5, 4), (5,), (2, 5), (2,))), False)
    assert embedding_mlp([mlp])[0].shape == (3, 2)
    with pytest.raises(TypeError, match="mlps must be a list of them, got one EmbeddingMLP"):
        embedding_mlp(mlp)


def test_tensors_without_data_are_refused():
    meta = {f: getattr(MEMBER, f).to("meta") for f in ("weight", "A", "B", "U", "V", "b", "bias")}
    scalars = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in PROBLEM.scalars().items()}
    with pytest.raises(ValueError, match="weight must be a tensor with data, got a meta tensor"):
        call(PROBLEM.x.to("meta"), MEMBER._replace(**meta, weight_init=None), **scalars)
    with pytest.raises(ValueError, match="A must be a tensor with data, got a meta tensor"):
        commit(*(meta[f] for f in "ABUVb"), scale=1.0)


def test_fold_checks_everything_before_it_writes():
    adapter = commit(*MEMBER[1:6], scale=1.0)
    initial = MEMBER.weight
    weight = initial + 1
    before = weight.clone()
    cases = [
        ([weight], [initial], [], "must be of equal length"),
        ([], [], [], "weights must be at least one weight"),
        ([weight], [initial.half()], [[adapter]], r"weights_init\[0\] must be of dtype"),
        ([weight], [weight], [[adapter]], "must be kept apart from the weight"),
        ([weight[:0]], [initial[:0]], [[]], r"weights\[0\] must be of at least one row"),
        ([weight.t()], [initial.t()], [[adapter]], r"weights\[0\] must be contiguous"),
        (
            [weight],
            [initial],
            [[adapter._replace(bits=adapter.bits[:5])]],
            r"bits must be of shape",
        ),
        ([weight], [initial], [[adapter._replace(A=adapter.A.float())]], r"A must be of dtype"),
    ]
    for weights, initials, adapters, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            fold_(weights, initials, adapters)
        assert torch.equal(weight, before)


def test_unusable_backend_says_what_is_supported(no_interpreter):
    with pytest.raises(
        RuntimeError, match=r"backend 'triton' cannot be used: .*supported here: ref"
    ):
        call(backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("gpu"):
        pass


def test_use_backend_and_environment_choose(monkeypatch):
    exact = call(backend="reference").y
    with use_backend("reference"):
        assert torch.equal(call().y, exact)
    wrong = "got 'nonsense' \\(from the environment variable STAMINA_BACKEND\\)"
    monkeypatch.setenv("STAMINA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=wrong):
        call()
    with use_backend("reference"):
        assert torch.equal(call().y, exact)


@pytest.mark.parametrize("asked", ["argument", "block", "environment"])
def test_fp64_runs_on_no_other_backend(monkeypatch, asked):
    problem = make_problem([3], 5, (2,), dtype=torch.float64, factor_dtype=torch.float64)
    scalars = problem.scalars()
    exact = masked_linear(problem.x, problem.group, **scalars).y
    block, backend = nullcontext(), None
    if asked == "argument":
        backend = "cpu"
    elif asked == "block":
        block = use_backend("cpu")
    else:
        monkeypatch.setenv("STAMINA_BACKEND", "cpu")
    with block, pytest.raises(ValueError, match="backend must be 'reference' for fp64 factors"):
        masked_linear(problem.x, problem.group, **scalars, backend=backend)
    with use_backend("reference"):
        assert torch.equal(masked_linear(problem.x, problem.group, **scalars).y, exact)


def test_an_empty_name_is_no_backend():
    with pytest.raises(ValueError, match="backend must be one of .*, got ''"):
        call(backend="")


def test_x_on_another_device_than_all_projections_is_what_is_named():
    problem = make_problem([3, 4], 5, (2,))
    with pytest.raises(ValueError, match="^x must be on device cpu as the weights, got meta"):
        masked_linear(problem.x.to("meta"), problem.group, **problem.scalars())


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_blocks_of_two_threads_leave_nothing_behind(first_to_leave):
    before = dispatch.resolve(None, "cpu")
    blocks = [use_backend("reference"), use_backend("cpu")]
    for block in blocks:
        block.__enter__()
    blocks[first_to_leave].__exit__(None, None, None)
    other = 1 - first_to_leave
    assert dispatch.resolve(None, "cpu") == ("reference", "cpu")[other]
    blocks[other].__exit__(None, None, None)
    assert dispatch.resolve(None, "cpu") == before


def test_info_explains_what_is_missing():
    report = info()
    assert set(report["backends"]) == set(backends())
    for entry in report["backends"].values():
        assert entry["available"] == (entry["reason"] is None)
    assert report["backends"][report["default_backend"]]["available"]
    assert report["default_backend_error"] is None


@pytest.mark.parametrize(
    ("variable", "message"),
    [("nonsense", "got 'nonsense' (from the env"), ("cuda", "backend 'cuda' (from the env")],
)
def test_info_answers_where_the_environment_asks_for_what_is_not_there(
    variable, message, monkeypatch
):
    monkeypatch.setenv("STAMINA_BACKEND", variable)
    report = info()
    assert report["default_backend"] is None
    assert message in report["default_backend_error"]


def test_import_is_light():
    """Neither Triton nor diffusers is imported and nothing is compiled by the import."""
    code = (
        "import sys, stamina_kernels;"
        "print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
