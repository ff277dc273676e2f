# SPDX-License-Identifier: Apache-2.0
"""Backend `cuda`: fold, on the CPU by emulation and on a GPU where one is at hand."""

import pytest
import torch
from oracle import make_problem, shifted
from test_reference import committed, dense_delta
from torch.nn.functional import pad

from stamina_kernels import cuda, fold_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on(device, adapters):
    return [
        a._replace(A=a.A.to(device), B=a.B.to(device), bits=a.bits.to(device)) for a in adapters
    ]


def folded(initial, layer):
    weight = torch.full_like(initial, float("nan"))
    fold_([weight], [initial], [layer], backend="cuda")
    return weight.view(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fold_rounds_once_and_unfolds_exactly(cuda_device, dtype):
    shapes, ranks, concepts = [(136, 256), (40, 70), (9, 33)], [16, 3, 40], [6, 2, 0]
    layers = [committed(*s, r, n) for s, r, n in zip(shapes, ranks, concepts, strict=True)]
    initial = [make_problem([o], i, (1,), dtype=dtype).group[0].weight for o, i in shapes]
    initial[2][0, 0] = -0.0
    moved = [on(cuda_device, layer) for layer in layers]
    start = [w.to(cuda_device) for w in initial]
    weights = [torch.full_like(w, float("nan")) for w in start]
    fold_(weights, start, moved, backend="cuda")
    for weight, before, adapters in zip(weights, initial, layers, strict=True):
        exact = before.double() + sum(dense_delta(a, before.shape[1]) for a in adapters)
        terms = sum(
            abs(a.scale) * 2.0 ** sum(a.exponent) * a.A.double().abs() @ a.B.double().abs()
            for a in adapters
        )
        # half a unit of W's dtype, and fp32's of rank + concepts terms before it
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        limit = torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + smallest
        limit = limit + (40 + 6) * 2.0**-24 * terms
        assert ((weight.cpu().double() - exact).abs() <= limit).all()
    assert torch.equal(weights[2].view(torch.uint8), start[2].view(torch.uint8))
    # unfolded in place, and never learned
    rest = [torch.empty_like(w) for w in start]
    left = [moved[0][1:], moved[1][:1], []]
    fold_(rest, start, left, backend="cuda")
    fold_(weights, start, left, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(rest, weights, strict=True))


# steps: one; less than there are stages; more than are held; and 64 rows beyond whole tasks
REGULAR = [((128, 128), 16, 1), ((192, 256), 32, 1), ((64, 128), 16, 7), ((192, 128), 32, 33)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "rank", "concepts"), REGULAR)
def test_fold_of_regular_layers_gives_the_bits_of_any_addresses(
    cuda_device, dtype, shape, rank, concepts
):
    adapters = on(cuda_device, committed(*shape, rank, concepts))
    start = make_problem([shape[0]], shape[1], (1,), dtype=dtype).group[0].weight.to(cuda_device)
    expected = folded(start, adapters)
    assert torch.equal(folded(shifted(start), adapters), expected)
    for name in ("A", "B", "bits"):
        odd = [a._replace(**{name: shifted(getattr(a, name))}) for a in adapters]
        assert torch.equal(folded(start, odd), expected)
    weight = shifted(torch.full_like(start, float("nan")))
    fold_([weight], [start], [adapters], backend="cuda")
    assert torch.equal(weight.view(torch.int16), expected)


def test_fold_of_layers_that_are_regular_but_for_one_thing(cuda_device):
    start = make_problem([128], 128, (1,), dtype=torch.bfloat16).group[0].weight.to(cuda_device)
    whole = on(cuda_device, committed(128, 128, 16, 3))
    expected = folded(start, whole)
    rows = [a._replace(A=a.A[:96], bits=a.bits[:96]) for a in whole]
    assert torch.equal(folded(start[:96], rows), expected[:96])
    # 24 of a rank are one step and a half: the same as 32 with zeros
    short = on(cuda_device, committed(128, 128, 24, 2))
    padded = [a._replace(A=pad(a.A, (0, 8)), B=pad(a.B, (0, 0, 0, 8))) for a in short]
    assert torch.equal(folded(start, short), folded(start, padded))
    assert torch.equal(folded(start, short + whole), folded(start, padded + whole))
    # layers of two types in one launch
    initial = [start, start.half()]
    weights = [torch.full_like(w, float("nan")) for w in initial]
    fold_(weights, initial, [whole, whole], backend="cuda")
    for weight, begun in zip(weights, initial, strict=True):
        assert torch.equal(weight.view(torch.int16), folded(begun, whole))


def test_fold_of_regular_layers_of_several_ranks_and_shapes(cuda_device):
    shapes, ranks = [(64, 256), (320, 128)], [[16, 48, 32], [32]]
    layers = [
        on(cuda_device, [committed(*s, r, 1)[0] for r in layer])
        for s, layer in zip(shapes, ranks, strict=True)
    ]
    start = [make_problem([o], i, (1,), dtype=torch.float16).group[0].weight for o, i in shapes]
    results = []
    for initial in (
        [w.to(cuda_device) for w in start],
        [shifted(w.to(cuda_device)) for w in start],
    ):
        weights = [torch.full_like(w, float("nan")) for w in initial]
        fold_(weights, initial, layers, backend="cuda")
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "max", "-max"])
def test_fold_notices_one_element_that_is_not_finite(cuda_device, dtype, value):
    """Where every row is whole vectors and where not; the largest number itself is none."""
    for shape in ((192, 128), (9, 33)):
        (adapter,) = on(cuda_device, committed(*shape, 16, 1))
        adapter = adapter._replace(
            A=torch.zeros_like(adapter.A), bits=torch.full_like(adapter.bits, -1)
        )
        start = torch.ones(shape, dtype=dtype, device=cuda_device)
        start[-1, -1] = torch.finfo(dtype).max if value.endswith("max") else float(value)
        start[-1, -1] *= -1 if value == "-max" else 1
        weight = torch.zeros_like(start)
        if value.endswith("max"):
            fold_([weight], [start], [[adapter]], backend="cuda")
            assert torch.equal(weight, start)
            continue
        message = r"weights_init\[0\] must be finite, got 1 non-finite values"
        with pytest.raises(ValueError, match=message):
            fold_([weight], [start], [[adapter]], backend="cuda")


def test_a_fold_that_cannot_be_launched_writes_nothing(cuda_device, monkeypatch):
    """Not even layers without adapters, which need no launch."""
    (adapter,) = on(cuda_device, committed(20, 50, 3, 1))

    def refuse(*arguments):
        raise RuntimeError("cuda: launch failed")

    monkeypatch.setattr(cuda, "_launch_fold", refuse)
    weights = [torch.ones(20, 50, device=cuda_device) for _ in range(2)]
    with pytest.raises(RuntimeError, match="launch failed"):
        fold_(weights, [torch.zeros_like(w) for w in weights], [[adapter], []], backend="cuda")
    assert all(bool((weight == 1).all()) for weight in weights)


def test_fold_of_mixed_dtypes_and_fold_that_overflows(cuda_device):
    (adapter,) = on(cuda_device, committed(20, 50, 3, 1))
    initial = [torch.randn(20, 50).to(d).to(cuda_device) for d in DTYPES]
    weights = [torch.zeros_like(w) for w in initial]
    fold_(weights, initial, [[adapter]] * 3, backend="cuda")
    for weight, start in zip(weights, initial, strict=True):
        alone = torch.zeros_like(start)
        fold_([alone], [start], [[adapter]], backend="cuda")
        assert torch.equal(weight, alone)
    huge = adapter._replace(scale=1e9, bits=torch.full_like(adapter.bits, -1))
    with pytest.raises(OverflowError, match="layer 2 overflows torch.float16"):
        fold_(weights, initial, [[adapter], [], [huge]], backend="cuda")
    for weight, start in zip(weights, initial, strict=True):
        assert torch.equal(weight.view(torch.uint8), start.view(torch.uint8))
