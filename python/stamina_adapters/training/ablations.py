# SPDX-License-Identifier: Apache-2.0
"""STAMINA with one part changed: which settings each ablation fixes.

An ablation takes STAMINA's own settings, tuned or not, and then its change: it differs from the run
beside it in this one thing.
"""

from dataclasses import dataclass, field
from typing import Any

PREFIX = "ablation-"


@dataclass(frozen=True)
class Ablation:
    """`changes` of `StaminaSettings`; `replaced` of `MaskedSettings`, for eager PyTorch."""

    sentence: str
    changes: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)


def _adapter(sentence: str, **settings: Any) -> Ablation:
    return Ablation(sentence, {"adapter": settings})


def _training(sentence: str, **settings: Any) -> Ablation:
    return Ablation(sentence, {"training": settings})


def _replaced(sentence: str, **settings: Any) -> Ablation:
    return Ablation(sentence, replaced=settings)


_TABLE: dict[str, Ablation] = {
    "no-mask": _replaced("M = 1: plain LoRA with preservation and the MLP token", mask="none"),
    "soft-mask": _replaced("M = sigmoid(L), values in (0, 1), trained and folded", mask="soft"),
    "free-logits": _adapter("U and V of the logits are parameters", mask_generator="free"),
    "constant-mlp": _adapter(
        "U and V come from MLPs on a constant input", mask_generator="constant_mlp"
    ),
    "embedding-mlp": _adapter(
        "U and V come from MLPs over row and column embeddings, in every layer its own",
        mask_generator="embedding_mlp",
    ),
    "shared-mlp": _replaced(
        "one MLP for all layers over their row and column embeddings", logits="shared_mlp"
    ),
    "dense-logits": _replaced("a parameter for every logit, no low rank", logits="dense"),
    "no-token-mlp": Ablation(
        "the token's vector is trained itself, at a vector's rate",
        {"token": {"generator": "direct"}, "training": {"token_learning_rate": 2e-2}},
    ),
    "no-sparsity": _training("no density hinges", sparse_weight=0.0),
    "no-preservation": _training(
        "nothing keeps earlier concepts", preserve_weight=0.0, precondition=0.0
    ),
    "no-precondition": _training("B is trained itself", precondition=0.0),
    "forgetting-term": _training(
        "the forgetting term of the papers, lambda = 1e5, and nothing that looks at prompts",
        preserve_weight=0.0,
        precondition=0.0,
        forget_weight=1e5,
    ),
    "both-terms": _training("the forgetting term, lambda = 1e5, besides", forget_weight=1e5),
    "no-hard-phase": _training("masks are sampled to the last step", hard_fraction=0.0),
    "disjoint": _replaced("weights that an earlier concept changed are taken", reuse=False),
    "rank-4": _adapter("r = 4", r=4),
    "rank-16": _adapter("r = 16", r=16),
    "rank-64": _adapter("r = 64", r=64),
    "mask-rank-4": _adapter("m = 4", mask_rank=4),
    "mask-rank-64": _adapter("m = 64", mask_rank=64),
    "density-50": _adapter("masks start at density 0.5", density_init=0.5),
    "density-90": _adapter("masks start at density 0.9", density_init=0.9),
    "tau-03": _adapter("straight-through temperature 0.3", tau=0.3),
    "tau-3": _adapter("straight-through temperature 3", tau=3.0),
}

ABLATIONS: dict[str, Ablation] = {PREFIX + name: ablation for name, ablation in _TABLE.items()}


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` in it, group by group; neither is altered."""
    result = dict(settings)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) else value
    return result
