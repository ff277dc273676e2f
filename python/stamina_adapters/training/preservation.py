# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier prompts, held in place while a new concept is learned.

An adapted key or value projection changes by D, so what a prompt's state h gives changes by D h.
Earlier concepts are words of the vocabulary: their prompts can be encoded at any time, without a
picture of them. A word's states depend on the sentence around it, so each is held in the prompt it
was learned with, and in the new concept's as well, by half where these differ. With h_kj the text
encoder's state at position j (of p) of the k-th earlier prompt (the empty prompt, which guidance
uses, is one of them), the term added to the loss is

    nu / n  sum_l  1 / c_l  sum_k  1 / p  sum_j  || D_l h_kj ||^2
        =  nu / n  sum_l  || H D_l^T ||_F^2 / c_l,           H^T H = 1 / p  sum_kj h_kj h_kj^T

over the n adapted layers of cross-attention, c_l = mean_kj || W_l h_kj ||^2: the relative change of
keys and values, summed over prompts (halves: sqrt(1/2) h_kj in H). H has no more rows than a state
has features, however many concepts there are: once it has, a step costs the same after every
further concept. With the term at zero an earlier prompt draws the same pictures as before. D_l is
the masked delta of this step, computed by the fused operator from the rows of H as from any other
input.

The same states precondition the factor B:

    B = B' C      C = (I + eta H^T H / e)^(-1/2), e = tr(H^T H) / prompts, halves as such

is what the fused operator gets, B' what is trained: directions in which earlier prompts have much
energy move less from the first step on.

The forgetting term of the papers, sum (S (.) D)^2, asks which weights earlier concepts changed;
this asks what a change does to earlier prompts. The term is this library's own. Related: the
constraint on text features when models are merged (Kumari et al., arXiv 2212.04488, section 3.3)
and updates kept out of the space of earlier inputs (Liang and Li, arXiv 2404.00228).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.prompts import tokenize

_OF_PROMPTS = (".attn2.to_k", ".attn2.to_v")
_NEGLIGIBLE = 1e-10
"""Directions with less than this share of the largest one's energy are fp32 rounding of states."""


def earlier_prompts(pipe: Any, concept: ConceptSpec, own: Mapping[str, str]) -> dict[str, float]:
    """The empty prompt and those of every other added word, each with its share.

    They are the prompt that the word was learned with, where `own` has it, and the concept's with
    this word in its word's place; where these differ each has half of the word's share. Words are
    those that the tokenizer was given after it was made, in the order of their numbers.
    """
    tokenizer = pipe.tokenizer
    special = set(tokenizer.all_special_tokens)
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda entry: entry[1])
    words = [word for word, _ in added if word not in special and word != concept.token]
    parts = concept.instance_prompt.split()
    shares = {"": 1.0}
    for word in words:
        todays = " ".join(word if part == concept.token else part for part in parts)
        learned = " ".join(own[word].split()) if word in own else todays  # white space is no matter
        prompts = dict.fromkeys((learned, todays))
        shares |= dict.fromkeys(prompts, 1.0 / len(prompts))
    return shares


@torch.no_grad()
def encode(pipe: Any, prompts: list[str]) -> Tensor:
    """The text encoder's states of prompts, [n, positions, features] in fp32."""
    states: Tensor = pipe.text_encoder(tokenize(pipe, prompts))[0]
    return states.float()


def factor(states: Tensor, shares: Sequence[float]) -> Tensor:
    """H [rank, features] with H^T H = sum over prompts by share, mean over positions, of h h^T."""
    roots = torch.tensor(shares, dtype=torch.float64, device=states.device).sqrt()
    wide = states.double() * roots[:, None, None]
    gram = torch.einsum("kji,kjc->ic", wide, wide) / states.shape[1]
    energies, directions = torch.linalg.eigh(gram)
    kept = energies > energies[-1] * _NEGLIGIBLE
    return (directions[:, kept] * energies[kept].sqrt()).t().float().contiguous()


def preconditioner(H: Tensor, prompts: float, strength: float) -> Tensor:
    """C [features, features] in fp32 at eta = strength; H as `factor` makes it, shares in all.

    The rows of H are orthogonal: C is the identity but for their directions.
    """
    wide = H.double()
    energies = wide.square().sum(1)
    directions = wide / energies.sqrt()[:, None]
    shares = energies * (prompts / energies.sum())
    change = ((1 + strength * shares).rsqrt() - 1)[:, None] * directions
    identity = torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)
    return (identity + directions.t() @ change).float()


class Preservation:
    """Earlier prompts of one concept. Made before it is learned: the states are encoded then."""

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        concept: ConceptSpec,
        layers: Mapping[str, Any],
        config: TrainingConfig,
        own: Mapping[str, str],
    ) -> None:
        """`layers`: path -> adapted layer; keys and values of cross-attention take part.

        `own`: earlier word -> the prompt it was learned with, as far as it is known.
        Preconditions them with eta = precondition, and makes the term with nu = preserve_weight.
        """
        chosen = {p: layer for p, layer in layers.items() if f".{p}".endswith(_OF_PROMPTS)}
        self._groups: list[tuple[list[str], Tensor]] = []  # paths, and H for their layers
        self._weights: dict[str, Tensor] = {}
        if not chosen or not (config.preserve_weight or config.precondition):
            return
        shares = earlier_prompts(pipe, concept, own)
        states = encode(pipe, list(shares))
        H = factor(states, list(shares.values()))
        if config.precondition:
            C = preconditioner(H, sum(shares.values()), config.precondition)
            for layer in chosen.values():
                layer.set_preconditioner(C.to(layer.weight.device))
        if config.preserve_weight:
            alike: dict[Any, list[str]] = {}
            for path, layer in chosen.items():
                size = F.linear(states.to(layer.weight), layer.weight)
                energy = size.float().square().sum(-1).mean()
                self._weights[path] = config.preserve_weight / (len(chosen) * energy)
                alike.setdefault((layer.weight.device, layer.weight.dtype), []).append(path)
            self._groups = [(paths, H.to(*place)) for place, paths in alike.items()]

    def term(self, changes: Callable[[list[str], Tensor], Iterable[Tensor]]) -> Tensor | None:
        """The term, 0-dim fp32, None where it has none; `changes(paths, H)` are H D^T of layers."""
        terms = [
            self._weights[path] * change.float().square().sum()
            for paths, H in self._groups
            for path, change in zip(paths, changes(paths, H), strict=True)
        ]
        return torch.stack(terms).sum() if terms else None
