# SPDX-License-Identifier: Apache-2.0
"""Custom tokens: a new word whose embedding is the output of a small module.

While a token is live, `TokenEmbedding` puts the module's output in the place of the token's row, so
that gradients reach the module and the table never changes. Folding writes the row.
"""

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
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

_STATE = "_stamina_tokens"


@dataclass(frozen=True)
class TokenRecord:
    """A custom token: `module` while it is live, the fp32 `vector` once it is folded.

    `concept` is the folded concept that it belongs to, None before there is one.
    """

    token: str
    module: nn.Module | None
    vector: Tensor | None = None
    concept: str | None = None


@dataclass
class TokenState:
    """What is kept on a text encoder: its tokenizer and table size before the first token."""

    tokenizer: Any
    rows: int
    replaced_rows: dict[int, Tensor] = field(default_factory=dict)
    records: list[TokenRecord] = field(default_factory=list)


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer and its text encoder in a pipeline."""

    component: str
    tokenizer: Any
    encoder: Any

    @property
    def state(self) -> TokenState | None:
        return self.encoder.__dict__.get(_STATE)

    @property
    def table(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()


def _vocabulary(pipe: Any, component: str) -> _Vocabulary:
    encoder = getattr(pipe, component, None)
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
    if not isinstance(encoder, nn.Module) or tokenizer is None:
        raise TypeError(f"{type(pipe).__name__} has no {component!r} with a tokenizer")
    return _Vocabulary(component, tokenizer, unwrap(encoder))


def _vocabularies(pipe: Any) -> Iterator[_Vocabulary]:
    for component, _ in text_encoders(pipe):
        yield _vocabulary(pipe, component)


def check_new_token(pipe: Any, component: str, token: str) -> None:
    """Raise where `token` cannot be added to the component's vocabulary."""
    vocabulary = _vocabulary(pipe, component)
    if not isinstance(token, str) or not token or any(c.isspace() for c in token):
        raise ValueError(f"token must be a word without white space, got {token!r}")
    tokenizer = vocabulary.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    if known or token in tokenizer.get_vocab():
        raise ValueError(f"token {token!r} is already in the vocabulary of {component!r}")
    table = vocabulary.table
    if type(table) not in (nn.Embedding, TokenEmbedding):
        raise TypeError(
            f"the token table of {component!r} must be a plain nn.Embedding, "
            f"got {type(table).__name__}"
        )
    check_reachable(table, component)
    modules = vocabulary.encoder.named_modules()
    owners = [n for n, m in modules if m._parameters.get("weight") is table.weight]
    if len(owners) > 1:
        raise TypeError(
            f"the token table of {component!r} is read by several modules, {', '.join(owners)}: a "
            "word that is put into one does not reach the others"
        )


def check_vector(pipe: Any, component: str, token: str, vector: Tensor) -> None:
    """Raise ValueError where `vector` is no row of the component's table, finite in its dtype."""
    table = _vocabulary(pipe, component).table.weight
    if vector.shape != table.shape[1:] or not torch.isfinite(vector.to(table.dtype)).all():
        raise ValueError(
            f"the vector of token {token!r} must be of size {table.shape[1]} and finite in "
            f"{table.dtype}, got {list(vector.shape)}"
        )


def _restore_tokenizer(tokenizer: Any, pristine: Any) -> None:
    # in place, because pipelines and users hold the object
    tokenizer.__dict__.clear()
    tokenizer.__dict__.update(copy.deepcopy(pristine).__dict__)


def _resize(vocabulary: _Vocabulary, rows: int) -> None:
    # `resize_token_embeddings` draws from the user's random stream and leaves an attribute behind
    table = vocabulary.table
    old = table.weight.data
    kept = min(rows, len(old))
    table.weight.grad = None
    table.weight.data = torch.cat([old[:kept], old.new_zeros(rows - kept, old.shape[1])])
    table.num_embeddings = rows
    vocabulary.encoder.config.get_text_config().vocab_size = rows


@torch.no_grad()
def _enter(vocabulary: _Vocabulary, record: TokenRecord) -> None:
    """Give a token its id, its row and, while live, its module."""
    tokenizer = vocabulary.tokenizer
    state = vocabulary.state
    if state is None:
        state = TokenState(copy.deepcopy(tokenizer), vocabulary.table.num_embeddings)
        vocabulary.encoder.__dict__[_STATE] = state
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
        message = "save_pretrained would lose the unfolded token {!r}: call fold_custom_token first"
        refuse(vocabulary.encoder, "save_pretrained", message.format(record.token))
    else:
        row.copy_(cast(Tensor, record.vector))
    state.records.append(record)


def _release(vocabulary: _Vocabulary) -> None:
    if type(vocabulary.table) is TokenEmbedding and not vocabulary.table.live_ids:
        vocabulary.table.detach()
        allow(vocabulary.encoder, "save_pretrained")


def _leaving(pipe: Any, dropped: Callable[[TokenRecord], bool]) -> list[_Vocabulary]:
    """The vocabularies that have such tokens. Raises where one cannot give them up."""
    found = []
    for vocabulary in _vocabularies(pipe):
        state = vocabulary.state
        if state is None or not any(dropped(record) for record in state.records):
            continue
        expected = len(state.tokenizer) + len(state.records)
        if len(vocabulary.tokenizer) != expected:
            raise RuntimeError(
                f"{vocabulary.component!r} has {len(vocabulary.tokenizer)} tokens, not {expected}: "
                "something else added tokens; remove those first"
            )
        check_reachable(vocabulary.table, vocabulary.component)
        found.append(vocabulary)
    return found


@torch.no_grad()
def _leave(vocabulary: _Vocabulary, dropped: Callable[[TokenRecord], bool]) -> None:
    """Take tokens out: tokenizer and table as they were, then the kept tokens again."""
    state = cast(TokenState, vocabulary.state)
    kept = [record for record in state.records if not dropped(record)]
    _restore_tokenizer(vocabulary.tokenizer, state.tokenizer)
    if isinstance(vocabulary.table, TokenEmbedding):
        vocabulary.table.detach()
    allow(vocabulary.encoder, "save_pretrained")
    _resize(vocabulary, state.rows)
    for number, row in state.replaced_rows.items():
        vocabulary.table.weight.data[number] = row
    del vocabulary.encoder.__dict__[_STATE]
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

    Raises ValueError where the token is in the vocabulary already or holds white space.
    """
    config = TokenConfig() if config is None else config
    check_new_token(pipe, text_encoder, token)
    vocabulary = _vocabulary(pipe, text_encoder)
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
    vocabulary = _vocabulary(pipe, component)
    for token, vector in tokens.items():
        _enter(vocabulary, TokenRecord(token, None, vector, concept))


def live_tokens(pipe_or_module: Any) -> list[tuple[str, nn.Module]]:
    """(token, its module) of every live token of a pipeline, or of a text encoder."""
    if isinstance(pipe_or_module, nn.Module):
        encoders = [unwrap(pipe_or_module)]
    else:
        encoders = [encoder for _, encoder in text_encoders(pipe_or_module)]
    states: list[TokenState | None] = [encoder.__dict__.get(_STATE) for encoder in encoders]
    records = [record for state in states if state is not None for record in state.records]
    return [(record.token, record.module) for record in records if record.module is not None]


@torch.no_grad()
def live_vectors(pipe_or_module: Any) -> Tokens:
    """Component -> {token: fp32 vector} of the tokens that belong to no finished concept yet.

    Empty for a plain module. Raises ValueError for a vector that is not finite in the table's
    dtype.
    """
    vectors: Tokens = {}
    for vocabulary in _vocabularies(pipe_or_module):
        records = [] if vocabulary.state is None else vocabulary.state.records
        for record in records:
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
def _fold(vocabulary: _Vocabulary, token: str, vector: Tensor, concept: str | None) -> None:
    state = cast(TokenState, vocabulary.state)
    place = next(k for k, record in enumerate(state.records) if record.token == token)
    record = state.records[place]
    if record.module is not None:
        table = cast(TokenEmbedding, vocabulary.table)
        number = vocabulary.tokenizer.convert_tokens_to_ids(token)
        table.weight.data[number] = vector.to(table.weight)
        at = table.live_ids.index(number)
        del table.live_ids[at], table.live[at]
    state.records[place] = replace(record, module=None, vector=vector, concept=concept)
    _release(vocabulary)


def fold_vectors(pipe: Any, vectors: Tokens, concept: str | None) -> None:
    """Write the vectors that `live_vectors` returned into the tables, for a finished concept."""
    for component, tokens in vectors.items():
        vocabulary = _vocabulary(pipe, component)
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
        for vocabulary in _vocabularies(pipe)
        if vocabulary.state is not None
        for record in vocabulary.state.records
        if record.token == token and record.module is not None
    }
    if not live:
        raise ValueError(f"token {token!r} is not live: it was never added, or is folded already")
    vectors = live_vectors(pipe)
    fold_vectors(pipe, {c: {token: vectors[c][token]} for c in live}, None)


def remove_custom_token(pipe: Any, token: str) -> None:
    """Take a custom token out: tokenizer and table become what they were without it.

    Later custom tokens move down by one. Raises ValueError for a token that `add_custom_token` or a
    concept file did not bring, RuntimeError where something else added tokens after it.
    """
    known = [v.state.records for v in _vocabularies(pipe) if v.state is not None]
    if not any(record.token == token for records in known for record in records):
        raise ValueError(f"token {token!r} is not a custom token of this pipeline")
    _take_out(pipe, lambda record: record.token == token)


def _take_out(pipe: Any, dropped: Callable[[TokenRecord], bool]) -> None:
    for vocabulary in _leaving(pipe, dropped):
        _leave(vocabulary, dropped)
    release_pipeline(pipe)


def _of(concepts: Collection[str | None] | None) -> Callable[[TokenRecord], bool]:
    return lambda record: concepts is None or record.concept in concepts


def check_droppable(pipe_or_module: Any, concepts: Collection[str | None]) -> None:
    """Raise where `drop_tokens` would."""
    if not isinstance(pipe_or_module, nn.Module):
        _leaving(pipe_or_module, _of(concepts))


def drop_tokens(pipe_or_module: Any, concepts: Collection[str | None] | None = None) -> None:
    """Take out the tokens of these concepts (None among them: of the unfinished one), or all."""
    if not isinstance(pipe_or_module, nn.Module):
        _take_out(pipe_or_module, _of(concepts))
