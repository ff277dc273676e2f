# SPDX-License-Identifier: Apache-2.0
"""Backend `triton`: the operations on NVIDIA, AMD and Intel GPUs from one source.

Importing this package imports neither Triton nor a kernel; the first call of an operation does.

    tile.py         what one tile is: logits, uniforms, product, bits
    mask.py         sample
    composition.py  W_eff from bits, and W_eff with its bits and scalars in one pass
    backward.py     G in registers, contracted into the factors' gradients
    fold.py         all layers and all concepts in one launch
    group.py        how a group of projections reaches one launch: packed factors and a member table
    config.py       tile sizes and launch options
    mlp.py          small MLPs over embeddings, which make the masks' factors
    operations.py   those of a backend on projections
    embedding.py    the two on MLPs
"""

import importlib
import importlib.util
import os
from typing import Any

_OPERATIONS = {
    "compose": "operations",
    "embedding_mlp": "embedding",
    "embedding_mlp_backward": "embedding",
    "fold_": "operations",
    "masked_linear": "operations",
    "masked_linear_backward": "operations",
    "sample": "operations",
}


def unavailable_reason() -> str | None:
    """Why Triton cannot run here, or None. TRITON_INTERPRET=1 makes the CPU its device."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "no GPU is visible (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"


def __getattr__(name: str) -> Any:
    if name in _OPERATIONS:
        return getattr(importlib.import_module(f"{__name__}.{_OPERATIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
