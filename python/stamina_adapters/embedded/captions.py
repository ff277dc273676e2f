# SPDX-License-Identifier: Apache-2.0
"""Captions of the procedural world and the tokenizer that reads them.

A caption names some of a picture's discrete attributes, drawn at random each time it is told:
``a photo of a smiling pale face with long red hair , glasses , blue cap``. Continuous identity
parameters have no words. Each word is one token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from stamina_adapters.embedded import world

MAX_LENGTH = 26
EMPTY_SHARE = 0.1
SHORT_SHARE = 0.1
KEEP = 0.7
PREFIXES = (("a", "photo", "of"), ("a", "picture", "of"), ())
PREFIX_WEIGHTS = (0.65, 0.15, 0.2)

_SKY = {
    "day": ("by", "day"),
    "sunset": ("at", "sunset"),
    "night": ("at", "night"),
    "cloudy": ("under", "clouds"),
}
_NOUNS = ("face", "person", "landmark", "building")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def _face(told: dict[str, str], rng: random.Random) -> list[list[str]]:
    """The noun phrase and the further parts of a face's caption."""
    noun = ["a"]
    if "expression" in told and told["expression"] != "neutral":
        noun.append(told["expression"])
    if "skin" in told:
        noun.append(told["skin"])
    style = told.get("hair_style")
    if style == "bald":
        noun.append("bald")
    noun.append("person" if rng.random() < 0.2 else "face")
    parts = [noun]
    if style != "bald" and ("hair" in told or style):
        parts.append([word for word in (style, told.get("hair")) if word] + ["hair"])
    if told.get("glasses", "none") != "none":
        parts.append([told["glasses"]])
    if told.get("beard", "none") != "none":
        parts.append([told["beard"]])
    if told.get("hat", "none") != "none":
        colour = [told["hat_colour"]] if "hat_colour" in told else []
        parts.append([*colour, told["hat"]])
    if "shirt" in told:
        parts.append([told["shirt"], "shirt"])
    if "background" in told:
        parts.append([told["background"], "background"])
    return parts


def _landmark(told: dict[str, str], rng: random.Random) -> list[list[str]]:
    """The noun phrase and the further parts of a landmark's caption."""
    noun = ["a"]
    if "wall" in told:
        noun.append(told["wall"])
    noun.append(told.get("kind") or rng.choice(("landmark", "building")))
    parts = [noun]
    if "top" in told:
        parts.append([told["top"], "top"])
    if told.get("flag", "none") != "none":
        parts.append([told["flag"], "flag"])
    if told.get("plant", "none") != "none":
        parts.append([told["plant"]])
    if "sky" in told:
        parts.append(list(_SKY[told["sky"]]))
    if "ground" in told:
        parts.append(["on", told["ground"]])
    return parts


def words_of(family: str, discrete: Sequence[int], varied: Sequence[int]) -> dict[str, str]:
    """All attributes of one picture in words, identity's and nuisance's."""
    table = {**world.attributes(family), **world.nuisance(family)}
    values = [*discrete, *varied]
    return {name: words[value] for (name, words), value in zip(table.items(), values, strict=True)}


def full_caption(family: str, told: dict[str, str]) -> str:
    """The caption that names exactly the attributes ``told``, after ``a photo of``."""
    return " ".join(_join(("a", "photo", "of"), family, told, random.Random(0)))


def draw_caption(
    family: str, discrete: Sequence[int], varied: Sequence[int], rng: random.Random
) -> list[str]:
    """Draw a caption as a list of words: empty, short, or naming each attribute with ``KEEP``."""
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return []
    told = words_of(family, discrete, varied)
    short = kind < EMPTY_SHARE + SHORT_SHARE
    told = {
        name: word
        for name, word in told.items()
        if rng.random() < (0.9 if name == "kind" else 0.0 if short else KEEP)
    }
    prefix = rng.choices(PREFIXES, PREFIX_WEIGHTS)[0]
    return _join(prefix, family, told, rng)


def _join(
    prefix: Sequence[str], family: str, told: dict[str, str], rng: random.Random
) -> list[str]:
    noun, *parts = (_face if family == "face" else _landmark)(told, rng)
    caption = [*prefix, *noun]
    for index, part in enumerate(parts):
        caption += ["with" if index == 0 and part[0] not in ("by", "at", "under", "on") else ","]
        caption += part
    return caption[: MAX_LENGTH - 2]


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "photo", "picture", "of", "with", ",", "hair", "shirt", "background", "top"}
    words |= {"flag", "on", *_NOUNS}
    for phrase in _SKY.values():
        words.update(phrase)
    for family in world.FAMILIES:
        for table in (world.attributes(family), world.nuisance(family)):
            for values in table.values():
                words.update(values)
    return tuple(sorted(words - {"none", "neutral", "cloudy"}))


def save_tokenizer(folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the configuration of the caption tokenizer.

    The merges run byte-pair encoding to completion over `vocabulary`, so each word is one token.
    The vocabulary starts with all 256 bytes, so any other text still has tokens.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + k) for k in range(256 - len(printable))]
    letters = [chr(b) for b in printable] + others
    entries = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary()]
    while pairs := {pair for s in spellings for pair in zip(s, s[1:], strict=False)}:
        pair = min(pairs)
        merges.append(pair)
        entries.append("".join(pair))
        spellings = [_merge(s, pair) for s in spellings]
    entries += [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            out.append("".join(pair))
            index += 2
        else:
            out.append(pieces[index])
            index += 1
    return out


class WordTable:
    """Token numbers of captions given as words, the same as the tokenizer's but much faster.

    Args:
        tokenizer: the caption tokenizer.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.number = {
            word: tokenizer.convert_tokens_to_ids(word + "</w>") for word in vocabulary()
        }
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def row(self, caption: Sequence[str]) -> list[int]:
        """Start, words, end, padded with the end token to ``MAX_LENGTH``."""
        ids = [self.start, *(self.number[word] for word in caption), self.end]
        return ids + [self.end] * (MAX_LENGTH - len(ids))

    def rows(self, captions: Sequence[Sequence[str]]) -> Tensor:
        """Token numbers of many captions, ``int64 [n, MAX_LENGTH]``."""
        return torch.tensor([self.row(caption) for caption in captions])
