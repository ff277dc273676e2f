# SPDX-License-Identifier: Apache-2.0
"""`ConceptState`: a finished concept, as it is folded, filed and unfolded."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stamina_adapters.config import StaminaConfig
from stamina_kernels import CommittedAdapter

Tokens = dict[str, dict[str, Tensor]]
_LONGEST_NAME = 200  # file systems take 255 bytes, with what is put around the name


@dataclass(frozen=True)
class ConceptState:
    """One concept's committed values; nothing else of it is needed or kept.

    name     the adapter's name
    index    its place in the order of learning, ascending in every fold
    config   the settings it was trained with
    layers   module path -> committed update of that projection
    digests  module path -> `weight_digest` of the projection's weight before any concept
    tokens   pipeline component (as "text_encoder") -> {token: its fp32 vector}
    prompt   the prompt it was learned with, None where that is not known
    """

    name: str
    index: int
    config: StaminaConfig
    layers: dict[str, CommittedAdapter]
    digests: dict[str, str]
    tokens: Tokens = field(default_factory=dict)
    prompt: str | None = None


def check_name(name: Any) -> None:
    """Raise unless `name` can name an adapter, hence a file."""
    unfit = not isinstance(name, str) or not name or any(c in name for c in "/\\\0")
    if unfit or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            "adapter_name must be a non-empty string without '/', '\\' and NUL, of at most "
            f"{_LONGEST_NAME} bytes, got {name!r}"
        )


def weight_digest(weight: Tensor) -> str:
    """SHA-256, in hex, of a weight's dtype, shape and bytes."""
    data = weight.detach().cpu().contiguous()
    header = f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}\n"
    digest = hashlib.sha256(header.encode())
    digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
