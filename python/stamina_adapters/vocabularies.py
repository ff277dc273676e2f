# SPDX-License-Identifier: Apache-2.0
"""A pipeline's vocabularies: tokenizers, token tables, the custom tokens kept beside them, and the
checks before any of it changes."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from stamina_adapters.guards import check_reachable
from stamina_adapters.models import base_layer, text_encoders
from stamina_adapters.token_modules import TokenEmbedding

TOKEN_STATE = "_stamina_tokens"


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
class Vocabulary:
    """A tokenizer and its text encoder in a pipeline."""

    component: str
    tokenizer: Any
    encoder: Any

    @property
    def state(self) -> TokenState | None:
        return self.encoder.__dict__.get(TOKEN_STATE)

    @property
    def records(self) -> list[TokenRecord]:
        return [] if self.state is None else self.state.records

    @property
    def table(self) -> nn.Embedding:
        return _table(self.encoder)


def _table(encoder: Any) -> nn.Embedding:
    """The encoder's token table, whatever PEFT wrapped around it."""
    return cast(nn.Embedding, base_layer(encoder.get_input_embeddings()))


def vocabulary_of(pipe: Any, component: str) -> Vocabulary:
    """The vocabulary of a pipeline's text encoder; TypeError where there is none."""
    encoder = text_encoders(pipe).get(component)
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
    if encoder is None or tokenizer is None:
        raise TypeError(f"{type(pipe).__name__} has no {component!r} with a tokenizer")
    return Vocabulary(component, tokenizer, encoder)


def vocabularies(pipe: Any) -> Iterator[Vocabulary]:
    """Those of a pipeline that custom tokens were added to; none for a plain module."""
    for component, encoder in text_encoders(pipe).items():
        if TOKEN_STATE in encoder.__dict__:
            yield vocabulary_of(pipe, component)


def check_new_token(pipe: Any, component: str, token: str) -> None:
    """Raise where `token` cannot be added to the component's vocabulary."""
    vocabulary = vocabulary_of(pipe, component)
    if not isinstance(token, str) or not token or any(c.isspace() for c in token):
        raise ValueError(f"token must be a word without white space, got {token!r}")
    tokenizer = vocabulary.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    if known or token in tokenizer.get_vocab():
        raise ValueError(f"token {token!r} is already in the vocabulary of {component!r}")
    table = vocabulary.encoder.get_input_embeddings()
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
    table = vocabulary_of(pipe, component).table.weight
    if vector.shape != table.shape[1:] or not torch.isfinite(vector.to(table.dtype)).all():
        raise ValueError(
            f"the vector of token {token!r} must be of size {table.shape[1]} and finite in "
            f"{table.dtype}, got {list(vector.shape)}"
        )


def live_rows(component: str, encoder: Any) -> dict[str, int]:
    """Token -> row of the table that its module makes, of an encoder's live tokens.

    Raises RuntimeError where something put another table in the place of the one with the module.
    """
    state = cast(TokenState | None, encoder.__dict__.get(TOKEN_STATE))
    live = [] if state is None else [r for r in state.records if r.module is not None]
    rows: dict[nn.Module | None, int] = {}
    if live and isinstance(table := _table(encoder), TokenEmbedding):
        rows.update(zip(table.live, table.live_ids, strict=True))
    for record in live:
        if record.module not in rows:
            raise RuntimeError(
                f"the token table of {component!r} was replaced (unload_textual_inversion does "
                f"that): it has lost the module of the live token {record.token!r}; put the table "
                "back, or load the model anew"
            )
    return {record.token: rows[record.module] for record in live}


def check_numbers(vocabulary: Vocabulary) -> None:
    """Raise unless the tokenizer gives each live token the number of the row made for it."""
    numbers = vocabulary.tokenizer.get_vocab()
    for token, row in live_rows(vocabulary.component, vocabulary.encoder).items():
        if numbers.get(token) != row:
            raise RuntimeError(
                f"token {token!r} has the id {numbers.get(token)} in the tokenizer of "
                f"{vocabulary.component!r}, not {row}: pass the pipeline that it was added to, "
                "with its own tokenizer"
            )


def check_words(vocabulary: Vocabulary) -> None:
    """Raise RuntimeError unless the words, and their numbers, are those from before the custom
    tokens and these tokens: to take one out goes back to what was before."""
    state = cast(TokenState, vocabulary.state)
    expected = copy.deepcopy(state.tokenizer)
    for record in state.records:
        expected.add_tokens(record.token)
    differing = expected.get_vocab().items() ^ vocabulary.tokenizer.get_vocab().items()
    if differing:
        words = sorted({word for word, _ in differing})
        raise RuntimeError(
            f"{vocabulary.component!r} has other words or other numbers for {', '.join(words[:9])}"
            f"{' ...' if len(words) > 9 else ''}: something else added tokens or took some out; "
            "undo that first"
        )
