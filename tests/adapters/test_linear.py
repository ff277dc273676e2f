# SPDX-License-Identifier: Apache-2.0
"""StaminaLinear against the formula in fp64, its penalties, dtypes and grouping."""

import pytest
import torch
from stamina_adapters import StaminaConfig, StaminaLinear
from stamina_adapters.linear import project_together
from torch import nn
from torch.nn import functional as F

from stamina_kernels import masked_linear, sample_mask, unpack_bits


def layer(name="c0", rows=33, columns=41, bias=True, layer_id=7, **settings):
    torch.manual_seed(0)
    config = StaminaConfig(**{"r": 3, "mask_rank": 5, "alpha": 1.5, **settings})
    made = StaminaLinear.attach(
        nn.Linear(columns, rows, bias=bias),
        config,
        adapter_name=name,
        layer_id=layer_id,
        mask_seed=-5,
        init_seed=1,
    )
    with torch.no_grad():
        made.A.normal_(std=0.3)
    return made


def mask_of(linear):
    bits = sample_mask(linear.projection(), seed=linear.seed, step=linear.step, hard=linear.hard)
    return unpack_bits(bits, linear.in_features).double()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_formula(hard, bias):
    linear = layer(bias=bias)
    linear.hard = hard
    linear.step.fill_(11)
    x = torch.randn(2, 5, linear.in_features)
    W, A, B = (t.detach().double() for t in (linear.weight, linear.A, linear.B))
    effective = W + linear.scale.double() * mask_of(linear) * (A @ B)
    expected = x.double() @ effective.T + (linear.bias.detach().double() if bias else 0)
    # 41 fp32 products per output, each factor rounded once
    torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=41 * 2**-23 * 4)


def test_starts_as_the_layer_it_was_and_turns_back():
    plain = nn.Linear(41, 33)
    x = torch.randn(3, 41)
    expected, keys, identity = plain(x), set(plain.state_dict()), id(plain.weight)
    config = StaminaConfig(r=3, mask_rank=5)
    linear = StaminaLinear.attach(
        plain, config, adapter_name="c0", layer_id=1, mask_seed=0, init_seed=0
    )
    assert linear is plain and id(linear.weight) == identity
    # D = 0: the same 41 products and bias, summed by other code, each step rounded at 2^-24
    size = F.linear(x.abs(), linear.weight.abs(), linear.bias.abs())
    assert ((linear(x) - expected).abs() <= 2 * 42 * 2**-24 * size).all()
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    stored = set(linear.state_dict())
    assert keys < stored and not stored & {"seed", "step", "scale", "tau"}
    back = linear.detach()
    assert type(back) is nn.Linear and set(back.state_dict()) == keys and not list(back.buffers())
    assert back.weight.requires_grad and back.bias.requires_grad
    assert torch.equal(back(x), expected)


def test_mask_mode_does_not_follow_train_and_eval():
    linear = layer()
    x = torch.randn(4, 41)
    sampled = linear(x)
    assert torch.equal(linear.eval()(x), sampled)
    linear.hard = True
    assert torch.equal(linear.train()(x), linear.eval()(x))
    assert not torch.equal(linear(x), sampled)


def test_steps_and_seeds_select_the_mask():
    linear = layer()
    x = torch.randn(4, 41)
    first = linear(x)
    linear.step.fill_(1)
    second = linear(x)
    linear.step.fill_(0)
    assert torch.equal(linear(x), first) and not torch.equal(second, first)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
def test_penalties_enter_the_gradient_with_their_weights(kind):
    linear = layer(sparse_kind=kind)
    linear.register_buffer(
        "stamina_weight_init", linear.weight + torch.randn(33, 41), persistent=False
    )
    parameters = [linear.A, linear.B, *linear.mask.parameters()]
    x = torch.randn(6, 41)

    linear.forget_weight.fill_(0.3)
    linear.sparse_weight.fill_(0.02)
    ours = torch.autograd.grad(linear(x).square().sum(), parameters)

    out = masked_linear(
        x,
        linear.projection(),
        scale=linear.scale,
        tau=linear.tau,
        seed=linear.seed,
        step=linear.step,
        sparse_kind=kind,
    )
    task = out.y.square().sum()
    loss = task + 0.3 * out.forget.sum() + 0.02 * out.sparse.sum()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    for got, want in zip(ours, expected, strict=True):
        # 0.3 and 0.02 are rounded to fp32 once on each side
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    without = torch.autograd.grad(task, parameters)
    assert not any(map(torch.allclose, ours[:2], without))


def test_forward_stores_nothing_on_the_module():
    linear = layer()
    before = {k: id(v) for k, v in [*vars(linear).items(), *linear._buffers.items()]}
    linear(torch.randn(2, 41)).sum().backward()
    assert {k: id(v) for k, v in [*vars(linear).items(), *linear._buffers.items()]} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_stays_fp32_when_the_model_is_cast(dtype):
    linear = layer()
    values = [p.detach().clone() for p in (linear.A, linear.B, *linear.mask.parameters())]
    linear.to(dtype)
    assert linear.weight.dtype == linear.bias.dtype == dtype
    kept = (linear.A, linear.B, *linear.mask.parameters())
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True))
    assert linear.seed.dtype == torch.int64 and linear.scale.dtype == torch.float32
    y = linear(torch.randn(2, 41, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert linear.A.grad.dtype == torch.float32


def test_statistics():
    linear = layer()
    linear.hard = True
    initial = linear.weight.clone()
    initial[:5] += 1.0
    linear.register_buffer("stamina_weight_init", initial, persistent=False)
    mask = mask_of(linear)
    delta = linear.scale * mask * (linear.A @ linear.B).double()
    U, V, b = linear.mask()
    stats = linear.statistics()
    assert stats["density"] == pytest.approx(mask.mean().item())
    assert stats["overlap"] == pytest.approx((mask[:5].sum() / mask.sum()).item())
    assert stats["forget"] == pytest.approx(
        ((linear.weight - initial) * delta).square().sum().item(), rel=1e-4
    )
    assert stats["sparse"] == pytest.approx((U @ V + b).sigmoid().sum().item(), rel=1e-4)


def test_attach_refuses_subclasses():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match="exactly nn.Linear, got Quantised"):
        StaminaLinear.attach(
            Quantised(4, 4),
            StaminaConfig(),
            adapter_name="c0",
            layer_id=0,
            mask_seed=0,
            init_seed=0,
        )


def test_together_is_one_by_one():
    k, v = layer(layer_id=1), layer(layer_id=2, rows=17)
    plain, other = nn.Linear(41, 9), layer(name="other", layer_id=3)
    x = torch.randn(2, 5, 41)
    for group in ([k, v], [plain, k, v], [k, other], [plain], [k, plain, v, other]):
        for got, single in zip(project_together(group, x), group, strict=True):
            torch.testing.assert_close(got, single(x), rtol=0, atol=1e-5)


def test_together_respects_hooks_and_inactive_layers():
    k, v = layer(layer_id=1), layer(layer_id=2)
    x = torch.randn(3, 41)
    expected = k(x)
    calls = []
    handle = v.register_forward_hook(lambda module, args, out: calls.append(1))
    project_together([k, v], x)
    assert calls == [1]
    handle.remove()
    v.active = False
    got = project_together([k, v], x)
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], nn.functional.linear(x, v.weight, v.bias))
