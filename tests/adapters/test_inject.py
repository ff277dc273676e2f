# SPDX-License-Identifier: Apache-2.0
"""Attaching and detaching, the setters, and what attaching refuses."""

import copy
import hashlib

import pytest
import torch
from peft import LoraConfig
from stamina_adapters import (
    StaminaConfig,
    StaminaLinear,
    TokenConfig,
    add_custom_token,
    apply_stamina,
    fold_stamina,
    inject,
    set_stamina_attn_processor,
    set_stamina_mask_mode,
    set_stamina_penalties,
    set_stamina_step,
    stamina_eval,
    stamina_parameters,
    stamina_statistics,
    unload_stamina,
)
from stamina_adapters.models import layer_at
from torch import nn


def test_attach_and_detach_leave_the_pipeline_as_it_was(pipe, render, snapshot, assert_same):
    before, image = snapshot(pipe), render(pipe)
    state = torch.get_rng_state()
    paths = apply_stamina(pipe, StaminaConfig(r=4))
    set_stamina_attn_processor(pipe)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(render(pipe), image)
    assert paths and all(p.endswith(("attn2.to_k", "attn2.to_v")) for p in paths)
    found = [p for p, m in pipe.unet.named_modules() if isinstance(m, StaminaLinear)]
    assert sorted(found) == sorted(paths)
    unload_stamina(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(render(pipe), image)


def test_layer_ids_and_seeds_follow_the_contract(pipe):
    paths = apply_stamina(pipe, StaminaConfig(r=2), "mask")
    layer = pipe.unet.get_submodule(paths[0])
    digest = hashlib.sha256(f"mask/{paths[0]}".encode()).digest()
    assert layer.adapter.layer_id == int.from_bytes(digest[:4], "big")
    seeds = {pipe.unet.get_submodule(p).seed.item() for p in paths}
    unload_stamina(pipe)
    apply_stamina(pipe, StaminaConfig(r=2), "other")
    assert len(seeds) == 1 and layer.seed.item() not in seeds


def test_full_path_and_module_targets(pipe):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    config = StaminaConfig(target_modules=(name, "attn1.to_q"))
    paths = apply_stamina(pipe.unet, config)
    assert name in paths and sum(p.endswith("attn1.to_q") for p in paths) == len(paths) - 1
    # a suffix is whole components: "to_k" must not match "not_to_k"
    model = nn.ModuleDict({"not_to_k": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)})
    assert apply_stamina(model, StaminaConfig(target_modules=("to_k",))) == ["to_k"]


@pytest.mark.parametrize(
    "targets, error, message",
    [
        (("attn3.to_k",), ValueError, "no module of UNet2DConditionModel .* 'attn3.to_k'"),
        (("attn2.to_k", "to_x"), ValueError, "'to_x'"),
        (("conv_in",), TypeError, "'conv_in' is a Conv2d: convolutions cannot be adapted"),
        (("norm2",), TypeError, "is LayerNorm, not an nn.Linear"),
    ],
)
def test_targets_that_cannot_be_served(pipe, snapshot, assert_same, targets, error, message):
    before = snapshot(pipe)
    with pytest.raises(error, match=message):
        apply_stamina(pipe, StaminaConfig(target_modules=targets))
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("name", ["to_qkv", "to_kv", "qkv", "to_qkv_mlp_proj", "query_key_value"])
def test_always_fused_projections_raise_by_name(name):
    model = nn.ModuleDict({name: nn.Linear(4, 12)})
    with pytest.raises(TypeError, match=f"'{name}' is an always-fused projection"):
        apply_stamina(model, StaminaConfig(target_modules=(name,)))


def test_subclasses_of_linear_raise_by_name():
    class Linear4bit(nn.Linear):
        pass

    model = nn.ModuleDict({"to_k": Linear4bit(4, 4), "to_v": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match="'to_k' is Linear4bit, a subclass of nn.Linear"):
        apply_stamina(model, StaminaConfig(target_modules=("to_k", "to_v")))
    assert type(model["to_v"]) is nn.Linear


def test_names(pipe, learn):
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="adapter_name must be"):
            apply_stamina(pipe, adapter_name=name)
    learn(pipe, "c0")
    with pytest.raises(RuntimeError, match="'c0' is live"):
        apply_stamina(pipe, adapter_name="c1")
    fold_stamina(pipe)
    with pytest.raises(ValueError, match="'c0' is taken"):
        apply_stamina(pipe, adapter_name="c0")


def test_layer_id_collisions_raise(pipe, monkeypatch):
    monkeypatch.setattr(inject, "layer_id", lambda name, path: 5)
    with pytest.raises(ValueError, match="share a layer id"):
        apply_stamina(pipe)
    assert not any(isinstance(m, StaminaLinear) for m in pipe.unet.modules())


def test_wrapped_models_are_looked_into(learn):
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(nn.DataParallel(model))
    assert learn(compiled, target_modules=("0",)) == ["0"]
    assert isinstance(model[0], StaminaLinear)
    set_stamina_step(compiled, 2)
    fold_stamina(model)


def test_not_a_model():
    with pytest.raises(TypeError, match="nn.Module or a pipeline"):
        apply_stamina(object())


def test_a_pipeline_with_several_denoisers_is_not_half_adapted(pipe):
    pipe.register_modules(transformer_2=nn.ModuleDict({"to_k": nn.Linear(4, 4)}))
    with pytest.raises(TypeError, match="several denoisers, transformer_2, unet: pass the module"):
        apply_stamina(pipe)
    assert apply_stamina(pipe.transformer_2, StaminaConfig(target_modules=("to_k",)))
    pipe.unet = None
    assert stamina_parameters(pipe)["factors"]


def test_what_a_user_keeps_beside_a_pipelines_denoiser_is_none_of_it(pipe):
    pipe.ema_unet, pipe.my_unet = copy.deepcopy(pipe.unet), pipe.unet
    apply_stamina(pipe)
    assert any(isinstance(module, StaminaLinear) for module in pipe.unet.modules())
    assert not any(isinstance(module, StaminaLinear) for module in pipe.ema_unet.modules())


def test_frozen_parts_of_an_adapter_are_their_users_choice(pipe):
    apply_stamina(pipe)
    layers = [module for module in pipe.unet.modules() if isinstance(module, StaminaLinear)]
    for layer in layers:
        layer.mask.requires_grad_(False)
    set_stamina_step(pipe, 1)
    assert stamina_parameters(pipe)["factors"]
    for layer in layers:
        layer.A.requires_grad_(False)
        layer.mask.requires_grad_(True)
    set_stamina_step(pipe, 2)
    pipe.unet.requires_grad_(False)
    for call in (lambda: set_stamina_step(pipe, 3), lambda: stamina_parameters(pipe)):
        with pytest.raises(RuntimeError, match="one of its live parameters at least must have"):
            call()


def test_parameters_are_all_of_them_and_fp32(pipe):
    pipe.unet.requires_grad_(False)
    pipe.to(torch.bfloat16)
    apply_stamina(pipe, StaminaConfig(r=4))
    groups = stamina_parameters(pipe)
    trainable = {id(p) for p in pipe.unet.parameters() if p.requires_grad}
    assert {id(p) for group in groups.values() for p in group} == trainable
    assert all(p.dtype == torch.float32 for group in groups.values() for p in group)
    assert len(groups["factors"]) == 16 and groups["mask"] and not groups["token"]


@pytest.fixture
def restored_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("generator", ["embedding_mlp", "constant_mlp", "free"])
@pytest.mark.parametrize("token", ["mlp", "direct"])
@pytest.mark.parametrize(
    "choose",
    [
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
    ],
    ids=["bfloat16", "float64", "meta"],
)
def test_torchs_defaults_change_no_bit(pipe, pipe_of, restored_defaults, generator, token, choose):
    other = pipe_of(pipe)

    def attach(target):
        paths = apply_stamina(target, StaminaConfig(r=2, mask_generator=generator))
        add_custom_token(target, "<v1>", TokenConfig(generator=token))
        buffers = target.unet.get_submodule(paths[0])._buffers.values()
        parameters = sum(stamina_parameters(target).values(), [])
        return [t for t in (*parameters, *buffers) if t is not None]

    wanted = attach(pipe)
    choose()
    found = attach(other)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and got.device == want.device and torch.equal(got, want)


def lora(model, *targets):
    model.add_adapter(LoraConfig(r=2, target_modules=list(targets)))


@pytest.mark.parametrize(
    "freeze, owner",
    [
        (lambda p: lora(p.unet, "to_q"), "layer 'down_blocks.0"),
        (lambda p: p.unet.requires_grad_(False), "layer 'down_blocks.0"),
        (lambda p: lora(p.text_encoder, "q_proj"), "token '<v1>'"),
        (lambda p: p.text_encoder.requires_grad_(False), "token '<v1>'"),
    ],
    ids=["lora", "frozen", "lora on the text encoder", "frozen text encoder"],
)
def test_an_adapter_that_was_frozen_since_is_not_trained_in_silence(pipe, learn, freeze, owner):
    paths = learn(pipe)
    token = add_custom_token(pipe, "<v1>")
    freeze(pipe)
    for call in (lambda: set_stamina_step(pipe, 1), lambda: stamina_parameters(pipe)):
        with pytest.raises(RuntimeError, match=f"{owner}.* requires_grad=True, got False"):
            call()
    layers = [layer_at(pipe.unet, path) for path in paths]
    for own in (token, *(m for layer in layers for m in (layer.A, layer.B, layer.mask))):
        own.requires_grad_(True)
    set_stamina_step(pipe, 1)
    assert all(p.requires_grad for group in stamina_parameters(pipe).values() for p in group)


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("targets", [("to_q",), ("to_k", "to_v")])
def test_folding_thaws_nothing_under_a_lora(pipe, learn, targets, thawed):
    paths = learn(pipe)
    lora(pipe.unet, *targets)
    if thawed:
        for path in paths:
            layer_at(pipe.unet, path).A.requires_grad_(True)
    fold_stamina(pipe)
    trainable = [name for name, p in pipe.unet.named_parameters() if p.requires_grad]
    assert trainable and all("lora" in name for name in trainable)


def test_folding_thaws_nothing_of_a_model_that_was_frozen_since(pipe, learn):
    learn(pipe)
    pipe.unet.requires_grad_(False)
    fold_stamina(pipe)
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_setters(pipe, learn):
    paths = learn(pipe)
    layers = [pipe.unet.get_submodule(p) for p in paths]
    set_stamina_step(pipe, 2**32 + 3)
    set_stamina_penalties(pipe, forget=0.5)
    set_stamina_penalties(layers[0], sparse=2.0)
    assert all(m.step.item() == 2**32 + 3 and m.forget_weight.item() == 0.5 for m in layers)
    assert [m.sparse_weight.item() for m in layers] == [2.0] + [0.0] * (len(layers) - 1)
    set_stamina_mask_mode(layers[1], "hard")
    with stamina_eval(pipe):
        assert all(m.hard for m in layers)
    assert [m.hard for m in layers] == [False, True] + [False] * (len(layers) - 2)


def test_eval_restores_after_an_error(pipe, learn):
    paths = learn(pipe)
    with pytest.raises(KeyError), stamina_eval(pipe):
        raise KeyError
    assert not pipe.unet.get_submodule(paths[0]).hard


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p: set_stamina_step(p, -1), ValueError, "step must be in"),
        (lambda p: set_stamina_step(p, 1.5), TypeError, "step must be an int, got float"),
        (lambda p: set_stamina_penalties(p, forget=float("nan")), ValueError, "forget must be fin"),
        (lambda p: set_stamina_penalties(p, sparse=float("inf")), ValueError, "sparse must be fin"),
        (lambda p: set_stamina_penalties(p, sparse=1e39), ValueError, "finite in torch.float32"),
        (lambda p: set_stamina_mask_mode(p, "soft"), ValueError, "mode must be 'sample' or 'hard'"),
    ],
)
def test_setters_refuse(pipe, learn, call, error, message):
    learn(pipe)
    with pytest.raises(error, match=message):
        call(pipe)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: set_stamina_step(p, 1),
        lambda p: set_stamina_penalties(p, forget=1.0),
        lambda p: set_stamina_mask_mode(p, "hard"),
        stamina_statistics,
        fold_stamina,
    ],
)
def test_without_an_adapter_they_raise(pipe, call):
    with pytest.raises(RuntimeError, match="needs a live adapter"):
        call(pipe)


def test_statistics_of_every_layer(pipe, learn):
    paths = learn(pipe)
    with stamina_eval(pipe):
        statistics = stamina_statistics(pipe)
    assert list(statistics) == paths
    for values in statistics.values():
        assert 0.02 < values["density"] < 0.98 and values["overlap"] == values["forget"] == 0.0
    fold_stamina(pipe)
    learn(pipe, "c1")
    assert all(v["overlap"] > 0 and v["forget"] > 0 for v in stamina_statistics(pipe).values())
