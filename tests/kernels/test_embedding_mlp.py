# SPDX-License-Identifier: Apache-2.0
"""Small MLPs over embeddings on every backend, against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F
from corruptions import make_mlp
from oracle import assert_as_accurate
from paths import ALL, forced
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from stamina_kernels import EmbeddingMLP, backends, embedding_mlp

FIELDS = ("E", "W1", "b1", "W2", "b2")
ON_GPU = torch.cuda.is_available()


@pytest.fixture(params=["reference", *ALL, "triton", "cuda"])
def backend(request):
    """A backend; of `cpu`, one for every instruction set."""
    if request.param in ALL:
        with forced(request.param):
            yield "cpu"
        return
    reason = backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    yield request.param


def device_of(backend):
    return "cuda" if ON_GPU and backend in ("triton", "cuda") else "cpu"


def leaves(mlps, device="cpu", dtype=torch.float32):
    return [
        EmbeddingMLP(
            *(t.to(device, dtype, copy=True).requires_grad_() for t in mlp[:5]), mlp.transposed
        )
        for mlp in mlps
    ]


def formula(mlp):
    y = F.linear(F.silu(F.linear(mlp.E, mlp.W1, mlp.b1)), mlp.W2, mlp.b2)
    return y.t() if mlp.transposed else y


def outcome(compute, mlps):
    """Outputs, then the gradients of every tensor for fixed upstream gradients."""
    outputs = compute(mlps)
    upstream = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y)
        for k, y in enumerate(outputs)
    ]
    inputs = [t for mlp in mlps for t in mlp[:5]]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


# more than one block of embeddings, a ragged last one, ranks below, at and above a step of the
# kernels, both layouts, MLPs of different heights in one call
GROUPS = {
    "one": [make_mlp(5, 3, 7, 2)],
    "factors": [make_mlp(40, 16, 32, 16), make_mlp(100, 16, 32, 16, True)],
    "mixed": [
        make_mlp(1, 1, 1, 1),
        make_mlp(33, 17, 32, 40, True),
        make_mlp(64, 130, 5, 1),
        make_mlp(7, 2, 31, 256, True),
    ],
    "wide": [make_mlp(35, 256, 32, 256)],
    "tall": [make_mlp(2100, 16, 32, 16)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_outputs_and_gradients(backend, group):
    mlps = GROUPS[group]
    device = device_of(backend)
    got = outcome(lambda given: embedding_mlp(given, backend=backend), leaves(mlps, device))
    eager = outcome(lambda given: [formula(mlp) for mlp in given], leaves(mlps))
    exact = outcome(
        lambda given: [formula(mlp) for mlp in given], leaves(mlps, dtype=torch.float64)
    )
    names = [f"y[{k}]" for k in range(len(mlps))]
    names += [f"d{field}[{k}]" for k in range(len(mlps)) for field in FIELDS]
    for name, ours, base, truth in zip(names, got, eager, exact, strict=True):
        assert ours.shape == truth.shape and ours.is_contiguous(), name
        assert_as_accurate(name, ours.cpu(), base, truth)


def test_reference_in_fp64_is_autograds():
    mlps = leaves(GROUPS["mixed"], dtype=torch.float64)
    got = outcome(embedding_mlp, mlps)
    expected = outcome(lambda given: [formula(mlp) for mlp in given], mlps)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


def test_two_calls_are_bit_equal(backend):
    mlps = leaves(GROUPS["mixed"], device_of(backend))
    first, second = (
        outcome(lambda given: embedding_mlp(given, backend=backend), mlps) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_mlp_computes_the_same_alone_and_in_a_group(backend):
    mlps = leaves(GROUPS["factors"], device_of(backend))
    together = outcome(lambda given: embedding_mlp(given, backend=backend), mlps)
    for k, mlp in enumerate(mlps):
        alone = outcome(lambda given: embedding_mlp(given, backend=backend), [mlp])
        assert torch.equal(alone[0], together[k])
        if k == 0:  # the same upstream gradient, then
            for got, wanted in zip(alone[1:], together[2:7], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_strided_tensors_and_outputs_that_nothing_uses(backend):
    device = device_of(backend)
    (plain,) = leaves(GROUPS["one"], device)
    strided = EmbeddingMLP(
        *(t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in plain[:5])
    )
    other = leaves(GROUPS["factors"], device)
    expected = outcome(lambda given: embedding_mlp(given, backend=backend), [plain])
    got = outcome(lambda given: embedding_mlp([*given, *other], backend=backend)[:1], [strided])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_has_no_effect(backend):
    device = device_of(backend)
    mlps = leaves(GROUPS["factors"], device)
    plain = outcome(lambda given: embedding_mlp(given, backend=backend), mlps)
    with torch.autocast(device, torch.bfloat16):
        cast = outcome(lambda given: embedding_mlp(given, backend=backend), mlps)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_nothing_but_the_inputs_is_saved(backend):
    mlps = leaves(GROUPS["factors"], device_of(backend))
    given = {t.untyped_storage().data_ptr() for mlp in mlps for t in mlp[:5]}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        embedding_mlp(mlps, backend=backend)
    assert {t.untyped_storage().data_ptr() for t in kept} == given


def test_opcheck_and_one_graph_when_compiled(backend):
    mlps = leaves(GROUPS["factors"], device_of(backend))
    lists = [[getattr(mlp, field) for mlp in mlps] for field in FIELDS]
    flipped = [mlp.transposed for mlp in mlps]
    opcheck(torch.ops.stamina.embedding_mlp.default, (*lists, flipped, backend))
    plain = [[t.detach() for t in members] for members in lists]
    upstream = [y.detach() for y in embedding_mlp(mlps, backend=backend)]
    opcheck(torch.ops.stamina.embedding_mlp_backward.default, (upstream, *plain, flipped, backend))

    def compute(given):
        return list(embedding_mlp(given, backend=backend))

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    for got, expected in zip(outcome(compiled, mlps), outcome(compute, mlps), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(backend, reentrant):
    mlps = leaves(GROUPS["factors"], device_of(backend))

    def checkpointed(given):
        def compute(*_):
            return tuple(embedding_mlp(given, backend=backend))

        return checkpoint(compute, given[0].E, use_reentrant=reentrant)

    def loss(compute):
        for mlp in mlps:
            for t in mlp[:5]:
                t.grad = None
        sum(y.square().sum() for y in compute(mlps)).backward()
        return [t.grad for mlp in mlps for t in mlp[:5]]

    expected = loss(lambda given: embedding_mlp(given, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(loss(checkpointed), expected, strict=True))


def test_a_second_derivative_is_refused(backend):
    (mlp,) = leaves(GROUPS["one"], device_of(backend))
    (y,) = embedding_mlp([mlp], backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), mlp.E, create_graph=True)
    with pytest.raises(NotImplementedError, match="embedding_mlp has no second derivative"):
        gradient.sum().backward()
