# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for masked low-rank adapters: W_eff = W + s M (.) (A B), tile by tile.

Tensors in, tensors out. `reference.py` holds the formulas, `functional.py` the public functions.
"""

from stamina_kernels.dispatch import backends, use_backend
from stamina_kernels.functional import (
    MAX_RANK,
    CommittedAdapter,
    EmbeddingMLP,
    MaskedLinearOutput,
    MaskedProjection,
    commit,
    compose,
    embedding_mlp,
    fold_,
    masked_linear,
    sample_mask,
    unpack_bits,
)
from stamina_kernels.info import info

__version__ = "0.1.0"

__all__ = [
    "MAX_RANK",
    "CommittedAdapter",
    "EmbeddingMLP",
    "MaskedLinearOutput",
    "MaskedProjection",
    "backends",
    "commit",
    "compose",
    "embedding_mlp",
    "fold_",
    "info",
    "masked_linear",
    "sample_mask",
    "unpack_bits",
    "use_backend",
]
