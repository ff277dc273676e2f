# SPDX-License-Identifier: Apache-2.0
"""Adapters beside PEFT LoRA, under offloading, and under casts of the whole model."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from stamina_adapters import (
    StaminaLinear,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    fold_concepts,
    fold_stamina,
    get_list_stamina,
    set_stamina_attn_processor,
    set_stamina_mask_mode,
    unload_stamina,
)
from torch import nn


def add_lora(pipe):
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)


@pytest.fixture
def folded_alone(stock_pipe, render):
    """Image of the stock pipeline with one concept folded and nothing else."""

    def run(concept):
        components = {k: v for k, v in stock_pipe.components.items() if k != "image_encoder"}
        components["unet"] = copy.deepcopy(components["unet"])
        pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        fold_concepts(pipe, [concept])
        return render(pipe)

    return run


@pytest.mark.parametrize("processor", [False, True])
def test_lora_above(pipe, learn, render, processor):
    learn(pipe)
    set_stamina_mask_mode(pipe, "hard")
    if processor:
        set_stamina_attn_processor(pipe)
    ours = render(pipe)
    add_lora(pipe)
    both = render(pipe)
    assert (both - ours).abs().max() > 1e-3
    pipe.unet.disable_lora()
    torch.testing.assert_close(render(pipe), ours, rtol=0, atol=1e-5)
    pipe.unet.enable_lora()
    fold_stamina(pipe)
    # fp16 factors of the committed adapter
    torch.testing.assert_close(render(pipe), both, rtol=0, atol=2e-3)
    pipe.unet.delete_adapters("default")
    assert not any(isinstance(m, StaminaLinear) for m in pipe.unet.modules())


def test_lora_below(pipe, learn, render, folded_alone):
    base = render(pipe)
    add_lora(pipe)
    lora = render(pipe)
    paths = learn(pipe)
    assert not any("base_layer" in path for path in paths)
    set_stamina_mask_mode(pipe, "hard")
    both = render(pipe)
    assert (both - lora).abs().max() > 1e-3
    concept = fold_stamina(pipe)
    torch.testing.assert_close(render(pipe), both, rtol=0, atol=2e-3)
    pipe.unet.delete_adapters("default")
    assert torch.equal(render(pipe), folded_alone(concept))
    add_lora(pipe)
    unload_stamina(pipe)
    assert torch.equal(render(pipe), lora)
    pipe.unet.delete_adapters("default")
    assert torch.equal(render(pipe), base)


def test_lora_changes_no_mask(pipe, learn):
    paths = learn(pipe)
    layer = pipe.unet.get_submodule(paths[0])
    number = layer.adapter.layer_id
    unload_stamina(pipe)
    add_lora(pipe)
    learn(pipe)
    assert pipe.unet.get_submodule(paths[0]).base_layer.adapter.layer_id == number


def test_a_whole_model_in_a_peft_model_is_seen_through(pipe, learn, snapshot, assert_same):
    pipe.unet.requires_grad_(False)  # as PEFT leaves it
    before = snapshot(pipe)
    paths = learn(pipe, "c0")
    fold_stamina(pipe)
    weight = pipe.unet.get_submodule(paths[0]).weight.clone()
    learn(pipe, "c1")
    number = pipe.unet.get_submodule(paths[0]).adapter.layer_id
    delete_stamina(pipe, "c1")

    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    pipe.unet = wrapped
    assert apply_stamina(wrapped, adapter_name="c1") == paths  # nothing learned: A is zero
    layer = wrapped.get_base_model().get_submodule(paths[0]).base_layer
    assert layer.adapter.layer_id == number
    fold_stamina(pipe)
    assert list(get_list_stamina(pipe)) == ["c0", "c1"]
    assert torch.equal(layer.weight, weight)
    learn(wrapped, "c2")
    pipe.unet = wrapped.unload()
    unload_stamina(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("processor", [False, True])
def test_sequential_offload(pipe, learn, render, processor):
    paths = learn(pipe)
    set_stamina_mask_mode(pipe, "hard")
    if processor:
        set_stamina_attn_processor(pipe)
    image = render(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))
    assert pipe.unet.get_submodule(paths[0]).A.is_meta
    torch.testing.assert_close(render(pipe), image, rtol=0, atol=1e-5)
    for call in (fold_stamina, unload_stamina):
        with pytest.raises(RuntimeError, match=f"'{paths[0]}' is offloaded"):
            call(pipe)
    torch.testing.assert_close(render(pipe), image, rtol=0, atol=1e-5)
    remove_hook_from_module(pipe.unet, recurse=True)
    fold_stamina(pipe)
    assert type(pipe.unet.get_submodule(paths[0])) is nn.Linear


def test_offloaded_models_take_no_adapter_and_no_token(pipe):
    cpu_offload(pipe.unet, torch.device("cpu"))
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="attn2.to_k' is offloaded"):
        apply_stamina(pipe)
    with pytest.raises(RuntimeError, match="'text_encoder' is offloaded"):
        add_custom_token(pipe, "<v1>")
    assert not any(isinstance(m, StaminaLinear) for m in pipe.unet.modules())


def test_model_cast_for_validation_keeps_training(pipe, learn, render):
    learn(pipe)
    module = add_custom_token(pipe, "<v1>")
    layer = next(m for m in pipe.unet.modules() if isinstance(m, StaminaLinear))
    factors, vector = layer.B.detach().clone(), module().detach().clone()
    pipe.to(torch.bfloat16)
    render(pipe, "a <v1>")
    pipe.to(torch.float32)
    assert torch.equal(layer.B, factors) and torch.equal(module(), vector)
    assert layer.weight.dtype == torch.float32


def test_w_init_follows_the_weight(pipe, learn):
    paths = learn(pipe)
    fold_stamina(pipe)
    pipe.to(torch.bfloat16)
    learn(pipe, "c1")
    layer = pipe.unet.get_submodule(paths[0])
    assert layer.weight_init.dtype == layer.weight.dtype == torch.bfloat16
    fold_stamina(pipe)
