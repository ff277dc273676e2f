# SPDX-License-Identifier: Apache-2.0
"""What the verbs over folded concepts refuse, and that they then change nothing."""

import numpy as np
import pytest
import torch
from stamina_adapters import (
    add_custom_token,
    delete_stamina,
    disable_stamina,
    fold_concepts,
    fold_stamina,
    get_list_stamina,
    set_stamina_adapters,
    unfold_stamina,
    unload_stamina,
)
from stamina_adapters.linear import StaminaLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "verb",
    [
        lambda p: set_stamina_adapters(p, "c0"),
        disable_stamina,
        lambda p: unfold_stamina(p, "c0"),
        lambda p: delete_stamina(p, "c0"),
        unload_stamina,
        fold_stamina,
    ],
    ids=["set", "disable", "unfold", "delete", "unload", "fold"],
)
def test_what_something_else_did_to_a_weight_is_never_dropped(
    pipe, learn, snapshot, assert_same, dtype, verb
):
    pipe.unet.to(dtype)
    path = learn(pipe, "c0", std=0.1)[0]
    fold_stamina(pipe)
    if verb is fold_stamina:
        learn(pipe, "c1")
    # less than a unit in the last place of the largest elements, and many of the small ones'
    weight = pipe.unet.get_submodule(path).weight.data
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator) * (0.012 * weight.float().std())
    weight += noise.to(dtype)
    before = snapshot(pipe)
    with pytest.raises(RuntimeError, match=f"the weight of '{path}' was changed since"):
        verb(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_since_the_fold_is_no_change(pipe, learn, dtype):
    learn(pipe, "c0", std=0.1)
    fold_stamina(pipe)
    pipe.unet.to(dtype)
    learn(pipe, "c1", std=0.1)
    fold_stamina(pipe)
    assert list(get_list_stamina(pipe)) == ["c0", "c1"]


def test_models_that_cannot_be_folded_into_keep_nothing_of_it(pipe, learn, pipe_of, stock_pipe):
    learn(pipe, "c0")
    concept = fold_stamina(pipe)
    other = pipe_of(stock_pipe)
    other.unet.double()
    with pytest.raises(TypeError, match="contiguous fp32, bf16 or fp16 weight, got torch.float64"):
        fold_concepts(other, [concept], verify_base=False)
    assert not [name for name, _ in other.unet.named_buffers() if "stamina" in name]


def test_a_deletion_that_overflows_takes_no_word(pipe, learn, snapshot, assert_same):
    pipe.unet.half()
    # alone either leaves fp16's range, together they cancel
    for name, sign in (("a", 1), ("b", -1)):
        add_custom_token(pipe, f"<{name}>")
        learn(pipe, name, target_modules=("attn2.to_v",))
        with torch.no_grad():
            for layer in pipe.unet.modules():
                if isinstance(layer, StaminaLinear):
                    layer.A.fill_(sign)
                    layer.B.fill_(1.0)
                    layer.mask.b.fill_(1e4)  # every weight is in the mask
        fold_stamina(pipe)
    set_stamina_adapters(pipe, ["a", "b"], [1e5, 1e5])
    before = snapshot(pipe)
    with pytest.raises(OverflowError):
        delete_stamina(pipe, "b")
    assert_same(before, snapshot(pipe))
    assert list(get_list_stamina(pipe)) == ["a", "b"]


def test_a_module_cannot_give_up_a_concept_with_words(pipe, learn, snapshot, assert_same):
    add_custom_token(pipe, "<v1>")
    learn(pipe, "c0")
    fold_stamina(pipe)
    before = snapshot(pipe)
    for verb in (lambda m: delete_stamina(m, "c0"), unload_stamina):
        with pytest.raises(TypeError, match="c0 brought tokens: pass the pipeline"):
            verb(pipe.unet)
    assert_same(before, snapshot(pipe))


def test_a_vector_too_large_for_the_table_is_refused(pipe, learn, snapshot, assert_same):
    token = add_custom_token(pipe, "<v1>")
    with torch.no_grad():
        token.bias2.fill_(1e5)
    learn(pipe, "c0")
    concept = fold_stamina(pipe)
    unload_stamina(pipe)
    pipe.text_encoder.half()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="'<v1>' must be of size 40 and finite in torch.float16"):
        fold_concepts(pipe, [concept])
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, c: fold_concepts(p, c), "concepts must be .* got a ConceptState"),
        (lambda p, c: fold_concepts(p, ["c0"]), "concepts must be .* got one with a str"),
        (lambda p, c: fold_concepts(p, [c], np.float32(0.5)), "weights must be .*0.5"),
        (lambda p, c: fold_concepts(p, [c], [None]), r"weights must be .*\[None\]"),
        (lambda p, c: set_stamina_adapters(p, ["c1"], [10**400]), "weights must be a sequence of"),
    ],
)
def test_what_is_no_concept_or_no_weight_is_named(pipe, learn, call, message):
    learn(pipe, "c0")
    concept = fold_stamina(pipe)
    unload_stamina(pipe)
    learn(pipe, "c1")
    with pytest.raises(TypeError, match=message):
        call(pipe, concept)
    assert list(get_list_stamina(pipe)) == ["c1"]


def test_any_real_number_is_a_weight(pipe, learn):
    learn(pipe)
    fold_stamina(pipe)
    set_stamina_adapters(pipe, "c0", np.float32(0.5))
    assert get_list_stamina(pipe)["c0"].weight == 0.5
