# SPDX-License-Identifier: Apache-2.0
"""The procedural world: determinism, held-out identities, captions, tokenizer."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from stamina_adapters.embedded import world
from stamina_adapters.embedded.captions import (
    MAX_LENGTH,
    WordTable,
    draw_caption,
    full_caption,
    save_tokenizer,
    vocabulary,
)
from transformers import CLIPTokenizer


def test_equal_seeds_give_equal_pictures() -> None:
    for identity in world.heldout_identities()[:4]:
        first = world.render(identity, 3, seed=5)
        assert first.shape == (3, 64, 64, 3) and first.dtype == np.uint8
        assert np.array_equal(first, world.render(identity, 3, seed=5))
        assert not np.array_equal(first, world.render(identity, 3, seed=6))
        assert not np.array_equal(first[0], first[1])


def test_other_sizes_show_the_same_picture() -> None:
    for identity in world.heldout_identities()[:2]:
        large = world.render(identity, 2, seed=1, size=128).astype(float)
        small = world.render(identity, 2, seed=1, size=64).astype(float)
        halved = large.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
        # Anti-aliased edges differ; flat areas, most of the picture, agree.
        assert np.median(np.abs(halved - small)) <= 1.0


def test_heldout_identities_are_a_fixed_distinct_list() -> None:
    people = world.heldout_identities()
    splits = Counter(identity.split for identity in people)
    assert splits["sequence"] == 100 and splits["tuning"] >= 5 and len(people) >= 110
    assert len({identity.id for identity in people}) == len(people)
    for family in world.FAMILIES:
        rows = torch.stack([i.discrete for i in people if i.family == family])
        gaps = world.gaps(family, rows, rows) + 99 * torch.eye(len(rows), dtype=torch.long)
        assert int(gaps.min()) >= world.HELDOUT_GAP


def test_training_draws_stay_away_from_heldout_identities() -> None:
    generator = torch.Generator().manual_seed(3)
    for family in world.FAMILIES:
        held = torch.stack([i.discrete for i in world.heldout_identities() if i.family == family])
        drawn, _ = world.draw_training_identities(family, 3000, generator)
        assert len(drawn) == 3000
        assert int(world.gaps(family, drawn, held).min()) >= world.TRAINING_GAP
        free, _ = world.draw_identities(family, 3000, generator)
        # The rejection has work to do: free draws do come near.
        assert int(world.gaps(family, free, held).min()) < world.TRAINING_GAP


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="family must be one of"):
        world.attributes("car")
    with pytest.raises(ValueError, match="n and size must be positive"):
        world.render(world.heldout_identities()[0], 0, seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_each_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.model_max_length == MAX_LENGTH


def test_other_words_still_have_tokens_and_new_ones_can_be_added(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.unk_token_id not in tokenizer("zebra").input_ids[1:-1]
    before = tokenizer("a photo of").input_ids
    assert tokenizer.add_tokens("<v1>") == 1
    row = tokenizer("a photo of <v1>").input_ids
    assert row == [*before[:-1], len(tokenizer) - 1, before[-1]]


def test_word_table_agrees_with_the_tokenizer(tokenizer: CLIPTokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    table = WordTable(tokenizer)
    lengths = set()
    for family in world.FAMILIES:
        sample = world.draw_training_sample(family, 150, generator)
        for discrete, varied in zip(sample.discrete.tolist(), sample.varied.tolist(), strict=True):
            caption = draw_caption(family, discrete, varied, rng)
            lengths.add(len(caption))
            expected = tokenizer(" ".join(caption), padding="max_length", truncation=True).input_ids
            assert table.row(caption) == expected
    assert 0 in lengths and max(lengths) > 12


def test_captions_read_naturally() -> None:
    assert full_caption("landmark", {"kind": "castle"}) == "a photo of a castle"
    told = {"hair_style": "long", "hair": "red", "glasses": "glasses", "expression": "smiling"}
    assert full_caption("face", told) == "a photo of a smiling face with long red hair , glasses"
