# SPDX-License-Identifier: Apache-2.0
"""Folding, unfolding, fusing and the verbs over several concepts: exact and reversible."""

import itertools

import pytest
import torch
from stamina_adapters import (
    StaminaConfig,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    disable_stamina,
    enable_stamina,
    fold_concepts,
    fold_stamina,
    fuse_stamina,
    get_list_stamina,
    set_stamina_adapters,
    set_stamina_mask_mode,
    set_stamina_penalties,
    stamina_eval,
    stamina_parameters,
    unfold_stamina,
    unfuse_stamina,
    unload_stamina,
)
from torch import nn

from stamina_kernels import unpack_bits

NAMES = ("c0", "c1", "c2")


def weights(pipe):
    return {k: v.clone() for k, v in pipe.unet.state_dict().items() if "attn2" in k}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def three(pipe, learn):
    """A pipeline with three concepts folded, the third on fewer layers, and their states."""
    states = []
    for name in NAMES:
        learn(pipe, name, **({"target_modules": ("attn2.to_v",)} if name == "c2" else {}))
        states.append(fold_stamina(pipe))
    return pipe, states


def committed_delta(adapter):
    mask = unpack_bits(adapter.bits, adapter.B.shape[1]).double()
    product = adapter.A.double() @ adapter.B.double() * 2.0 ** sum(adapter.exponent)
    return adapter.scale * mask * product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fold_is_one_rounding_of_the_committed_sum(pipe, learn, dtype):
    pipe.unet.to(dtype)
    initial = weights(pipe)
    states = []
    for name in NAMES:
        learn(pipe, name, std=0.1)
        states.append(fold_stamina(pipe))
    rounded = []
    for path in states[0].layers:
        exact = initial[path + ".weight"].double()
        exact += sum(committed_delta(state.layers[path]) for state in states)
        got = pipe.unet.get_submodule(path).weight
        if dtype == torch.float32:
            # 3 products of rank 3 summed in fp32, then one rounding
            bound = 2**-24 * exact.abs() + 6 * 2**-24 * exact.abs().max()
            assert ((got.double() - exact).abs() <= bound).all()
        rounded.append((got == exact.to(dtype)).flatten())
    if dtype != torch.float32:
        share = {torch.bfloat16: 0.9999, torch.float16: 0.9995}[dtype]
        assert torch.cat(rounded).double().mean() >= share


def test_fold_computes_what_the_committed_masks_did(pipe, learn, render):
    base = render(pipe)
    learn(pipe)
    with stamina_eval(pipe):
        live = render(pipe)
    concept = fold_stamina(pipe)
    assert (live - base).abs().max() > 0.01
    # fp16 factors: relative error 2^-11 of an update that moves the image by about 0.1
    torch.testing.assert_close(render(pipe), live, rtol=0, atol=2e-3)
    assert all(type(pipe.unet.get_submodule(path)) is nn.Linear for path in concept.layers)
    assert not any(stamina_parameters(pipe).values())


def test_unfolding_any_subset_in_any_order_is_folding_the_rest(three, learn):
    pipe, states = three
    everything = weights(pipe)
    rest = {}
    for count in range(4):
        for kept in itertools.combinations(range(3), count):
            unload_stamina(pipe)
            fold_concepts(pipe, [states[k] for k in kept])
            rest[kept] = weights(pipe)
    unload_stamina(pipe)
    initial = weights(pipe)
    assert same(rest[()], initial)
    fold_concepts(pipe, states[::-1])
    assert same(weights(pipe), everything)
    for order in itertools.permutations(range(3)):
        left = set(range(3))
        for k in order:
            unfold_stamina(pipe, states[k])
            left.discard(k)
            assert same(weights(pipe), rest[tuple(sorted(left))])
        set_stamina_adapters(pipe, NAMES)
        assert same(weights(pipe), everything)
    unfold_stamina(pipe, ["c2", "c0"])
    assert same(weights(pipe), rest[(1,)])


def test_the_second_concept_keeps_off_the_first(pipe, learn):
    paths = learn(pipe)
    initial = weights(pipe)
    fold_stamina(pipe)
    learn(pipe, "c1")
    layer = pipe.unet.get_submodule(paths[0])
    assert torch.equal(layer.weight_init, initial[paths[0] + ".weight"])
    assert "stamina_weight_init" not in "".join(pipe.unet.state_dict())


def test_fuse_and_unfuse(pipe, learn, render):
    learn(pipe)
    fold_stamina(pipe)
    learn(pipe, "c1")
    set_stamina_mask_mode(pipe, "hard")
    before, live = weights(pipe), render(pipe)
    for _ in range(2):
        fuse_stamina(pipe)
        assert get_list_stamina(pipe)["c1"].state == "fused"
        fused = render(pipe)
        torch.testing.assert_close(fused, live, rtol=0, atol=2e-3)
        with pytest.raises(RuntimeError, match="'c1' is fused already"):
            fuse_stamina(pipe)
        unfuse_stamina(pipe)
        assert same(weights(pipe), before) and torch.equal(render(pipe), live)
    with pytest.raises(RuntimeError, match="'c1' is not fused"):
        unfuse_stamina(pipe)
    fuse_stamina(pipe)
    fold_stamina(pipe)
    assert torch.equal(render(pipe), fused)


def test_fusing_the_first_concept_costs_nothing_afterwards(pipe, learn):
    paths = learn(pipe)
    fuse_stamina(pipe)
    unfuse_stamina(pipe)
    assert pipe.unet.get_submodule(paths[0]).weight_init is None


def test_folding_twice_raises(pipe, learn):
    learn(pipe)
    fold_stamina(pipe)
    before = weights(pipe)
    with pytest.raises(RuntimeError, match="needs a live adapter.*already folded: c0"):
        fold_stamina(pipe)
    assert same(weights(pipe), before)


def test_folding_a_concept_twice_raises(three):
    pipe, states = three
    before = weights(pipe)
    with pytest.raises(ValueError, match="'c1' is folded or live already"):
        fold_concepts(pipe, [states[1]])
    unload_stamina(pipe)
    with pytest.raises(ValueError, match="'c1' is folded or live already"):
        fold_concepts(pipe, [states[1], states[1]])
    fold_concepts(pipe, states)
    assert same(weights(pipe), before)


@pytest.mark.parametrize("fold", [fold_stamina, fuse_stamina])
def test_not_finite_factors_change_nothing(three, learn, snapshot, assert_same, fold):
    pipe, _ = three
    paths = learn(pipe, "c3")
    pipe.unet.get_submodule(paths[-1]).B.data[0, 0] = float("nan")
    before, listed = snapshot(pipe), get_list_stamina(pipe)
    pattern = f"'c3', layer '{paths[-1]}'.*B"
    with pytest.raises(ValueError, match=pattern):
        fold(pipe)
    assert all(torch.equal(before["unet bits"][k], v) for k, v in weights(pipe).items()
               if "weight" in k)  # fmt: skip
    assert get_list_stamina(pipe) == listed


@pytest.mark.parametrize("fold", [fold_stamina, fuse_stamina])
def test_overflow_restores_the_weights_of_the_earlier_concepts(pipe, learn, fold):
    pipe.unet.half()
    learn(pipe)
    fold_stamina(pipe)
    before = weights(pipe)
    paths = learn(pipe, "c1", target_modules=("attn2.to_k", "attn2.to_v", "attn2.to_q"))
    pipe.unet.get_submodule(paths[-1]).A.data.fill_(3e5)
    pipe.unet.get_submodule(paths[-1]).B.data.fill_(3e5)
    with pytest.raises(OverflowError):
        fold(pipe)
    now = weights(pipe)
    assert all(torch.equal(now[k], v) for k, v in before.items())
    assert get_list_stamina(pipe)["c1"].state == "live"
    query = next(p for p in paths if p.endswith("to_q"))
    assert pipe.unet.get_submodule(query).weight_init is None


def test_overflowing_weights_restore_the_weights(three):
    pipe, _ = three
    pipe.unet.half()
    set_stamina_adapters(pipe, NAMES)
    before, listed = weights(pipe), get_list_stamina(pipe)
    with pytest.raises(OverflowError):
        set_stamina_adapters(pipe, NAMES, 1e7)
    assert same(weights(pipe), before) and get_list_stamina(pipe) == listed


def test_deleting_while_disabled(three):
    pipe, states = three
    unload_stamina(pipe)
    initial = weights(pipe)
    fold_concepts(pipe, states[1:])
    disable_stamina(pipe)
    delete_stamina(pipe, "c1")
    assert same(weights(pipe), initial)
    layers = [m for m in pipe.unet.modules() if "stamina_weight_init" in m._buffers]
    assert len(layers) == len(states[2].layers)
    enable_stamina(pipe)
    now = weights(pipe)
    unload_stamina(pipe)
    fold_concepts(pipe, states[2:])
    assert same(weights(pipe), now)


def test_weights_scale_concepts_and_zero_leaves_them_out(three):
    pipe, states = three
    everything = weights(pipe)
    set_stamina_adapters(pipe, ["c1", "c0"], [0.5, 2.0])
    listed = {name: info.weight for name, info in get_list_stamina(pipe).items()}
    assert listed == {"c0": 2.0, "c1": 0.5, "c2": 0.0}
    mixed = weights(pipe)
    unload_stamina(pipe)
    initial = weights(pipe)
    fold_concepts(pipe, states[:2], [2.0, 0.5])
    assert same(weights(pipe), mixed)
    fold_concepts(pipe, states[2:], [0.0])
    set_stamina_adapters(pipe, NAMES)
    assert same(weights(pipe), everything)
    set_stamina_adapters(pipe, [])
    assert same(weights(pipe), initial)


def test_disable_and_enable(three, learn, render):
    pipe, _ = three
    learn(pipe, "c3")
    set_stamina_mask_mode(pipe, "hard")
    image, bits = render(pipe), weights(pipe)
    disable_stamina(pipe)
    with pytest.raises(RuntimeError, match="disabled, call enable_stamina"):
        fold_stamina(pipe)
    plain = render(pipe)
    enable_stamina(pipe)
    assert torch.equal(render(pipe), image) and same(weights(pipe), bits)
    unload_stamina(pipe)
    assert torch.equal(render(pipe), plain)


def test_live_adapter_takes_a_weight(pipe, learn, render):
    base = render(pipe)
    learn(pipe, alpha=1.5)
    set_stamina_mask_mode(pipe, "hard")
    full = render(pipe)
    set_stamina_adapters(pipe, "c0", 0.25)
    quarter = render(pipe)
    assert not torch.equal(quarter, full) and not torch.equal(quarter, base)
    set_stamina_adapters(pipe, [])
    assert torch.equal(render(pipe), base)
    set_stamina_adapters(pipe, "c0", 0.25)
    fold_stamina(pipe)
    torch.testing.assert_close(render(pipe), quarter, rtol=0, atol=2e-3)


def test_delete(three, learn, render):
    pipe, states = three
    unload_stamina(pipe)
    initial = weights(pipe)
    fold_concepts(pipe, states[1:])
    rest = weights(pipe)
    fold_concepts(pipe, states[:1])
    learn(pipe, "c3")
    fuse_stamina(pipe)
    delete_stamina(pipe, ["c3", "c0"])
    assert same(weights(pipe), rest) and list(get_list_stamina(pipe)) == ["c1", "c2"]
    delete_stamina(pipe, ["c1", "c2"])
    assert same(weights(pipe), initial) and get_list_stamina(pipe) == {}
    apply_stamina(pipe, StaminaConfig(r=2), "c0")


def test_delete_takes_the_words_along(pipe, learn):
    for name in ("c0", "c1"):
        learn(pipe, name)
        add_custom_token(pipe, f"<{name}>")
        fold_stamina(pipe)
    row = pipe.text_encoder.get_input_embeddings().weight[-1].clone()
    delete_stamina(pipe, "c0")
    assert "<c0>" not in pipe.tokenizer.get_vocab()
    number = pipe.tokenizer.convert_tokens_to_ids("<c1>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[number], row)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p: set_stamina_adapters(p, "x"), ValueError, "no concept named 'x', there are c0"),
        (lambda p: set_stamina_adapters(p, ["c0", "c0"]), ValueError, "given twice"),
        (lambda p: set_stamina_adapters(p, "c0", float("nan")), ValueError, "weights must be fin"),
        (lambda p: set_stamina_adapters(p, "c0", [1.0, 2.0]), ValueError, "one entry per concept"),
        (lambda p: delete_stamina(p, "x"), ValueError, "no concept named 'x'"),
        (lambda p: unfold_stamina(p, "x"), ValueError, "no concept named 'x'"),
    ],
)
def test_verbs_refuse(three, call, error, message):
    pipe, _ = three
    before = weights(pipe)
    with pytest.raises(error, match=message):
        call(pipe)
    assert same(weights(pipe), before)


def test_verbs_on_an_untouched_model(pipe, learn, snapshot, assert_same):
    before = snapshot(pipe)
    assert get_list_stamina(pipe) == {}
    unload_stamina(pipe)
    for verb in (enable_stamina, disable_stamina):
        with pytest.raises(RuntimeError, match="has no concepts"):
            verb(pipe)
    assert_same(before, snapshot(pipe))
    learn(pipe)
    with pytest.raises(ValueError, match="'c0' is not in the weights"):
        unfold_stamina(pipe, "c0")


def test_works_on_a_plain_module(learn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 5))
    x = torch.randn(4, 9)
    base = model(x)
    learn(model, target_modules=("0", "2"))
    with stamina_eval(model):
        live = model(x)
    concept = fold_stamina(model)
    torch.testing.assert_close(model(x), live, rtol=2e-2, atol=2e-2)
    unload_stamina(model)
    assert torch.equal(model(x), base)
    fold_concepts(model, [concept])
    assert set(get_list_stamina(model)) == {"c0"}


def test_what_is_attached_and_folded_under_inference_mode_can_be_trained(pipe, learn):
    arguments = torch.randn(1, 4, 8, 8), 1
    with torch.inference_mode():
        learn(pipe)
        fold_stamina(pipe)
        add_custom_token(pipe, "<v1>")
        learn(pipe, "c1")
    set_stamina_penalties(pipe, forget=0.1, sparse=0.1)
    prompt = pipe.text_encoder(pipe.tokenizer("<v1>", return_tensors="pt").input_ids)[0]
    pipe.unet(*arguments, prompt).sample.square().mean().backward()
    parameters = sum(stamina_parameters(pipe).values(), [])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_a_model_made_under_inference_mode_takes_finished_concepts(pipe, pipe_of, learn, render):
    learn(pipe)
    concept = fold_stamina(pipe)
    image = render(pipe)
    unload_stamina(pipe)
    with torch.inference_mode():
        other = pipe_of(pipe)
        fold_concepts(other, [concept])
        assert torch.equal(render(other), image)
        unload_stamina(other)
