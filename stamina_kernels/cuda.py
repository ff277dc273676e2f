# SPDX-License-Identifier: Apache-2.0
"""Backend `cuda`: CUDA C++ for NVIDIA GPUs of compute capability 8.0 and above (`csrc/cuda`).

The functions are those of `reference.py`, which defines them. The library `_cuda.so` is loaded on
first use through its C interface (`csrc/cuda/interface.h`), needs no driver to load, and launches
on torch's current stream. sample, compose, masked_linear's W_eff with its bits and statistics, the
factors' gradients (of groups that `_SERVED` describes) and fold_ are its own kernels; the products
Y = X W_eff^T and dX = dY W_eff are the vendor's. The gradients of other groups are backend
`triton`'s, and so are the MLPs of the masks' factors.
"""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stamina_kernels import reference
from stamina_kernels.cuda_interface import Adapter, Layer, Member, check, load
from stamina_kernels.device import on
from stamina_kernels.libraries import missing_reason

_log = logging.getLogger(__name__)
_LIBRARY = Path(__file__).with_name("_cuda.so")
_LEAST_CAPABILITY = (8, 0)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# `serves_backward` of csrc/cuda/backward_tables.h, in words
_SERVED = (
    "one 16-bit type at 16-byte addresses, equal ranks of at most 16, sizes divisible by 8, "
    "first columns divisible by 4"
)


@cache
def _library() -> Any:
    return load(_LIBRARY)


@cache
def unavailable_reason() -> str | None:
    """None, or why the CUDA backend cannot run here."""
    if not _LIBRARY.exists():
        return missing_reason(_LIBRARY, "nvcc of CUDA 12 or newer")
    try:
        _library()
    except OSError as error:
        return f"{_LIBRARY.name} cannot be used: {error}"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability}, it needs {_LEAST_CAPABILITY}"
    if _library().stamina_usable() != 0:
        return f"{_LIBRARY.name} cannot be used: {_library().stamina_error().decode()}"
    return None


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(torch.cuda.current_stream(device).cuda_stream)


def _pointer(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """The address of a contiguous tensor; raises for any other, which the kernels would misread."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _pointers(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[int]:
    """Those of many tensors, checked together."""
    if all(t.dtype is dtype and t.device == device and t.is_contiguous() for t in tensors):
        return [t.data_ptr() for t in tensors]
    return [_pointer(name, tensor, dtype, device) for tensor in tensors]


class _Group:
    """The members of a group as the library takes them."""

    def __init__(
        self,
        device: torch.device,
        A: Sequence[Tensor] = (),
        B: Sequence[Tensor] = (),
        U: Sequence[Tensor] = (),
        V: Sequence[Tensor] = (),
        b: Sequence[Tensor] = (),
        weight: Sequence[Tensor] = (),
        weight_init: Sequence[Tensor] = (),
        coordinates: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        left, right = A or U, B or V
        self.device = device
        self.rows = sum(t.shape[0] for t in left)
        self.columns = right[0].shape[1]
        self.words = reference.word_count(self.columns)
        members = [Member(out_features=t.shape[0]) for t in left]
        for name, tensors in {"A": A, "B": B, "U": U, "V": V, "b": b}.items():
            for member, tensor in zip(members, tensors, strict=bool(tensors)):
                setattr(member, name, _pointer(name, tensor, torch.float32, device))
        for name, tensors in {"weight": weight, "weight_init": weight_init}.items():
            for k, tensor in enumerate(tensors):
                setattr(members[k], name, _pointer(name, tensor, weight[k].dtype, device))
        for k, member in enumerate(members):
            member.rank = A[k].shape[1] if A else 0
            member.mask_rank = U[k].shape[1] if U else 0
            member.dtype = _DTYPES[weight[k].dtype] if weight else 0
            if coordinates:
                member.layer_id, member.row0, member.col0 = coordinates[k]
        self._members = (Member * len(members))(*members)
        self.head = (self._members, len(members), self.columns)

    def empty_bits(self) -> Tensor:
        return torch.empty(self.rows, self.words, dtype=torch.int32, device=self.device)

    def empty_effective(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows, self.columns, dtype=dtype, device=self.device)


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
    device = seed.device
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = _Group(device, U=U, V=V, b=b, coordinates=coordinates)
    bits = group.empty_bits()
    with on(device):
        status = _library().stamina_sample(
            *group.head,
            _pointer("seed", seed, torch.int64, device),
            _pointer("step", step, torch.int64, device),
            hard, bits.data_ptr(), _stream(device),
        )  # fmt: skip
    check(_library(), status)
    return bits


def compose(
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """W_eff = W + s M (.) (A B) of the group from its bits, [sum O, I] in `dtype`, one rounding."""
    return _compose(_Group(bits.device, A, B, weight=weight), bits, scale, dtype)


def _compose(group: _Group, bits: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    device = bits.device
    effective = group.empty_effective(dtype)
    with on(device):
        status = _library().stamina_compose(
            *group.head,
            _pointer("scale", scale, torch.float32, device),
            _pointer("bits", bits, torch.int32, device),
            _DTYPES[dtype], effective.data_ptr(), _stream(device),
        )  # fmt: skip
    check(_library(), status)
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
    """Y, forget, sparse, counts and bits of the group; tau matters in the backward only.

    W_eff of up to 36 members comes from one launch. The product is the vendor's: one that made its
    own tiles of W_eff would draw and multiply them once for every 128 tokens.
    """
    device, n = x.device, len(weight)
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = _Group(device, A, B, U, V, b, weight, weight_init, coordinates)
    effective, bits = group.empty_effective(x.dtype), group.empty_bits()
    forget, sparse = A[0].new_empty(n), A[0].new_empty(n)
    counts = torch.empty(n, 2, dtype=torch.int64, device=device)
    library = _library()
    scratch = torch.empty(
        max(library.stamina_scratch_bytes(*group.head), 0), dtype=torch.uint8, device=device
    )
    with on(device):
        status = library.stamina_sample_compose(
            *group.head,
            _pointer("scale", scale, torch.float32, device),
            _pointer("seed", seed, torch.int64, device),
            _pointer("step", step, torch.int64, device),
            hard, sparse_kind == "relu", _DTYPES[x.dtype], effective.data_ptr(), bits.data_ptr(),
            forget.data_ptr(), sparse.data_ptr(), counts.data_ptr(), scratch.data_ptr(),
            scratch.numel(), _stream(device),
        )  # fmt: skip
    check(_library(), status)
    row_bias = torch.cat([row.to(x.dtype) for row in bias]) if bias else None
    return F.linear(x, effective, row_bias), forget, sparse, counts, bits


@cache
def _triton_or_reference() -> Any:
    """The backend for what this one has no kernel of and torch can do as well, slower."""
    from stamina_kernels import triton

    reason = triton.unavailable_reason()
    name = "triton" if reason is None else "reference"
    why = f": {reason}" if reason else ""
    _log.info("stamina::embedding_mlp of backend 'cuda' is that of %r%s", name, why)
    return triton if reason is None else reference


def embedding_mlp(*arguments: Any) -> Tensor:
    """Backend `triton`'s, or where that cannot run the reference's."""
    out: Tensor = _triton_or_reference().embedding_mlp(*arguments)
    return out


def embedding_mlp_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `embedding_mlp`."""
    gradients: tuple[Tensor, Tensor] = _triton_or_reference().embedding_mlp_backward(*arguments)
    return gradients


@cache
def _contraction() -> Any:
    """Backend `triton`, or RuntimeError where it cannot run."""
    from stamina_kernels import triton

    reason = triton.unavailable_reason()
    if reason is not None:
        raise RuntimeError(
            "backend 'cuda' takes masked_linear_backward of this group from backend 'triton' (its "
            f"own serves {_SERVED}), which cannot run: {reason}; backend 'reference' needs neither"
        )
    _log.info(
        "stamina::masked_linear_backward of backend 'cuda' runs the kernel of 'triton' but for %s",
        _SERVED,
    )
    return triton.masked_linear_backward


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
    """dX (empty unless need_dx) and the flat gradients of every member.

    dX = dY W_eff has the bits and the roundings of the forward. Raises RuntimeError where the
    gradients are backend `triton`'s and Triton cannot run.
    """
    device, factors = x.device, (A, B, U, V, b)
    coordinates = list(zip(layer_id, row0, col0, strict=True))
    group = _Group(device, *factors, weight, weight_init, coordinates)
    library, dtype = _library(), _DTYPES[x.dtype]
    size = library.stamina_backward_scratch_bytes(*group.head, dy.data_ptr(), x.data_ptr(), dtype)
    if size == 0:
        _, gradients = _contraction()(
            dy, x, weight, *factors, weight_init, bits, scale, tau, seed, step, g_forget, g_sparse,
            layer_id, row0, col0, hard, sparse_kind, False,
        )  # fmt: skip
    else:
        gradients = factors[0][0].new_empty(sum(t.numel() for ts in factors for t in ts))
        scratch = torch.empty(max(size, 0), dtype=torch.uint8, device=device)
        with on(device):
            status = library.stamina_backward(
                *group.head,
                _pointer("dy", dy, x.dtype, device),
                _pointer("x", x, x.dtype, device),
                x.numel() // group.columns,
                _pointer("scale", scale, torch.float32, device),
                _pointer("tau", tau, torch.float32, device),
                _pointer("seed", seed, torch.int64, device),
                _pointer("step", step, torch.int64, device),
                _pointer("g_forget", g_forget, torch.float32, device),
                _pointer("g_sparse", g_sparse, torch.float32, device),
                hard, sparse_kind == "relu", dtype,
                _pointer("bits", bits, torch.int32, device),
                gradients.data_ptr(), scratch.data_ptr(), scratch.numel(), _stream(device),
            )  # fmt: skip
        check(library, status)
    dx = dy @ _compose(group, bits, scale, x.dtype) if need_dx else x.new_empty(0)
    return dx, gradients


def fold_(
    weight: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    bits: Sequence[Tensor],
    first: Sequence[int],
) -> None:
    """Fold in place, all layers in one launch; see `reference.fold_`."""
    device = weight[0].device
    chosen = [k for k, w in enumerate(weight) if first[k] < first[k + 1]]
    taken = [t for k in chosen for t in range(first[k], first[k + 1])]
    layers = [
        (
            _pointer("weight", weight[k], weight[k].dtype, device),
            _pointer("weight_init", weight_init[k], weight[k].dtype, device),
            *weight[k].shape,
            _DTYPES[weight[k].dtype],
            first[k + 1] - first[k],
        )
        for k in chosen
    ]
    adapters = list(
        zip(
            _pointers("A", [A[t] for t in taken], torch.float16, device),
            _pointers("B", [B[t] for t in taken], torch.float16, device),
            _pointers("bits", [bits[t] for t in taken], torch.int32, device),
            [A[t].shape[1] for t in taken],
            [scale[t] for t in taken],
            strict=True,
        )
    )
    overflow = torch.zeros(len(layers), dtype=torch.int32, device=device)
    if chosen:
        _launch_fold(layers, adapters, overflow)
    for k in set(range(len(weight))).difference(chosen):  # last: the launch may be refused
        weight[k].copy_(weight_init[k])
    overflowed = overflow.nonzero().flatten().tolist()
    if not overflowed:
        return
    for w, initial in zip(weight, weight_init, strict=True):
        w.copy_(initial)
    layer = chosen[overflowed[0]]
    raise reference.fold_overflow(layer, weight[layer].dtype)


def _launch_fold(layers: list[Any], adapters: list[Any], overflow: Tensor) -> None:
    """Of every layer and adapter what `Layer` and `Adapter` hold, in their order."""
    library, device = _library(), overflow.device
    layer_table = (Layer * len(layers))(*layers)
    adapter_table = (Adapter * len(adapters))(*adapters)
    scratch = torch.empty(
        library.stamina_fold_scratch_bytes(len(layers), adapter_table, len(adapters)),
        dtype=torch.uint8,
        device=device,
    )
    with on(device):
        status = library.stamina_fold(
            layer_table, len(layers), adapter_table, len(adapters),
            overflow.data_ptr(), scratch.data_ptr(), scratch.numel(), _stream(device),
        )  # fmt: skip
    check(_library(), status)
