# SPDX-License-Identifier: Apache-2.0
"""Backend `cpu`: C++ with SIMD chosen at run time (`csrc/cpu`), threads from torch's own pool.

The functions are those of `reference.py`, which defines them. The library `_cpu.so` is loaded on
first use and registers `torch.ops.stamina_cpu`. The environment variable STAMINA_CPU_ISA forces an
instruction set: avx512_bf16, avx512, avx2 or portable; the first call raises RuntimeError for one
that this machine lacks.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stamina_kernels import reference
from stamina_kernels.libraries import check_interface, missing_reason
from stamina_kernels.reference import Tensors

_LIBRARY = Path(__file__).with_name("_cpu.so")
_INTERFACE_VERSION = 1  # of csrc/cpu/library.cpp


@cache
def _library() -> Any:
    torch.ops.load_library(_LIBRARY)
    library = torch.ops.stamina_cpu
    check_interface(getattr(library, "interface_version", None), _INTERFACE_VERSION)
    return library


@cache
def unavailable_reason() -> str | None:
    """None, or why the C++ backend cannot run here."""
    if not _LIBRARY.exists():
        return missing_reason(_LIBRARY, "a C++17 compiler and an importable torch")
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return f"{_LIBRARY.name} cannot be used: {error}"
    return None


@cache
def _kernels() -> Any:
    library = _library()
    library.instruction_set("")  # raises for a wrong STAMINA_CPU_ISA
    return library


def instruction_set() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or portable.

    On avx512_bf16 the products of a bf16 X with W_eff and dY take bf16 operands, twice as fast; on
    the others fp32 ones. Sums are fp32 on all, and the masks the same.
    """
    name: str = _kernels().instruction_set("")
    return name


def sample(
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
) -> Tensor:
    """Mask bits of the group, int32 [sum O, ceil(I / 32)]."""
    bits: Tensor = _kernels().sample.default(U, V, b, seed, step, layer_id, row0, col0, hard)
    return bits


def compose(
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """W_eff of the group from its bits, [sum O, I] in `dtype`, one rounding."""
    effective: Tensor = _kernels().compose.default(weight, A, B, bits, scale, dtype)
    return effective


def masked_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y, forget, sparse, counts and bits of the group; tau matters in the backward only."""
    joined = [torch.cat([row.to(x.dtype) for row in bias])] if bias else []
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _kernels().masked_linear.default(
        x, weight, joined, A, B, U, V, b, weight_init, scale, seed, step,
        layer_id, row0, col0, hard, sparse_kind,
    )  # fmt: skip
    return outputs


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    g_forget: Tensor,
    g_sparse: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dX (empty unless need_dx) and the flat gradients; the same for any number of threads."""
    gradients: tuple[Tensor, Tensor] = _kernels().masked_linear_backward.default(
        dy, x, weight, A, B, U, V, b, weight_init, bits, scale, tau, seed, step, g_forget, g_sparse,
        layer_id, row0, col0, hard, sparse_kind, need_dx,
    )  # fmt: skip
    return gradients


def embedding_mlp(
    E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors, transposed: Sequence[bool]
) -> Tensor:
    """Y of every MLP, or Y^T where it is `transposed`: flat, one after another."""
    flat: Tensor = _kernels().embedding_mlp.default(E, W1, b1, W2, b2, transposed)
    return flat


def embedding_mlp_backward(
    dY: Tensors, E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors,
    transposed: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dE of every MLP, and dW1, db1, dW2, db2 of every MLP: flat, one after another."""
    gradients: tuple[Tensor, Tensor] = _kernels().embedding_mlp_backward.default(
        dY, E, W1, b1, W2, b2, transposed
    )
    return gradients


def fold_(
    weight: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    bits: Sequence[Tensor],
    first: Sequence[int],
) -> None:
    """Fold in place, all layers at once; see `reference.fold_`."""
    overflowed = _kernels().fold_.default(weight, weight_init, A, B, scale, bits, first)
    if overflowed >= 0:
        raise reference.fold_overflow(overflowed, weight[overflowed].dtype)
