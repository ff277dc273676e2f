# SPDX-License-Identifier: Apache-2.0
"""What would lose or double an adapter in silence raises, and leaves everything as it was."""

import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from stamina_adapters import (
    StaminaLinear,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    fold_concepts,
    fold_custom_token,
    fold_stamina,
    get_list_stamina,
    remove_custom_token,
    set_stamina_adapters,
    set_stamina_mask_mode,
    unfold_stamina,
    unload_stamina,
)
from stamina_adapters.fold import restore_concepts
from torch import nn


@pytest.mark.parametrize("part", ["pipe", "unet"])
def test_save_pretrained_with_an_unfolded_adapter(pipe, learn, tmp_path, part):
    learn(pipe)
    owner = pipe if part == "pipe" else pipe.unet
    with pytest.raises(RuntimeError, match="would lose the unfolded adapter 'c0'"):
        owner.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    fold_stamina(pipe)
    owner.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("part", ["pipe", "text_encoder"])
def test_save_pretrained_with_an_unfolded_token(pipe, tmp_path, part):
    add_custom_token(pipe, "<v1>")
    owner = pipe if part == "pipe" else pipe.text_encoder
    with pytest.raises(RuntimeError, match="would lose the unfolded token '<v1>'"):
        owner.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    fold_custom_token(pipe, "<v1>")
    owner.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("first", ["adapter", "<v1>", "<v2>"])
@pytest.mark.parametrize("owner", ["pipe", "text_encoder"])
def test_saving_is_refused_until_nothing_would_be_lost(pipe, learn, tmp_path, first, owner):
    saved = pipe if owner == "pipe" else pipe.text_encoder
    add_custom_token(pipe, "<v1>")
    learn(pipe.text_encoder, "adapter", target_modules=("q_proj",))
    add_custom_token(pipe, "<v2>")
    finish = {
        "adapter": lambda: fold_stamina(pipe.text_encoder),
        "<v1>": lambda: fold_custom_token(pipe, "<v1>"),
        "<v2>": lambda: remove_custom_token(pipe, "<v2>"),
    }
    unfinished = sorted(finish, key=lambda name: name != first)
    while unfinished:
        with pytest.raises(RuntimeError, match="save_pretrained would lose") as refused:
            saved.save_pretrained(tmp_path / "out")
        assert {name for name in finish if repr(name) in str(refused.value)} == {*unfinished}
        finish[unfinished.pop(0)]()
    assert not list(tmp_path.iterdir())
    saved.save_pretrained(tmp_path / "out")


def test_stock_diffusers_reloads_a_folded_pipeline(pipe, learn, render, tmp_path):
    for name in ("c0", "c1"):
        learn(pipe, name)
        add_custom_token(pipe, f"<{name}>")
        fold_stamina(pipe)
    pipe.save_pretrained(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    for prompt in ("a <c0> and a <c1>", "a face"):
        assert torch.equal(render(stock, prompt), render(pipe, prompt))


def test_fusing_projections_later_raises(pipe, learn, render):
    paths = learn(pipe)
    attention = pipe.unet.get_submodule(paths[0].rpartition(".")[0])
    for owner in (pipe.unet, attention):
        fuse = owner.fuse_qkv_projections if owner is pipe.unet else owner.fuse_projections
        with pytest.raises(RuntimeError, match="would drop the adapter 'c0'"):
            fuse()
    assert not any(getattr(m, "fused_projections", False) for m in pipe.unet.modules())
    unload_stamina(pipe)
    pipe.unet.fuse_qkv_projections()


def test_fused_projections_present(pipe, learn, snapshot, assert_same):
    learn(pipe)
    fold_stamina(pipe)
    pipe.unet.fuse_qkv_projections()
    before = snapshot(pipe)
    for call in (lambda: learn(pipe, "c1"), lambda: unfold_stamina(pipe, "c0")):
        with pytest.raises(RuntimeError, match="computes with fused projections"):
            call()
        assert_same(before, snapshot(pipe))
    assert get_list_stamina(pipe)["c0"].weight == 1.0
    pipe.unet.unfuse_qkv_projections()
    learn(pipe, "c1")


@pytest.mark.parametrize("folded", [False, True])
def test_attention_scale_is_never_ignored(pipe, learn, render, folded):
    learn(pipe)
    if folded:
        fold_stamina(pipe)
    with pytest.raises(ValueError, match=r"'scale': 0.5\} does not reach STAMINA adapters \(c0\)"):
        render(pipe, cross_attention_kwargs={"scale": 0.5})
    full = render(pipe, cross_attention_kwargs={"scale": 1.0})
    set_stamina_adapters(pipe, "c0", 0.5)
    assert not torch.equal(render(pipe), full)
    unload_stamina(pipe)
    render(pipe, cross_attention_kwargs={"scale": 0.5})


def test_attention_scale_reaches_a_lora_on_folded_concepts(pipe, learn, render):
    learn(pipe)
    fold_stamina(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    scaled = render(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not torch.equal(scaled, render(pipe))


def test_a_fused_lora_blocks_folding(pipe, learn, snapshot, assert_same):
    learn(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    pipe.unet.fuse_lora()
    before = snapshot(pipe)
    with pytest.raises(RuntimeError, match="LoRA is fused into the weight of .*to_k"):
        fold_stamina(pipe)
    assert_same(before, snapshot(pipe))
    pipe.unet.unfuse_lora()
    fold_stamina(pipe)


@pytest.mark.parametrize(
    ("first", "finish", "verb"),
    [
        ("whole", fold_stamina, lambda whole, part, concept: apply_stamina(part)),
        ("part", fold_stamina, lambda whole, part, concept: apply_stamina(whole)),
        ("part", None, lambda whole, part, concept: apply_stamina(whole)),
        ("part", fold_stamina, lambda whole, part, concept: fold_concepts(whole, [concept])),
        ("part", None, lambda whole, part, concept: fold_concepts(whole, [concept])),
        ("part", None, lambda whole, part, concept: restore_concepts(whole, [concept], {})),
        ("whole", None, lambda whole, part, concept: unload_stamina(part)),
        ("part", None, lambda whole, part, concept: unload_stamina(whole)),
        ("part", fold_stamina, lambda whole, part, concept: unload_stamina(whole)),
    ],
)
def test_what_another_module_adapted_is_not_folded_over(
    pipe, learn, snapshot, assert_same, first, finish, verb
):
    learn(pipe, "c1")
    concept = fold_stamina(pipe)
    unload_stamina(pipe)
    modules = {"whole": pipe, "part": pipe.unet.mid_block}
    learn(modules[first], "c0")
    if finish:
        finish(modules[first])
    before = snapshot(pipe)
    with pytest.raises(RuntimeError, match="attn2.to_k' of the .* adapted through another module"):
        verb(*modules.values(), concept)
    assert_same(before, snapshot(pipe))
    unload_stamina(modules[first])
    learn(pipe, "c2")


def test_trainable_base_weights_raise(pipe, learn):
    learn(pipe)
    pipe.unet.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 7, 40))


def test_copies_and_pickles_are_independent(pipe, learn):
    paths = learn(pipe)
    other = copy.deepcopy(pipe.unet)
    again = pickle.loads(pickle.dumps(pipe.unet.get_submodule(paths[0])))
    assert isinstance(again, StaminaLinear)
    concept = fold_stamina(other)
    assert list(concept.layers) == paths
    assert isinstance(pipe.unet.get_submodule(paths[0]), StaminaLinear)
    with pytest.raises(RuntimeError, match="'c0' is live"):
        apply_stamina(pipe, adapter_name="c1")
    other.fuse_qkv_projections()


@pytest.fixture
def encoder():
    """PyTorch's own encoder in eval mode, which without gradients computes in one fused kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_pytorchs_encoder_layers_compute_with_a_live_adapter(encoder, learn):
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = encoder(x)
        learn(encoder, target_modules=("linear1", "linear2"))
        set_stamina_mask_mode(encoder, "hard")
        live = encoder(x)
        copied = copy.deepcopy(encoder)
        fold_stamina(encoder)
        folded = encoder(x)
        fold_stamina(copied)
        assert torch.equal(copied(x), folded)
    assert (live - plain).abs().max() > 0.1
    # fp16 factors of the committed adapter
    torch.testing.assert_close(live, folded, rtol=0, atol=5e-3)
    assert not any(layer._forward_hooks for layer in (*encoder.layers, *copied.layers))


def test_nested_tensors_of_pytorchs_encoder_raise(encoder, learn):
    learn(encoder, target_modules=("linear1",))
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), pytest.raises(TypeError, match="enable_nested_tensor=False"):
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=padded)


def test_a_method_of_ones_own_on_the_pipeline_stays(pipe, learn):
    learn(pipe)
    concept = fold_stamina(pipe)
    mine = pipe.save_pretrained = lambda *_: None
    delete_stamina(pipe, concept.name)
    assert pipe.save_pretrained is mine
