# SPDX-License-Identifier: Apache-2.0
"""K and V of all blocks in one launch: only where that changes nothing."""

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from stamina_adapters import (
    linear,
    set_stamina_attn_processor,
    set_stamina_penalties,
    sharing,
    stamina_parameters,
)
from torch import nn


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


def test_sharing_can_be_turned_off_and_on(pipe, learn, inputs, sizes):
    learn(pipe)
    set_stamina_attn_processor(pipe, share=False)
    pipe.unet(*inputs)
    assert sizes == [2] * 4
    for share in (True, True, False):
        sizes.clear()
        assert set_stamina_attn_processor(pipe, share=share) == []
        pipe.unet(*inputs)
        assert sizes == ([8] if share else [2] * 4)


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
        # a layer's penalties count once, though its shared output was made too
        assert_close(gradients(unet, inputs), want)
    assert sizes == [2, 6]
    unet(*inputs)
    assert sizes == [2, 6] * 2


def test_penalties_are_those_of_the_layers_that_the_loss_uses(pipe, learn, inputs):
    learn(pipe)
    set_stamina_penalties(pipe, sparse=0.01)
    parameters = stamina_parameters(pipe)["mask"]
    first = next(m for m in pipe.unet.modules() if hasattr(m, "attn2"))
    seen = []
    first.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))

    def penalties():
        pipe.unet(*inputs)
        return torch.autograd.grad(seen.pop().sum(), parameters, allow_unused=True)

    alone = penalties()
    set_stamina_attn_processor(pipe)
    got = penalties()
    assert any(g is None for g in alone)
    for mine, want in zip(got, alone, strict=True):
        if want is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def run_first_attention(unet, monkeypatch, context):
    """Have the first attention of all run in a context of its own."""
    attention = next(m for m in unet.modules() if hasattr(m, "attn2")).attn2
    original = attention.forward

    def inside(*args, **kwargs):
        with context():
            return original(*args, **kwargs).float()

    monkeypatch.setattr(attention, "forward", inside)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "autocast"],
)
def test_a_block_with_modes_of_its_own_decides_for_no_other(unet, inputs, monkeypatch, context):
    run_first_attention(unet, monkeypatch, context)
    parameters = [p for group in stamina_parameters(unet).values() for p in group]

    def results():
        output = unet(*inputs).sample
        found = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
        return output, [g for g in found if g is not None]

    first, again = results(), results()
    set_stamina_attn_processor(unet, share=False)
    output, alone = results()
    assert alone
    for shared in (first, again):
        torch.testing.assert_close(shared[0], output, rtol=0, atol=1e-5)
        assert_close(shared[1], alone)


def test_threads_share_nothing(pipe, learn, monkeypatch):
    """The second thread enters while the first one computes, and projects before it is done."""
    learn(pipe)
    set_stamina_attn_processor(pipe)
    unet = pipe.unet.requires_grad_(False)
    latents, prompts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 7, 40)
    wanted = [unet(latents, 1, prompt).sample for prompt in prompts]
    entered, computed, finished = (threading.Event() for _ in range(3))
    attention = next(m for m in unet.modules() if hasattr(m, "attn2")).attn2
    compute, enter, attend = (
        sharing.project_group,
        unet.conv_in.forward,
        attention.to_out[0].forward,
    )
    current = threading.current_thread

    def slow_compute(group, x):
        outputs = compute(group, x)
        if current().name == "first":
            assert entered.wait(10)
        return outputs

    def enter_after(x):
        if current().name == "second":
            entered.set()
            assert computed.wait(10)
        return enter(x)

    def attend_last(x):
        if current().name == "first":
            computed.set()
            assert finished.wait(10)
        return attend(x)

    monkeypatch.setattr(sharing, "project_group", slow_compute)
    monkeypatch.setattr(unet.conv_in, "forward", enter_after)
    monkeypatch.setattr(attention.to_out[0], "forward", attend_last)
    outputs = {}

    def run(prompt):
        outputs[current().name] = unet(latents, 1, prompt).sample

    threads = [
        threading.Thread(target=run, args=(prompt,), name=name)
        for name, prompt in zip(("first", "second"), prompts, strict=True)
    ]
    for thread in threads:
        thread.start()
    threads[1].join()
    finished.set()
    threads[0].join()
    for name, want in zip(("first", "second"), wanted, strict=True):
        torch.testing.assert_close(outputs[name], want, rtol=0, atol=1e-5)


def test_a_forward_that_raised_changes_nothing(unet, inputs, sizes):
    want = gradients(unet, inputs)

    def fail(*_):
        raise RuntimeError("interrupted")

    handle = unet.mid_block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        unet(*inputs)
    handle.remove()
    copy.deepcopy(unet)
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
    handle = unet.down_blocks[0].register_forward_pre_hook(lambda *_: None)
    unet(*inputs)
    assert len(sizes) > 1 and sum(sizes) == 8
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
    assert sizes == [8]


def test_the_models_own_autocast_and_projection_come_first(pipe, learn, inputs, sizes):
    """accelerate's autocast is around the forward, and a UNet may widen the encoder's states."""
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    config |= {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}
    unet = type(pipe.unet)(**config)
    learn(unet, target_modules=("attn2.to_k", "attn2.to_v"))
    set_stamina_attn_processor(unet)
    latents, times, _ = inputs
    states = torch.randn(1, 7, 24)
    want = unet(latents, times, states).sample
    set_stamina_attn_processor(unet, share=False)
    assert torch.equal(unet(latents, times, states).sample, want)

    learn(pipe)
    set_stamina_attn_processor(pipe)
    original, dtypes = pipe.unet.forward, []

    def cast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return original(*arguments)

    pipe.unet.forward = cast
    attention = next(m for m in pipe.unet.modules() if hasattr(m, "attn2")).attn2
    project = attention.processor.shared.project

    def seen(layers, x):
        outputs = project(layers, x)
        dtypes.extend(y.dtype for y in outputs)
        return outputs

    attention.processor.shared.project = seen
    sizes.clear()
    pipe.unet(*inputs)
    assert sizes == [8] and set(dtypes) == {torch.bfloat16}


def test_blocks_that_are_compiled_one_by_one(unet, inputs):
    want = unet(*inputs).sample
    torch._dynamo.reset()
    for block in unet.modules():
        if hasattr(block, "attn2"):
            block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(unet(*inputs).sample, want)


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
