# SPDX-License-Identifier: Apache-2.0
"""StaminaAttnProcessor2_0: the same numbers as the default processor, whatever the layers are."""

import sys
from types import ModuleType

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from stamina_adapters import (
    StaminaAttnProcessor2_0,
    StaminaXFormersAttnProcessor,
    fold_stamina,
    set_stamina_attn_processor,
    set_stamina_mask_mode,
    unload_stamina,
)
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def xformers(monkeypatch):
    """xformers' interface, as far as processors use it, computed by torch."""

    def memory_efficient_attention(query, key, value, *, attn_bias, op, scale):
        if query.dim() == 3:  # heads in the batch, as diffusers calls it
            return F.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)
        assert all(t.is_contiguous() for t in (query, key, value))
        if attn_bias is not None:
            batch, length, heads, _ = query.shape
            assert attn_bias.shape == (batch, heads, length, key.shape[1])
        moved = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*moved, attn_bias, scale=scale).transpose(1, 2)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_processor, "xformers", package)


def attention(**settings):
    torch.manual_seed(0)
    return Attention(query_dim=24, heads=3, dim_head=8, bias=True, **settings).eval()


CASES = {
    "self": ({}, False, False, False),
    "cross": ({"cross_attention_dim": 20}, True, False, False),
    "cross with mask": ({"cross_attention_dim": 20}, True, True, False),
    "normalised encoder": (
        {"cross_attention_dim": 20, "cross_attention_norm": "layer_norm"},
        True,
        False,
        False,
    ),
    "normalised q and k": ({"qk_norm": "layer_norm"}, False, False, False),
    "image, group norm, residual, rescaled": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7},
        False,
        False,
        True,
    ),
}


PROCESSORS = {
    "default": (AttnProcessor2_0, StaminaAttnProcessor2_0),
    "xformers": (XFormersAttnProcessor, StaminaXFormersAttnProcessor),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("case", CASES)
def test_same_as_the_stock_processor(case, kind, adapted, learn, xformers):
    if kind == "xformers" and case == "normalised q and k":
        pytest.skip("diffusers' xFormers processor leaves the norms of q and k out")
    stock, ours = PROCESSORS[kind]
    settings, cross, masked, image = CASES[case]
    attn = attention(**settings)
    if adapted:
        learn(attn, target_modules=("to_k", "to_v") if cross else ("to_q", "to_k", "to_v"))
    hidden = torch.randn(2, 24, 3, 4) if image else torch.randn(2, 12, 24)
    encoded = torch.randn(2, 7, 20) if cross else None
    mask = torch.zeros(2, 1, 7) if masked else None
    if masked:
        mask[1, :, 3:] = -10000.0
    attn.set_processor(stock())
    expected = attn(hidden, encoded, attention_mask=mask)
    attn.set_processor(ours())
    got = attn(hidden, encoded, attention_mask=mask)
    # only the projections' GEMM may add in another order: 24 fp32 terms of size one
    torch.testing.assert_close(got, expected, rtol=0, atol=24 * 2**-23)
    if not adapted and kind == "default":
        assert torch.equal(got, expected)


@pytest.mark.parametrize("stock", [AttnProcessor2_0, XFormersAttnProcessor])
@pytest.mark.parametrize(
    "targets", [("attn2.to_k", "attn2.to_v"), ("attn1.to_q", "attn1.to_k", "attn1.to_v")]
)
def test_one_launch_for_the_projections_that_share_an_input(
    pipe, learn, sizes, xformers, targets, stock
):
    learn(pipe, target_modules=targets)
    pipe.unet.set_attn_processor(stock())
    set_stamina_attn_processor(pipe)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 40)
    pipe.unet(latents, 5, text)
    # the encoder's states are those of all blocks, a block's own states its alone
    assert sizes == ([8] if "attn2.to_k" in targets else [3] * 4)


@pytest.mark.parametrize("share", [False, True])
def test_gradients_are_those_of_separate_launches(pipe, learn, share):
    from stamina_adapters import set_stamina_penalties, stamina_parameters

    learn(pipe)
    fold_stamina(pipe)
    learn(pipe, "c1")
    set_stamina_penalties(pipe, forget=0.5, sparse=0.01)
    parameters = [p for group in stamina_parameters(pipe).values() for p in group]
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 40)

    def gradients():
        return torch.autograd.grad(pipe.unet(latents, 5, text).sample.square().sum(), parameters)

    separate = gradients()
    set_stamina_attn_processor(pipe, share=share)
    for got, want in zip(gradients(), separate, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_setting_keeps_other_processors_and_unloading_restores(pipe, learn, render):
    names = list(pipe.unet.attn_processors)
    originals = dict(pipe.unet.attn_processors)
    sliced = SlicedAttnProcessor(1)
    pipe.unet.set_attn_processor({**originals, names[0]: sliced})
    assert set(set_stamina_attn_processor(pipe)) == set(names[1:])
    now = pipe.unet.attn_processors
    assert now[names[0]] is sliced
    assert all(type(now[name]) is StaminaAttnProcessor2_0 for name in names[1:])
    learn(pipe)
    unload_stamina(pipe)
    after = pipe.unet.attn_processors
    assert after[names[0]] is sliced
    assert all(after[name] is originals[name] for name in names[1:])


def test_losing_the_processor_loses_no_weights(pipe, learn, render):
    learn(pipe)
    set_stamina_mask_mode(pipe, "hard")
    set_stamina_attn_processor(pipe)
    image = render(pipe)
    pipe.enable_attention_slicing(1)
    # slicing computes the attention itself in another order
    torch.testing.assert_close(render(pipe), image, rtol=0, atol=1e-4)


def test_refuses_models_without_default_processors(pipe):
    with pytest.raises(TypeError, match="Linear has no attention processors"):
        set_stamina_attn_processor(nn.Linear(2, 2))
    pipe.unet.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.raises(ValueError, match="only SlicedAttnProcessor"):
        set_stamina_attn_processor(pipe)


def test_xformers_keeps_its_operator_and_is_named_where_missing(pipe, xformers, monkeypatch):
    stock = XFormersAttnProcessor(attention_op="cutlass")
    pipe.unet.set_attn_processor(stock)
    set_stamina_attn_processor(pipe)
    processors = pipe.unet.attn_processors.values()
    assert all(type(p) is StaminaXFormersAttnProcessor for p in processors)
    assert {p.attention_op for p in processors} == {"cutlass"}
    unload_stamina(pipe)
    assert all(p is stock for p in pipe.unet.attn_processors.values())
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ImportError, match="xformers"):
        StaminaXFormersAttnProcessor()
