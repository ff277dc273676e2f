# SPDX-License-Identifier: Apache-2.0
"""Adapters beside PEFT LoRA, under offloading, and under casts of the whole model."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model
from stamina_adapters import (
    StaminaLinear,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    fold_concepts,
    fold_stamina,
    fuse_stamina,
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


def offload_in_groups(unet, folder=None):
    cpu = torch.device("cpu")
    apply_group_offloading(
        unet,
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=folder,
    )


def test_groups_offloaded_to_disk_are_never_written_to(pipe, learn, render, tmp_path):
    other = copy.deepcopy(pipe.unet)
    path = learn(pipe)[0]
    set_stamina_mask_mode(pipe, "hard")
    live = render(pipe)
    for unet in (pipe.unet, other):
        offload_in_groups(unet, str(tmp_path))
    for call in (fold_stamina, fuse_stamina, unload_stamina):
        with pytest.raises(RuntimeError, match=f"'{path}' is offloaded"):
            call(pipe)
    assert torch.equal(render(pipe), live)
    with pytest.raises(RuntimeError, match=f"'{path}' is offloaded"):
        apply_stamina(other)


def test_groups_offloaded_to_memory_are_folded_into(pipe, learn, render):
    offload_in_groups(pipe.unet)
    learn(pipe)
    set_stamina_mask_mode(pipe, "hard")
    live = render(pipe)
    fold_stamina(pipe)
    # fp16 factors of the committed adapter
    torch.testing.assert_close(render(pipe), live, rtol=0, atol=2e-3)


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


WRAPPERS = {
    "adalora": lambda **to: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, **to),
    "beft": lambda **to: peft.BeftConfig(**to),
    "boft": lambda **to: peft.BOFTConfig(boft_block_size=4, **to),
    "c3a": lambda **to: peft.C3AConfig(block_size=8, **to),
    "deft": lambda **to: peft.DeftConfig(r=2, **to),
    "delora": lambda **to: peft.DeloraConfig(r=2, **to),
    "fourierft": lambda **to: peft.FourierFTConfig(n_frequency=10, **to),
    "gralora": lambda **to: peft.GraloraConfig(r=4, gralora_k=2, **to),
    "ia3": lambda **to: peft.IA3Config(feedforward_modules=[], **to),
    "lily": lambda **to: peft.LilyConfig(r=2, **to),
    "loha": lambda **to: peft.LoHaConfig(r=2, **to),
    "lokr": lambda **to: peft.LoKrConfig(r=2, **to),
    "lora": lambda **to: peft.LoraConfig(r=2, **to),
    "miss": lambda **to: peft.MissConfig(r=4, **to),
    "oft": lambda **to: peft.OFTConfig(r=0, oft_block_size=4, **to),
    "osf": lambda **to: peft.OSFConfig(**to),
    "psoft": lambda **to: peft.PsoftConfig(r=2, **to),
    "pvera": lambda **to: peft.PveraConfig(r=2, **to),
    "randlora": lambda **to: peft.RandLoraConfig(r=2, **to),
    "road": lambda **to: peft.RoadConfig(group_size=8, **to),
    "tinylora": lambda **to: peft.TinyLoraConfig(r=2, **to),
    "unilora": lambda **to: peft.UniLoraConfig(r=2, **to),
    "vblora": lambda **to: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, **to),
    "vera": lambda **to: peft.VeraConfig(r=2, **to),
    "waveft": lambda **to: peft.WaveFTConfig(n_frequency=10, **to),
}
READ_THE_WEIGHT = {
    "dora": lambda **to: peft.LoraConfig(r=2, use_dora=True, **to),
    "shira": lambda **to: peft.ShiraConfig(r=2, **to),
    "hra": lambda **to: peft.HRAConfig(r=2, **to),
    "bat": lambda **to: peft.MissConfig(r=4, init_weights="bat", **to),
}


def wrap(unet, config):
    """PEFT's layers on K and V of `unet` itself, with values as if they had been trained."""
    before = set(unet.parameters())
    unet.requires_grad_(False)
    peft.get_peft_model(unet, config(target_modules=["to_k", "to_v"])).eval()  # PVeRA draws else
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad and p not in before:
                p += torch.randn(p.shape, generator=generator) * 0.03


def predict(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 7, 40)))
    with torch.no_grad():
        return unet(latents, 1, states).sample


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_that_call_the_layer_agree_with_the_fold(pipe, learn, kind):
    wrap(pipe.unet, WRAPPERS[kind])
    wrapped = predict(pipe.unet)
    learn(pipe.unet)
    set_stamina_mask_mode(pipe.unet, "hard")
    live = predict(pipe.unet)
    assert (live - wrapped).abs().max() > 0.05
    fold_stamina(pipe.unet)
    # fp16 factors of the committed adapter
    torch.testing.assert_close(predict(pipe.unet), live, rtol=0, atol=2e-3)


class OwnWrapper(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) + 1


def test_a_wrapper_of_ones_own_is_its_owners_to_know(pipe, learn):
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.to_k = OwnWrapper(attention.to_k)
    learn(pipe.unet)
    set_stamina_mask_mode(pipe.unet, "hard")
    live = predict(pipe.unet)
    fold_stamina(pipe.unet)
    torch.testing.assert_close(predict(pipe.unet), live, rtol=0, atol=2e-3)


def test_a_layer_that_was_taken_out_is_named(pipe, learn):
    learn(pipe.unet)
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    del attention.to_k
    with pytest.raises(RuntimeError, match="attn2.to_k' was taken out of the model"):
        predict(pipe.unet)


@pytest.mark.parametrize("kind", READ_THE_WEIGHT)
def test_wrappers_that_read_the_weight_raise_by_name(pipe, learn, kind):
    other = copy.deepcopy(pipe.unet)
    wrap(other, READ_THE_WEIGHT[kind])
    message = r"wrapper of '.*attn2.to_k' must be known to compute by calling .* got peft.tuners"
    with pytest.raises(TypeError, match=message):
        apply_stamina(other)
    assert not any(isinstance(m, StaminaLinear) for m in other.modules())

    learn(pipe.unet)
    wrap(pipe.unet, READ_THE_WEIGHT[kind])
    for call in (predict, fold_stamina, fuse_stamina):
        with pytest.raises(TypeError, match=message):
            call(pipe.unet)
    unload_stamina(pipe.unet)
    predict(pipe.unet)


def test_layers_without_their_weight_raise_by_name(pipe, learn):
    """As LyCORIS's full matrices, which take the weight over and compute in the layer's place."""
    layer = pipe.unet.get_submodule(learn(pipe)[0])
    weight = layer.weight
    layer.forward = lambda x: nn.functional.linear(x, weight)
    del layer.weight
    for call in (predict, fold_stamina):
        with pytest.raises(TypeError, match="attn2.to_k' must have its weight"):
            call(pipe.unet)
