# SPDX-License-Identifier: Apache-2.0
"""The operations `torch.ops.stamina.*`: schemas, shapes, autograd.

Each is declared once. Its only implementation looks the backend up by the name that the wrapper in
`functional.py` resolved; `reference.py` defines what it computes and the meaning of every argument.
Forward and backward are separate operations, so that `torch.compile` sees both; between them
nothing is saved but inputs and the packed bits.
"""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stamina_kernels import dispatch
from stamina_kernels.checks import PLAIN
from stamina_kernels.reference import word_count

_log = logging.getLogger(__name__)
_library = torch.library.Library("stamina", "DEF")
_announced: set[tuple[str, str]] = set()

_COORDINATES = "int[] layer_id, int[] row0, int[] col0"
_LOGITS = "Tensor[] U, Tensor[] V, Tensor[] b"
_MLPS = "Tensor[] E, Tensor[] W1, Tensor[] b1, Tensor[] W2, Tensor[] b2, bool[] transposed"
_SCHEMAS = {
    "sample": f"({_LOGITS}, Tensor seed, Tensor step, {_COORDINATES}, bool hard, str backend)"
    " -> Tensor",
    "compose": "(Tensor[] weight, Tensor[] A, Tensor[] B, Tensor bits, Tensor scale,"
    " ScalarType dtype, str backend) -> Tensor",
    "masked_linear": "(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] A, Tensor[] B,"
    f" {_LOGITS}, Tensor[] weight_init, Tensor scale, Tensor tau, Tensor seed, Tensor step,"
    f" {_COORDINATES}, bool hard, str sparse_kind, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "masked_linear_backward": "(Tensor dy, Tensor x, Tensor[] weight, Tensor[] A, Tensor[] B,"
    f" {_LOGITS}, Tensor[] weight_init, Tensor bits, Tensor scale, Tensor tau, Tensor seed,"
    f" Tensor step, Tensor g_forget, Tensor g_sparse, {_COORDINATES}, bool hard,"
    " str sparse_kind, bool need_dx, str backend) -> (Tensor, Tensor)",
    "embedding_mlp": f"({_MLPS}, str backend) -> Tensor",
    "embedding_mlp_backward": f"(Tensor[] dY, {_MLPS}, str backend) -> (Tensor, Tensor)",
    "fold_": "(Tensor(a!)[] weight, Tensor[] weight_init, Tensor[] A, Tensor[] B, float[] scale,"
    " Tensor[] bits, int[] first, str backend) -> ()",
}


def _announce(name: str, backend: str, device: torch.device) -> None:
    if (backend, device.type) not in _announced:
        _announced.add((backend, device.type))
        _log.info("stamina::%s runs on backend %r for device %s", name, backend, device.type)


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _contiguous(argument: Any) -> Any:
    """Backends read memory row by row. Copies are made here, where autograd does not keep them."""
    if isinstance(argument, Tensor):
        return argument.contiguous()
    if type(argument) is list and argument and isinstance(argument[0], Tensor):
        return [tensor.contiguous() for tensor in argument]
    return argument


def _make_implementation(name: str) -> Any:
    written = 1 if name == "fold_" else 0  # arguments that are written, in place

    def implementation(*arguments: Any) -> Any:
        *rest, backend = arguments
        device = _first_tensor(rest).device
        _announce(name, backend, device)
        rest[written:] = map(_contiguous, rest[written:])
        function = getattr(dispatch.load(backend), name)
        try:
            if not torch.is_autocast_enabled(device.type):
                return function(*rest)
            # the operation fixes its own precision; autocast may be active around the backward
            with torch.autocast(device.type, enabled=False):
                return function(*rest)
        finally:
            for weights in rest[:written]:  # through addresses, which autograd does not see
                torch.autograd.graph.increment_version(weights)

    return implementation


_implementations = {name: _make_implementation(name) for name in _SCHEMAS}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _implementations[_name], "CompositeExplicitAutograd")


def _total_rows(matrices: Sequence[Tensor]) -> Any:
    return sum(matrix.shape[0] for matrix in matrices)


def _fake_sample(U: Sequence[Tensor], V: Sequence[Tensor], *rest: Any) -> Tensor:
    return U[0].new_empty(_total_rows(U), word_count(V[0].shape[1]), dtype=torch.int32)


def _fake_compose(
    weight: Sequence[Tensor],
    A: Any,
    B: Any,
    bits: Any,
    scale: Any,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return weight[0].new_empty(_total_rows(weight), weight[0].shape[1], dtype=dtype)


def _fake_masked_linear(
    x: Tensor, weight: Sequence[Tensor], bias: Any, A: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, members = _total_rows(weight), len(weight)
    return (
        x.new_empty(*x.shape[:-1], rows),
        A[0].new_empty(members),
        A[0].new_empty(members),
        x.new_empty(members, 2, dtype=torch.int64),
        x.new_empty(rows, word_count(x.shape[-1]), dtype=torch.int32),
    )


def _fake_masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Any,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    need_dx = rest[-2]
    size = sum(t.numel() for group in (A, B, U, V, b) for t in group)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    return dx, A[0].new_empty(size)


def _fake_embedding_mlp(
    E: Sequence[Tensor], W1: Any, b1: Any, W2: Sequence[Tensor], *rest: Any
) -> Tensor:
    return E[0].new_empty(sum(e.shape[0] * w.shape[0] for e, w in zip(E, W2, strict=True)))


def _fake_embedding_mlp_backward(
    dY: Any, E: Sequence[Tensor], W1: Any, b1: Any, W2: Any, b2: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    size = sum(t.numel() for group in (W1, b1, W2, b2) for t in group)
    return E[0].new_empty(sum(e.numel() for e in E)), E[0].new_empty(size)


def _fake_fold(*arguments: Any) -> None:
    return None


_FAKES: dict[str, Any] = {
    "sample": _fake_sample,
    "compose": _fake_compose,
    "masked_linear": _fake_masked_linear,
    "masked_linear_backward": _fake_masked_linear_backward,
    "embedding_mlp": _fake_embedding_mlp,
    "embedding_mlp_backward": _fake_embedding_mlp_backward,
    "fold_": _fake_fold,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"stamina::{_name}", _fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, A, B, U, V, b, weight_init, scale, tau, seed, step, *static = inputs
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.members = len(weight)
    ctx.has_initial = bool(weight_init)
    ctx.biases = len(bias)
    ctx.static = static
    ctx.save_for_backward(
        x, output[4], scale, tau, seed, step, *weight, *A, *B, *U, *V, *b, *weight_init
    )


def _gradients(ctx: Any, backward: Any, dy: Tensor, g_forget: Tensor, g_sparse: Tensor) -> Any:
    """dx, or None where x needs no gradient, and the lists dA, dB, dU, dV, db."""
    x, bits, scale, tau, seed, step, *lists = ctx.saved_tensors
    n = ctx.members
    weight, A, B, U, V, b, initial = (list(lists[k * n : (k + 1) * n]) for k in range(7))
    layer_id, row0, col0, hard, sparse_kind, backend = ctx.static
    needs_dx = ctx.needs_input_grad[0]
    dx, flat = backward(
        dy, x, weight, A, B, U, V, b, initial, bits, scale, tau, seed, step,
        g_forget, g_sparse, layer_id, row0, col0, hard, sparse_kind, needs_dx, backend,
    )  # fmt: skip
    parts = flat.split([t.numel() for k in range(n) for t in (A[k], B[k], U[k], V[k], b[k])])
    factors = [
        [parts[5 * k + f].view_as(factor[k]) for k in range(n)]
        for f, factor in enumerate((A, B, U, V, b))
    ]
    return dx if needs_dx else None, factors


def _backward(
    ctx: Any, dy: Tensor, g_forget: Tensor, g_sparse: Tensor, _counts: Any, _bits: Any
) -> tuple[Any, ...]:
    dx, factors = _gradients(ctx, torch.ops.stamina.masked_linear_backward, dy, g_forget, g_sparse)
    none = [None] * ctx.members
    return (
        dx, none, [None] * ctx.biases, *factors, none if ctx.has_initial else [],
        *[None] * 4, *[None] * len(ctx.static),
    )  # fmt: skip


def _eager_implementation(backward: str) -> Any:
    """A backward's; the operation where a graph of it is wanted, which says that there is none."""
    if torch.is_grad_enabled():
        return getattr(torch.ops.stamina, backward)
    return _implementations[backward]


class _Eager(torch.autograd.Function):
    """The operation for eager calls: the same implementations and formula. torch.library's handling
    of lists takes half a millisecond a call, as long as a small projection itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Sequence[int], rest: Any, *tensors: Tensor) -> Any:
        members = iter(tensors)
        lists = [list(islice(members, length)) for length in lengths]
        inputs = (x, *lists, *rest)
        output = _implementations["masked_linear"](*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, g_forget: Tensor, g_sparse: Tensor, *_: Any) -> Any:
        backward = _eager_implementation("masked_linear_backward")
        dx, factors = _gradients(ctx, backward, dy, g_forget, g_sparse)
        none = [None] * ctx.members
        flat = [gradient for factor in factors for gradient in factor]
        return (
            dx, None, None, *none, *[None] * ctx.biases, *flat, *(none if ctx.has_initial else [])
        )  # fmt: skip


def _is_plain_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd watches: no mode, transform or tensor subclass."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or not {*map(type, tensors)} <= PLAIN
    )


def _refuse_tangents(name: str, arguments: Sequence[Any]) -> None:
    """Forward-mode derivatives, which torch.library's autograd would leave out in silence."""
    if forward_ad._current_level < 0:
        return
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivative")


def masked_linear(x: Tensor, lists: Sequence[Sequence[Tensor]], *rest: Any) -> Any:
    """`torch.ops.stamina.masked_linear(x, *lists, *rest)`, by the shortest way to it."""
    if torch.compiler.is_compiling():
        return torch.ops.stamina.masked_linear(x, *lists, *rest)
    tensors = [t for members in lists for t in members]
    _refuse_tangents("masked_linear", (x, *tensors, *rest))
    if _is_plain_eager([x, *tensors]):
        if not torch.is_grad_enabled():
            return _implementations["masked_linear"](x, *lists, *rest)
        return _Eager.apply(x, [len(members) for members in lists], rest, *tensors)
    return torch.ops.stamina.masked_linear(x, *lists, *rest)


torch.library.register_autograd(
    "stamina::masked_linear", _backward, setup_context=_setup_context, lib=_library
)


def _split_outputs(
    flat: Tensor, E: Sequence[Tensor], W2: Sequence[Tensor], transposed: Sequence[bool]
) -> list[Tensor]:
    """The outputs of `embedding_mlp`, views of what it returns."""
    sides = [(e.shape[0], w.shape[0]) for e, w in zip(E, W2, strict=True)]
    pieces = flat.split([n * m for n, m in sides])
    return [
        piece.view(m, n) if flipped else piece.view(n, m)
        for piece, (n, m), flipped in zip(pieces, sides, transposed, strict=True)
    ]


def _setup_mlp_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(*(t for members in lists for t in members))


def _saved_mlps(ctx: Any) -> list[list[Tensor]]:
    """E, W1, b1, W2 and b2. To be read once: checkpointing refuses to unpack a tensor twice."""
    saved, n = ctx.saved_tensors, len(ctx.transposed)
    return [list(saved[k * n : (k + 1) * n]) for k in range(5)]


def _mlp_gradients(
    ctx: Any, backward: Any, dY: Sequence[Tensor], mlps: list[list[Tensor]]
) -> list[list[Tensor]]:
    """The lists dE, dW1, db1, dW2 and db2."""
    E, *parameters = mlps
    flat_embeddings, flat = backward(dY, E, *parameters, ctx.transposed, ctx.backend)
    sizes = [e.numel() for e in E]
    dE = [d.view_as(e) for d, e in zip(flat_embeddings.split(sizes), E, strict=True)]
    small = [t for mlp in zip(*parameters, strict=True) for t in mlp]
    parts = flat.split([t.numel() for t in small])
    gradients = [part.view_as(t) for part, t in zip(parts, small, strict=True)]
    return [dE, *(gradients[k::4] for k in range(4))]


def _mlp_backward(ctx: Any, flat: Tensor) -> tuple[Any, ...]:
    mlps = _saved_mlps(ctx)
    dY = _split_outputs(flat, mlps[0], mlps[3], ctx.transposed)
    lists = _mlp_gradients(ctx, torch.ops.stamina.embedding_mlp_backward, dY, mlps)
    return (*lists, None, None)


class _EagerMLP(torch.autograd.Function):
    """`embedding_mlp` for eager calls; see `_Eager`."""

    @staticmethod
    def forward(ctx: Any, transposed: Sequence[bool], backend: str, *tensors: Tensor) -> Any:
        n = len(transposed)
        lists = [list(tensors[k * n : (k + 1) * n]) for k in range(5)]
        inputs = (*lists, transposed, backend)
        _setup_mlp_context(ctx, inputs, None)
        flat = _implementations["embedding_mlp"](*inputs)
        return tuple(_split_outputs(flat, lists[0], lists[3], transposed))

    @staticmethod
    def backward(ctx: Any, *dY: Tensor) -> Any:
        backward = _eager_implementation("embedding_mlp_backward")
        lists = _mlp_gradients(ctx, backward, dY, _saved_mlps(ctx))
        return (None, None, *(t for members in lists for t in members))


def embedding_mlp(
    lists: Sequence[Sequence[Tensor]], transposed: Sequence[bool], backend: str
) -> Sequence[Tensor]:
    """Every output of `torch.ops.stamina.embedding_mlp(*lists, transposed, backend)`."""
    if not torch.compiler.is_compiling():
        tensors = [t for members in lists for t in members]
        _refuse_tangents("embedding_mlp", tensors)
        if _is_plain_eager(tensors):
            return _EagerMLP.apply(transposed, backend, *tensors)
    flat = torch.ops.stamina.embedding_mlp(*lists, transposed, backend)
    return _split_outputs(flat, lists[0], lists[3], transposed)


torch.library.register_autograd(
    "stamina::embedding_mlp", _mlp_backward, setup_context=_setup_mlp_context, lib=_library
)


def _refuse_second_derivative(name: str) -> None:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name} has no second derivative (create_graph=True)")

    torch.library.register_autograd(f"stamina::{name}_backward", refuse, lib=_library)


for _name in ("masked_linear", "embedding_mlp"):
    _refuse_second_derivative(_name)
