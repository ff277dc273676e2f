# SPDX-License-Identifier: Apache-2.0
"""Custom tokens: vocabulary, table, gradients, folding, removal."""

import copy

import pytest
import torch
from peft import LoraConfig
from stamina_adapters import (
    TokenConfig,
    add_custom_token,
    fold_custom_token,
    fold_stamina,
    remove_custom_token,
    stamina_parameters,
    unload_stamina,
)
from torch import nn


def encode(pipe, prompt):
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


def table(pipe):
    return pipe.text_encoder.get_input_embeddings()


@pytest.mark.parametrize("kind", ["mlp", "direct"])
def test_live_token_feeds_the_encoder_and_never_the_table(pipe, kind):
    rows = table(pipe).weight.detach().clone()
    plain = encode(pipe, "a photo of a face")
    state = torch.get_rng_state()
    module = add_custom_token(pipe, "<v1>", TokenConfig(generator=kind))
    assert torch.equal(state, torch.get_rng_state())
    assert module().norm().item() == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-5)
    assert torch.equal(encode(pipe, "a photo of a face"), plain)
    assert torch.equal(table(pipe).weight[:-1], rows)
    assert pipe.tokenizer.encode("<v1>", add_special_tokens=False) == [len(rows)]

    stored = table(pipe).weight.detach().clone()
    table(pipe).weight.requires_grad_(False)
    before = encode(pipe, "a photo of <v1>")
    before.square().sum().backward()
    parameters = stamina_parameters(pipe)["token"]
    assert {id(p) for p in parameters} == {id(p) for p in module.parameters()}
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    with torch.no_grad():
        for p in parameters:
            p += 0.1
    assert not torch.equal(encode(pipe, "a photo of <v1>"), before)
    assert torch.equal(table(pipe).weight, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_writes_what_was_live(pipe, dtype):
    pipe.text_encoder.to(dtype)
    module = add_custom_token(pipe, "<v1>")
    pipe.text_encoder.to(dtype)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    live = encode(pipe, "a <v1>")
    fold_custom_token(pipe, "<v1>")
    assert type(table(pipe)) is nn.Embedding and table(pipe).weight.dtype == dtype
    assert torch.equal(encode(pipe, "a <v1>"), live)
    assert torch.equal(table(pipe).weight[-1], module().to(dtype))
    assert not stamina_parameters(pipe)["token"]
    with pytest.raises(ValueError, match="'<v1>' is not live"):
        fold_custom_token(pipe, "<v1>")


def test_autocast_leaves_the_vector_alone(pipe):
    module = add_custom_token(pipe, "<v1>")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(), add_vector := module()) and add_vector.dtype == torch.float32
    assert torch.equal(module(), add_vector)


def test_removal_restores_tokenizer_and_table(pipe, snapshot, assert_same):
    before = snapshot(pipe)
    tokenizer, ids = pipe.tokenizer, pipe.tokenizer("a <v1> <v2>").input_ids
    add_custom_token(pipe, "<v1>")
    add_custom_token(pipe, "<v2>")
    second = encode(pipe, "a <v2>")
    remove_custom_token(pipe, "<v1>")
    assert "<v1>" not in pipe.tokenizer.get_vocab()
    assert torch.equal(encode(pipe, "a <v2>"), second)
    remove_custom_token(pipe, "<v2>")
    assert_same(before, snapshot(pipe))
    assert pipe.tokenizer is tokenizer and tokenizer("a <v1> <v2>").input_ids == ids


def test_unloading_takes_live_and_folded_tokens_out(pipe, learn, snapshot, assert_same):
    before = snapshot(pipe)
    learn(pipe)
    add_custom_token(pipe, "<v1>")
    concept = fold_stamina(pipe)
    assert list(concept.tokens["text_encoder"]) == ["<v1>"]
    add_custom_token(pipe, "<v2>")
    unload_stamina(pipe)
    assert_same(before, snapshot(pipe))


def test_spare_rows_of_the_table_are_used_and_restored(pipe):
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + 3, mean_resizing=False)
    rows = table(pipe).weight.detach().clone()
    add_custom_token(pipe, "<v1>")
    assert table(pipe).weight.shape == rows.shape
    remove_custom_token(pipe, "<v1>")
    assert torch.equal(table(pipe).weight, rows)


@pytest.mark.parametrize(
    "token, message",
    [
        ("a", "'a' is already in the vocabulary of 'text_encoder'"),
        ("<|endoftext|>", "already in the vocabulary"),
        ("<v1>", "'<v1>' is already in the vocabulary"),
        ("two words", "without white space"),
        ("", "without white space"),
    ],
)
def test_tokens_that_cannot_be_added(pipe, snapshot, assert_same, token, message):
    add_custom_token(pipe, "<v1>")
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        add_custom_token(pipe, token)
    assert_same(before, snapshot(pipe))


def test_not_finite_vectors_change_nothing(pipe, learn, snapshot, assert_same):
    learn(pipe)
    module = add_custom_token(pipe, "<v1>")
    with torch.no_grad():
        module.bias2.fill_(1.0)
        module.bias2[0] = float("inf")
    before = snapshot(pipe)
    for fold in (lambda: fold_custom_token(pipe, "<v1>"), lambda: fold_stamina(pipe)):
        with pytest.raises(ValueError, match="vector of token '<v1>' is not finite"):
            fold()
        assert_same(before, snapshot(pipe))


def replace_the_table(pipe, words):
    pipe.text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(table(pipe).weight.data))


def take_a_tokenizer_without_the_word(pipe, words):
    pipe.tokenizer = words


def take_a_tokenizer_with_another_number(pipe, words):
    pipe.tokenizer = words
    words.add_tokens(["<other>", "<v1>"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_the_table, "table of '.*' was replaced .* the live token '<v1>'"),
        (take_a_tokenizer_without_the_word, "'<v1>' has the id None .* 'text_encoder', not 514"),
        (take_a_tokenizer_with_another_number, "'<v1>' has the id 515 .* 'text_encoder', not 514"),
    ],
)
def test_what_cannot_be_written_into_its_row_folds_nothing(
    pipe, learn, snapshot, assert_same, change, message
):
    words = copy.deepcopy(pipe.tokenizer)
    learn(pipe)
    add_custom_token(pipe, "<v1>")
    change(pipe, words)
    before = snapshot(pipe)
    calls = [fold_stamina, lambda p: fold_custom_token(p, "<v1>")]
    if change is replace_the_table:
        calls += [stamina_parameters, lambda p: stamina_parameters(p.text_encoder)]
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call(pipe)
        assert_same(before, snapshot(pipe))


def test_a_table_under_a_lora_is_folded_into(pipe, learn):
    learn(pipe)
    module = add_custom_token(pipe, "<v1>")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["token_embedding"]))
    live = encode(pipe, "a <v1>")
    assert list(fold_stamina(pipe).tokens["text_encoder"]) == ["<v1>"]
    assert type(table(pipe).base_layer) is nn.Embedding
    assert torch.equal(table(pipe).base_layer.weight[-1], module())
    assert torch.equal(encode(pipe, "a <v1>"), live)


def test_other_errors(pipe):
    for name in ("text_encoder_2", "unet"):
        with pytest.raises(TypeError, match=f"no '{name}' with a tokenizer"):
            add_custom_token(pipe, "<v1>", text_encoder=name)
    with pytest.raises(ValueError, match="'<v1>' is not a custom token"):
        remove_custom_token(pipe, "<v1>")


def add_a_word(pipe):
    pipe.tokenizer.add_tokens("<theirs>")


def swap_a_word(pipe):
    pipe.unload_textual_inversion("<before>")
    pipe.load_textual_inversion({"<theirs>": torch.ones(40)})


@pytest.mark.parametrize(
    ("change", "words"), [(add_a_word, "<theirs>"), (swap_a_word, "<before>, <theirs>, <v1>")]
)
def test_words_of_others_are_never_taken_out(pipe, learn, snapshot, assert_same, change, words):
    learn(pipe)
    fold_stamina(pipe)
    pipe.load_textual_inversion({"<before>": torch.ones(40)})
    add_custom_token(pipe, "<v1>")
    fold_custom_token(pipe, "<v1>")
    change(pipe)
    before = snapshot(pipe)
    for call in (lambda: remove_custom_token(pipe, "<v1>"), lambda: unload_stamina(pipe)):
        message = f"'text_encoder' has .* for {words}: something else added tokens or took some out"
        with pytest.raises(RuntimeError, match=message):
            call()
        assert_same(before, snapshot(pipe))


def test_a_table_that_several_modules_read_takes_no_token(pipe):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    pipe.text_encoder = T5EncoderModel(T5Config(vocab_size=len(pipe.tokenizer), **sizes))
    words = len(pipe.tokenizer)
    with pytest.raises(TypeError, match="read by several modules, shared, encoder.embed_tokens"):
        add_custom_token(pipe, "<v1>")
    assert len(pipe.tokenizer) == words


def test_a_word_leaves_every_vocabulary_or_none(pipe, stock_pipe, pipe_of):
    second = pipe_of(stock_pipe)
    pipe.text_encoder_2, pipe.tokenizer_2 = second.text_encoder, second.tokenizer
    for name in ("text_encoder", "text_encoder_2"):
        add_custom_token(pipe, "<v1>", text_encoder=name)
    pipe.tokenizer_2.add_tokens("<foreign>")
    with pytest.raises(RuntimeError, match="'text_encoder_2' has .* something else added tokens"):
        remove_custom_token(pipe, "<v1>")
    assert "<v1>" in pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["text_encoder_4", "prior_text_encoder"])
def test_every_text_encoder_is_found_by_all_verbs(pipe, stock_pipe, pipe_of, learn, name):
    other = pipe_of(stock_pipe)
    setattr(pipe, name, other.text_encoder)
    setattr(pipe, name.replace("text_encoder", "tokenizer"), other.tokenizer)
    words = other.tokenizer.get_vocab()
    learn(pipe)
    add_custom_token(pipe, "<v1>", text_encoder=name)
    assert stamina_parameters(pipe)["token"]
    assert list(fold_stamina(pipe).tokens) == [name]
    unload_stamina(pipe)
    assert other.tokenizer.get_vocab() == words


def test_a_text_encoder_without_a_tokenizer_is_in_nobodys_way(pipe, learn):
    pipe.tokenizer = None
    learn(pipe)
    assert not fold_stamina(pipe).tokens
    unload_stamina(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_word_is_added_while_an_earlier_loss_is_held(pipe, dtype):
    """As in a loop over concepts that does not freeze the table: the last loss is still there."""
    pipe.text_encoder.to(dtype)
    losses = []
    for token in ("<v1>", "<v2>"):
        add_custom_token(pipe, token)
        losses.append(encode(pipe, f"a {token}").square().sum())
        losses[-1].backward()
        assert table(pipe).weight.grad.shape == table(pipe).weight.shape
        fold_custom_token(pipe, token)
    remove_custom_token(pipe, "<v2>")
    encode(pipe, "a <v1>").square().sum().backward()
    assert table(pipe).weight.grad.shape == table(pipe).weight.shape
