# SPDX-License-Identifier: Apache-2.0
"""Custom tokens: a new word whose embedding is the output of a small module.

While a token is live, `TokenEmbedding` puts the module's output in the place of the token's row, so
that gradients reach the module and the table never changes. Folding writes the row.
"""

import copy
import hashlib
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from stamina_adapters.concept import Tokens
from stamina_adapters.config import TokenConfig
from stamina_adapters.guards import (
    allow,
    check_reachable,
    guard_pipeline,
    refuse,
    release_pipeline,
)
from stamina_adapters.models import text_encoders, unwrap
from stamina_adapters.token_modules import TokenEmbedding, TokenMLP, TokenVector
from stamina_adapters.vocabularies import (
    TOKEN_STATE,
    TokenRecord,
    TokenState,
    Vocabulary,
    check_new_token,
    check_numbers,
    check_words,
    live_rows,
    vocabularies,
    vocabulary_of,
)


def _restore_tokenizer(tokenizer: Any, pristine: Any) -> None:
    # in place, because pipelines and users hold the object
    tokenizer.__dict__.clear()
    tokenizer.__dict__.update(copy.deepcopy(pristine).__dict__)


def _resize(vocabulary: Vocabulary, rows: int) -> None:
    # `resize_token_embeddings` draws from the user's random stream and leaves an attribute behind
    table = vocabulary.table
    old = table.weight.data
    kept = min(rows, len(old))
    table.weight.grad = None
    # a loss that is still held keeps an accumulator of gradients of the old shape alive: another
    # dtype in between drops it
    other = torch.float32 if old.dtype == torch.float64 else torch.float64
    table.weight.data = old.new_empty(0, dtype=other)
    table.weight.data = torch.cat([old[:kept], old.new_zeros(rows - kept, old.shape[1])])
    table.num_embeddings = rows
    vocabulary.encoder.config.get_text_config().vocab_size = rows


def _refuse_saving(vocabulary: Vocabulary, token: str) -> None:
    message = "save_pretrained would lose the unfolded token {!r}: call fold_custom_token first"
    refuse(vocabulary.encoder, "save_pretrained", f"token {token}", message.format(token))


def _allow_saving(vocabulary: Vocabulary, token: str) -> None:
    allow(vocabulary.encoder, "save_pretrained", f"token {token}")


@torch.no_grad()
def _enter(vocabulary: Vocabulary, record: TokenRecord) -> None:
    """Give a token its id, its row and, while live, its module."""
    tokenizer = vocabulary.tokenizer
    state = vocabulary.state
    if state is None:
        state = TokenState(copy.deepcopy(tokenizer), vocabulary.table.num_embeddings)
        vocabulary.encoder.__dict__[TOKEN_STATE] = state
    tokenizer.add_tokens(record.token)
    number = tokenizer.convert_tokens_to_ids(record.token)
    if number >= vocabulary.table.num_embeddings:
        _resize(vocabulary, number + 1)
    row = vocabulary.table.weight.data[number]
    if number < state.rows:
        state.replaced_rows.setdefault(number, row.clone())
    if record.module is not None:
        if type(vocabulary.table) is nn.Embedding:
            TokenEmbedding.attach(vocabulary.table)
        table = cast(TokenEmbedding, vocabulary.table)
        table.live.append(record.module)
        table.live_ids.append(number)
        row.copy_(record.module())
        _refuse_saving(vocabulary, record.token)
    else:
        row.copy_(cast(Tensor, record.vector))
    state.records.append(record)


def _release(vocabulary: Vocabulary) -> None:
    if type(vocabulary.table) is TokenEmbedding and not vocabulary.table.live_ids:
        vocabulary.table.detach()


def _leaving(pipe: Any, dropped: Callable[[TokenRecord], bool]) -> list[Vocabulary]:
    """The vocabularies that have such tokens. Raises where one cannot give them up."""
    found = []
    for vocabulary in vocabularies(pipe):
        if any(dropped(record) for record in vocabulary.records):
            check_words(vocabulary)
            check_reachable(vocabulary.table, vocabulary.component)
            found.append(vocabulary)
    return found


@torch.no_grad()
def _leave(vocabulary: Vocabulary, dropped: Callable[[TokenRecord], bool]) -> None:
    """Take tokens out: tokenizer and table as they were, then the kept tokens again."""
    state = cast(TokenState, vocabulary.state)
    kept = [record for record in state.records if not dropped(record)]
    _restore_tokenizer(vocabulary.tokenizer, state.tokenizer)
    if isinstance(vocabulary.table, TokenEmbedding):
        vocabulary.table.detach()
    for record in state.records:
        _allow_saving(vocabulary, record.token)
    _resize(vocabulary, state.rows)
    for number, row in state.replaced_rows.items():
        vocabulary.table.weight.data[number] = row
    del vocabulary.encoder.__dict__[TOKEN_STATE]
    for record in kept:
        _enter(vocabulary, record)


@torch.inference_mode(False)  # or the module made here could not be trained afterwards
def add_custom_token(
    pipe: Any, token: str, config: TokenConfig | None = None, text_encoder: str = "text_encoder"
) -> nn.Module:
    """Add a word to a pipeline's vocabulary and return the module that makes its vector.

    The module takes nothing and returns the fp32 vector; its output takes the place of the token's
    row until `fold_custom_token` or `fold_stamina` writes it there. The vector starts in a random
    direction with the mean norm of the table's rows. Existing rows keep their bits. A pipeline
    with several text encoders needs one call for each (`text_encoder="text_encoder_2"`).

    Raises ValueError where the token is in the vocabulary already or holds white space, TypeError
    where the pipeline has no such text encoder with a tokenizer.
    """
    config = TokenConfig() if config is None else config
    check_new_token(pipe, text_encoder, token)
    vocabulary = vocabulary_of(pipe, text_encoder)
    table = vocabulary.table.weight.detach()
    norm = table.float().norm(dim=1).mean().item()
    digest = hashlib.sha256(f"{config.seed}/{token}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    module: nn.Module
    if config.generator == "mlp":
        module = TokenMLP(table.shape[1], norm, config.hidden, generator)
    else:
        module = TokenVector(table.shape[1], norm, generator)
    module.to(table.device)
    _enter(vocabulary, TokenRecord(token, module))
    guard_pipeline(pipe)
    return module


def enter_folded_tokens(pipe: Any, component: str, tokens: dict[str, Tensor], concept: str) -> None:
    """Add a finished concept's tokens, checked before by `check_new_token`."""
    vocabulary = vocabulary_of(pipe, component)
    for token, vector in tokens.items():
        _enter(vocabulary, TokenRecord(token, None, vector, concept))


def live_tokens(pipe_or_module: Any) -> list[tuple[str, nn.Module]]:
    """(token, its module) of every live token of a pipeline, or of a text encoder.

    Raises RuntimeError where one of the modules is no longer in its table.
    """
    if isinstance(pipe_or_module, nn.Module):
        encoders = {type(pipe_or_module).__name__: unwrap(pipe_or_module)}
    else:
        encoders = text_encoders(pipe_or_module)
    found = []
    for component, encoder in encoders.items():
        state: TokenState | None = encoder.__dict__.get(TOKEN_STATE)
        if state is not None:
            live_rows(component, encoder)
            found += [(r.token, r.module) for r in state.records if r.module is not None]
    return found


@torch.no_grad()
def live_vectors(pipe_or_module: Any) -> Tokens:
    """Component -> {token: fp32 vector} of the tokens that belong to no finished concept yet.

    Empty for a plain module. Raises ValueError for a vector that is not finite in the table's
    dtype, RuntimeError where a live token's row could not be written: its module is not in the
    table, or the tokenizer is not the one that the word was added to.
    """
    vectors: Tokens = {}
    for vocabulary in vocabularies(pipe_or_module):
        check_numbers(vocabulary)
        for record in vocabulary.records:
            if record.concept is not None:
                continue
            check_reachable(vocabulary.table, vocabulary.component)
            vector = record.vector if record.module is None else record.module()
            vector = cast(Tensor, vector).detach().cpu().clone()
            if not torch.isfinite(vector.to(vocabulary.table.weight.dtype)).all():
                raise ValueError(
                    f"the vector of token {record.token!r} is not finite in "
                    f"{vocabulary.table.weight.dtype}"
                )
            vectors.setdefault(vocabulary.component, {})[record.token] = vector
    return vectors


@torch.no_grad()
def _fold(vocabulary: Vocabulary, token: str, vector: Tensor, concept: str | None) -> None:
    state = cast(TokenState, vocabulary.state)
    place = next(k for k, record in enumerate(state.records) if record.token == token)
    record = state.records[place]
    if record.module is not None:
        table = cast(TokenEmbedding, vocabulary.table)
        number = vocabulary.tokenizer.convert_tokens_to_ids(token)
        table.weight.data[number] = vector.to(table.weight)
        at = table.live_ids.index(number)
        del table.live_ids[at], table.live[at]
        _allow_saving(vocabulary, token)
    state.records[place] = replace(record, module=None, vector=vector, concept=concept)
    _release(vocabulary)


def fold_vectors(pipe: Any, vectors: Tokens, concept: str | None) -> None:
    """Write the vectors that `live_vectors` returned into the tables, for a finished concept."""
    for component, tokens in vectors.items():
        vocabulary = vocabulary_of(pipe, component)
        for token, vector in tokens.items():
            _fold(vocabulary, token, vector, concept)
    release_pipeline(pipe)


def fold_custom_token(pipe: Any, token: str) -> None:
    """Write a live token's vector into its row of the table; the token stays in the vocabulary.

    `fold_stamina` on a pipeline does this by itself. Raises ValueError where the token is not live
    or its vector is not finite.
    """
    live = {
        vocabulary.component: record
        for vocabulary in vocabularies(pipe)
        for record in vocabulary.records
        if record.token == token and record.module is not None
    }
    if not live:
        raise ValueError(f"token {token!r} is not live: it was never added, or is folded already")
    vectors = live_vectors(pipe)
    fold_vectors(pipe, {c: {token: vectors[c][token]} for c in live}, None)


def remove_custom_token(pipe: Any, token: str) -> None:
    """Take a custom token out: tokenizer and table become what they were without it.

    Later custom tokens move down by one. Raises ValueError for a token that `add_custom_token` or a
    concept file did not bring, RuntimeError where something else added tokens after it or took
    some out.
    """
    known = [record for vocabulary in vocabularies(pipe) for record in vocabulary.records]
    if not any(record.token == token for record in known):
        raise ValueError(f"token {token!r} is not a custom token of this pipeline")
    _take_out(pipe, lambda record: record.token == token)


def _take_out(pipe: Any, dropped: Callable[[TokenRecord], bool]) -> None:
    for vocabulary in _leaving(pipe, dropped):
        _leave(vocabulary, dropped)
    release_pipeline(pipe)


def _of(concepts: Collection[str | None] | None) -> Callable[[TokenRecord], bool]:
    return lambda record: concepts is None or record.concept in concepts


def check_droppable(pipe_or_module: Any, concepts: Collection[str | None] | None = None) -> None:
    """Raise where `drop_tokens` would."""
    if not isinstance(pipe_or_module, nn.Module):
        _leaving(pipe_or_module, _of(concepts))


def drop_tokens(pipe_or_module: Any, concepts: Collection[str | None] | None = None) -> None:
    """Take out the tokens of these concepts (None among them: of the unfinished one), or all."""
    if not isinstance(pipe_or_module, nn.Module):
        _take_out(pipe_or_module, _of(concepts))
