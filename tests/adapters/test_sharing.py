# SPDX-License-Identifier: Apache-2.0
"""K and V of all blocks in one launch: only where that changes nothing."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from stamina_adapters import linear, set_stamina_attn_processor, stamina_parameters
from torch import nn


@pytest.fixture
def sizes(monkeypatch):
    """Layers of every launch."""
    sizes = []
    original = linear.masked_linear

    def counting(x, projections, **rest):
        sizes.append(len(projections))
        return original(x, projections, **rest)

    monkeypatch.setattr(linear, "masked_linear", counting)
    return sizes


@pytest.fixture
def inputs():
    return torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 40)


def gradients(unet, inputs):
    parameters = [p for group in stamina_parameters(unet).values() for p in group]
    return torch.autograd.grad(unet(*inputs).sample.square().sum(), parameters)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def block_with_states_of_its_own(unet):
    """A hook that gives the first block a copy of the encoder's states."""
    block = next(m for m in unet.modules() if hasattr(m, "attn2"))

    def copied(_, args, kwargs):
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].clone()}

    return block.register_forward_pre_hook(copied, with_kwargs=True)


def test_states_by_name_and_by_position(unet, inputs, sizes):
    latents, times, states = inputs
    unet(latents, times, states)
    unet(latents, times, encoder_hidden_states=states)
    assert sizes == [8, 8]


def test_sharing_can_be_turned_off(pipe, learn, inputs, sizes):
    learn(pipe)
    set_stamina_attn_processor(pipe, share=False)
    pipe.unet(*inputs)
    assert sizes == [2] * 4


def test_a_group_holds_at_most_so_many_weights(unet, inputs, sizes, monkeypatch):
    together = gradients(unet, inputs)
    widest = max(
        p.numel() for name, p in unet.named_parameters() if name.endswith("attn2.to_k.weight")
    )
    monkeypatch.setattr(linear, "_MOST_WEIGHTS", 2 * widest)
    assert_close(gradients(unet, inputs), together)
    assert len(sizes) > 2 and sum(sizes[1:]) == 8


def test_layers_that_get_other_states_are_left_out(unet, inputs, sizes, caplog):
    want = gradients(unet, inputs)
    block_with_states_of_its_own(unet)
    sizes.clear()
    with caplog.at_level(logging.INFO, "stamina_adapters.sharing"):
        unet(*inputs)
    assert sizes == [8, 2] and "2 projections do not get" in caplog.text
    assert_close(gradients(unet, inputs), want)  # the penalties of the first block count once
    assert sizes == [8, 2, 6, 2]


def test_a_forward_that_raised_changes_nothing(unet, inputs, sizes):
    want = gradients(unet, inputs)

    def fail(*_):
        raise RuntimeError("interrupted")

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        unet(*inputs)
    handle.remove()
    sizes.clear()
    assert_close(gradients(unet, inputs), want)
    assert sizes == [8]


def test_blocks_that_are_called_alone_compute_for_themselves(unet, inputs, sizes):
    unet(*inputs)
    sizes.clear()
    attention = next(m for m in unet.modules() if hasattr(m, "attn2")).attn2
    attention(torch.randn(1, 3, attention.to_q.in_features), inputs[2])
    assert sizes == [2]


def test_layers_with_hooks_and_replicas_share_nothing(unet, inputs, sizes):
    layer = next(m for m in unet.modules() if hasattr(m, "attn2")).attn2.to_v
    handle = layer.register_forward_hook(lambda *_: None)
    unet(*inputs)
    assert sizes == [7, 1]
    handle.remove()
    sizes.clear()
    unet._is_replica = True
    unet(*inputs)
    assert sizes == [2] * 4


def test_weights_that_come_with_the_forward_are_waited_for(unet, inputs, sizes):
    """As where accelerate offloads a whole model: its forward brings the weights, after hooks."""
    want = unet(*inputs).sample
    original = unet.forward
    layers = [m for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    weights = [layer.weight for layer in layers]

    def bring(*arguments):
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight
        return original(*arguments)

    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    unet.forward = bring
    sizes.clear()
    torch.testing.assert_close(unet(*inputs).sample, want)
    assert sizes == [2] * 4


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_is_kept_after_the_forward(unet, trained):
    states = torch.randn(1, 7, 40)
    alive = weakref.ref(states)
    with torch.set_grad_enabled(trained):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), states)
    del states
    gc.collect()
    assert alive() is None


def test_a_copy_of_the_model_shares_on_its_own(unet, inputs, sizes):
    want = gradients(unet, inputs)
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        for parameters in stamina_parameters(unet).values():
            for parameter in parameters:
                parameter.zero_()
    sizes.clear()
    assert_close(gradients(copied, inputs), want)
    assert sizes == [8]
