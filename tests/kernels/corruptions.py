# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the public functions, and every way to make exactly one argument wrong."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from oracle import FACTORS, make_problem
from torch import Tensor

import stamina_kernels
from stamina_kernels import MAX_RANK, EmbeddingMLP, commit

NOT_TENSORS = (None, 1.5, "text", [1.0, 2.0])
NOT_INTEGERS = (None, 1.5, "1", float("nan"))


class Call(NamedTuple):
    """A public function by name, with its arguments."""

    function: str
    arguments: dict[str, Any]

    def __call__(self, backend: str) -> Any:
        arguments = dict(self.arguments)
        return getattr(stamina_kernels, self.function)(**arguments, backend=backend)

    def get(self, path: tuple) -> Any:
        value = self.arguments
        for key in path:
            value = getattr(value, key) if hasattr(value, "_replace") else value[key]
        return value

    def replaced(self, path: tuple, value: Any) -> "Call":
        return self._replace(arguments=_replaced(self.arguments, path, value))


class Corruption(NamedTuple):
    """names: the arguments of which the message must name one; two where neither is the truth."""

    label: str
    names: tuple[str, ...]
    call: Call


def _replaced(holder: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    if hasattr(holder, "_replace"):
        return holder._replace(**{key: _replaced(getattr(holder, key), tuple(rest), value)})
    copy = dict(holder) if isinstance(holder, dict) else list(holder)
    copy[key] = _replaced(copy[key], tuple(rest), value) if rest else value
    return copy


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in the arguments whose values can be read."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(element)


def _roomy(tensor: Tensor) -> Tensor:
    """The same values in the first half of a buffer, so that another view can overlap them."""
    buffer = torch.cat([tensor.flatten(), tensor.flatten()])
    return buffer[: tensor.numel()].view_as(tensor)


def valid_call(
    function: str, *, rows: int, columns: int, rank: int, mask_rank: int, dtype: torch.dtype
) -> Call:
    """Two projections, or two layers of one shape with two concepts each."""
    problem = make_problem(
        [rows, rows], columns, (3,), rank=rank, mask_rank=mask_rank, dtype=dtype, bias=True
    )
    group = problem.group
    if function == "masked_linear":
        return Call(function, {"x": problem.x, "projections": group, **problem.scalars()})
    if function == "sample_mask":
        scalars = {"seed": problem.seed, "step": problem.step}
        return Call(function, {"projections": group, **scalars})
    if function == "compose":
        bits = torch.full((2 * rows, (columns + 31) // 32), 5, dtype=torch.int32)
        return Call(function, {"projections": group, "bits": bits, "scale": problem.scale})
    if function == "commit":
        factors = {f: getattr(group[0], f) for f in FACTORS}
        return Call(function, {**factors, "scale": 0.5})
    if function == "embedding_mlp":
        mlps = [make_mlp(rows, rank, 7, mask_rank), make_mlp(columns, rank, 32, mask_rank, True)]
        return Call(function, {"mlps": mlps})
    adapters = [
        [commit(*(getattr(p, f) for f in FACTORS), scale=s, backend="reference") for s in (0.5, 2)]
        for p in group
    ]
    weights = [_roomy(p.weight) for p in group]
    initial = [_roomy(p.weight_init) for p in group]
    return Call(function, {"weights": weights, "weights_init": initial, "adapters": adapters})


def make_mlp(
    count: int, width: int, hidden: int, out: int, transposed: bool = False, seed: int = 0
) -> EmbeddingMLP:
    """An MLP whose outputs are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    return EmbeddingMLP(
        normal(count, width), normal(hidden, width), normal(hidden), normal(out, hidden),
        normal(out), transposed,
    )  # fmt: skip


def _matrix_shapes(tensor: Tensor, rows: bool, columns: bool) -> Iterator[tuple[str, Tensor]]:
    yield "three dimensions", tensor[None]
    yield "a vector", tensor.flatten()
    yield "0-dim", tensor.flatten()[0]
    if rows:
        yield "taller", torch.cat([tensor, tensor[:1]])
        yield "no rows", tensor[:0]
    if columns:
        yield "wider", torch.cat([tensor, tensor[:, :1]], 1)
        yield "no columns", tensor[:, :0]


def _tensor(call: Call, path: tuple, names: tuple[str, ...], *, optional: bool = False) -> Any:
    """Not a tensor, a dtype that never fits, another layout or device."""
    tensor = call.get(path)
    for wrong in NOT_TENSORS:
        if wrong is not None or not optional:
            yield Corruption(f"{path} {wrong!r}", names, call.replaced(path, wrong))
    for dtype in (torch.int8, torch.bool, torch.complex64):
        wrong = call.replaced(path, tensor.to(dtype))
        yield Corruption(f"{path} {dtype}", names, wrong)
    yield Corruption(f"{path} sparse", names, call.replaced(path, tensor.detach().to_sparse()))
    # where two disagree on the device, either may be named
    meta = torch.empty_like(tensor, device="meta")
    beside = tuple(
        f for f in (*FACTORS, "W1", "weights_init", "weight", "seed", "bits") if f != names[0]
    )
    yield Corruption(f"{path} device", names + beside, call.replaced(path, meta))


def _scalar(call: Call, name: str, *other_dtypes: torch.dtype) -> Iterator[Corruption]:
    value = call.get((name,))
    yield from _tensor(call, (name,), (name,))
    yield Corruption(f"{name} 1-dim", (name,), call.replaced((name,), value[None]))
    for dtype in other_dtypes:
        yield Corruption(f"{name} {dtype}", (name,), call.replaced((name,), value.to(dtype)))
    if value.is_floating_point():
        wrong = value.clone().requires_grad_()
        yield Corruption(f"{name} requires_grad", (name,), call.replaced((name,), wrong))


def _option(call: Call, name: str, *values: Any) -> Iterator[Corruption]:
    for value in values:
        yield Corruption(f"{name} {value!r}", (name,), call.replaced((name,), value))


def _factors(call: Call, at: tuple) -> Iterator[Corruption]:
    """A, B, U, V and b, at `at` in the arguments."""
    shapes = {"A": (True, False), "B": (True, True), "U": (True, False), "V": (True, True)}
    for name, (rows, columns) in shapes.items():
        path, tensor = (*at, name), call.get((*at, name))
        # fp64 throughout is legal: where one factor alone is, the others are named
        wide = FACTORS if name == "A" else (name,)
        yield from _tensor(call, path, (name,))
        yield Corruption(f"{path} half", (name,), call.replaced(path, tensor.half()))
        yield Corruption(f"{path} double", (*wide, "weight"), call.replaced(path, tensor.double()))
        if name in "BV" and not at:
            columns = False  # commit has no weight: columns of B are wrong where V's differ
            wider = call.replaced(path, torch.cat([tensor, tensor[:, :1]], 1))
            yield Corruption(f"{path} wider", ("B", "V"), wider)
        for label, wrong in _matrix_shapes(tensor, rows, columns):
            # commit holds A against B and U: none of them is the truth
            names = (name, "B", "U") if name == "A" and not at else (name,)
            yield Corruption(f"{path} {label}", names, call.replaced(path, wrong))
    for left, right in ("AB", "UV"):
        for rank in (0, MAX_RANK + 1):
            height, width = call.get((*at, left)).shape[0], call.get((*at, right)).shape[1]
            wrong = call.replaced((*at, left), torch.zeros(height, rank))
            wrong = wrong.replaced((*at, right), torch.zeros(rank, width))
            yield Corruption(f"{at} rank {rank} of {left} {right}", (left,), wrong)
    yield from _tensor(call, (*at, "b"), ("b",))
    b = call.get((*at, "b"))
    yield Corruption(f"{at} b 1-dim", ("b",), call.replaced((*at, "b"), b[None]))


def _projection(call: Call, k: int) -> Iterator[Corruption]:
    at = ("projections", k)
    yield from _factors(call, at)
    for name, optional in (("weight", False), ("bias", True), ("weight_init", True)):
        path, tensor = (*at, name), call.get((*at, name))
        yield from _tensor(call, path, (name,), optional=optional)
        if optional:
            yield Corruption(f"{path} missing", (name,), call.replaced(path, None))
            longer = torch.cat([tensor, tensor[:1]])
            yield Corruption(f"{path} longer", (name,), call.replaced(path, longer))
            yield Corruption(f"{path} extra", (name,), call.replaced(path, tensor[None]))
        if name != "weight_init":
            wrong = call.replaced(path, tensor.clone().requires_grad_())
            yield Corruption(f"{path} requires_grad", (name,), wrong)
    for label, wrong in _matrix_shapes(call.get((*at, "weight")), True, True):
        # its shape is held against x and the factors
        names = ("weight", "x", "A", "B")
        yield Corruption(f"{at} weight {label}", names, call.replaced((*at, "weight"), wrong))
    for name, limit in (("layer_id", 1 << 32), ("row0", 1 << 32), ("col0", 1 << 34)):
        for wrong in (-1, limit, *NOT_INTEGERS):
            bad = call.replaced((*at, name), wrong)
            yield Corruption(f"{at} {name} {wrong!r}", (name,), bad)
    for wrong in (None, 3, "text", call.get((*at, "weight"))):
        bad = call.replaced(at, wrong)
        yield Corruption(f"{at} {type(wrong)}", ("projections",), bad)


def _group(call: Call) -> Iterator[Corruption]:
    for wrong in (None, [], (), 3, "text"):
        bad = call.replaced(("projections",), wrong)
        yield Corruption(f"projections {wrong!r}", ("projections",), bad)
    for k in range(2):
        yield from _projection(call, k)


def _fold(call: Call) -> Iterator[Corruption]:
    for name in ("weights", "weights_init", "adapters"):
        for wrong in (None, 3, [], call.get((name,))[:1]):
            bad = call.replaced((name,), wrong)
            yield Corruption(f"{name} {type(wrong)}", (name,), bad)
    for k in range(2):
        for name in ("weights", "weights_init"):
            path, tensor = (name, k), call.get((name, k))
            yield from _tensor(call, path, (name,))
            other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
            either = ("weights", "weights_init")
            yield Corruption(f"{path} {other}", either, call.replaced(path, tensor.to(other)))
            for label, wrong in _matrix_shapes(tensor, True, True):
                names = (*either, "adapters")
                yield Corruption(f"{path} {label}", names, call.replaced(path, wrong))
            yield from _overlaps(call, path)
        strided = call.get(("weights", k)).repeat_interleave(2, 1)[:, ::2]
        if not strided.is_contiguous():
            bad = call.replaced(("weights", k), strided)
            yield Corruption(f"weights[{k}] strided", ("weights",), bad)
        for t in range(2):
            yield from _adapter(call, ("adapters", k, t))
        for wrong in (None, 3):
            bad = call.replaced(("adapters", k), wrong)
            yield Corruption(f"adapters[{k}] {wrong}", ("adapters",), bad)


def _overlaps(call: Call, path: tuple) -> Iterator[Corruption]:
    """Another argument's memory, whole and shifted by half; inputs may overlap inputs."""
    name, k = path
    victims = [("weights", 0), ("weights", 1)]
    for victim in victims:
        if victim == path:
            continue
        tensor = call.get(victim)
        half = (tensor.numel() + 1) // 2 if tensor.numel() > 1 else 0
        buffer = tensor.as_strided((2 * tensor.numel(),), (1,))
        for label, offset in (("is", 0), ("overlaps", half)):
            wrong = buffer[offset:][: tensor.numel()].view_as(tensor)
            yield Corruption(f"{path} {label} {victim}", (name,), call.replaced(path, wrong))


def _adapter(call: Call, at: tuple) -> Iterator[Corruption]:
    for name, rows in (("A", True), ("B", True), ("bits", True)):
        path, tensor = (*at, name), call.get((*at, name))
        yield from _tensor(call, path, (name,))
        yield Corruption(f"{path} float", (name,), call.replaced(path, tensor.float()))
        for label, wrong in _matrix_shapes(tensor, rows, name != "A"):
            yield Corruption(f"{path} {label}", (name,), call.replaced(path, wrong))
    for wrong in (None, "1", float("nan"), float("inf"), [1.0]):
        bad = call.replaced((*at, "scale"), wrong)
        yield Corruption(f"{at} scale {wrong!r}", ("scale",), bad)
    for wrong in (None, 1, (1,), (1, 2, 3), (0.5, 1), ("1", 2), (1 << 20, 0)):
        bad = call.replaced((*at, "exponent"), wrong)
        yield Corruption(f"{at} exponent {wrong!r}", ("exponent",), bad)
    for wrong in (None, 3, call.get((*at, "A"))):
        yield Corruption(f"{at} {type(wrong)}", ("adapters",), call.replaced(at, wrong))


def _non_finite(call: Call) -> Iterator[Corruption]:
    for name in FACTORS:
        for value in (float("nan"), float("inf"), float("-inf")):
            wrong = call.get((name,)).clone()
            wrong.view(-1)[-1] = value
            yield Corruption(f"{name} {value}", (name,), call.replaced((name,), wrong))
    for value in (float("nan"), float("inf"), None, "1", [1.0]):
        yield Corruption(f"scale {value!r}", ("scale",), call.replaced(("scale",), value))


def _mlps(call: Call) -> Iterator[Corruption]:
    for wrong in (None, [], (), 3, "text"):
        yield Corruption(f"mlps {wrong!r}", ("mlps",), call.replaced(("mlps",), wrong))
    for k in range(2):
        at = ("mlps", k)
        for wrong in (None, 3, call.get((*at, "E"))):
            yield Corruption(f"{at} {type(wrong)}", ("mlps",), call.replaced(at, wrong))
        for name in ("E", "W1", "b1", "W2", "b2"):
            path, tensor = (*at, name), call.get((*at, name))
            yield from _tensor(call, path, (name,))
            yield Corruption(f"{path} half", (name,), call.replaced(path, tensor.half()))
            # fp64 throughout is legal: the first tensor says which
            beside = ("W1", "mlps") if path == ("mlps", 0, "E") else (name,)
            yield Corruption(f"{path} double", beside, call.replaced(path, tensor.double()))
        for name, others, rows in (
            ("E", ("W1",), False), ("W1", ("W2", "b1"), True), ("W2", ("b2",), True),
        ):  # fmt: skip
            for label, wrong in _matrix_shapes(call.get((*at, name)), rows, True):
                bad = call.replaced((*at, name), wrong)
                yield Corruption(f"{at} {name} {label}", (name, *others), bad)
        yield Corruption(
            f"{at} E empty", ("E",), call.replaced((*at, "E"), call.get((*at, "E"))[:0])
        )
        for name in ("b1", "b2"):
            bias = call.get((*at, name))
            for label, wrong in (("longer", torch.cat([bias, bias[:1]])), ("extra", bias[None])):
                bad = call.replaced((*at, name), wrong)
                yield Corruption(f"{at} {name} {label}", (name,), bad)
        for sizes, name in (((257, 7, 3), "E"), ((3, 33, 3), "W1"), ((3, 7, 257), "W2")):
            bad = call.replaced(at, make_mlp(5, *sizes))
            yield Corruption(f"{at} sizes {sizes}", (name,), bad)
        for wrong in (None, 2, "yes"):
            bad = call.replaced((*at, "transposed"), wrong)
            yield Corruption(f"{at} transposed {wrong!r}", ("transposed",), bad)


def corruptions(call: Call) -> list[Corruption]:
    """All of them."""
    found: list[Corruption] = []
    if "projections" in call.arguments:
        found += _group(call)
    for name in ("scale", "tau"):
        if isinstance(call.arguments.get(name), Tensor):
            found += _scalar(call, name, torch.float64, torch.float16)
    for name in ("seed", "step"):
        if name in call.arguments:
            found += _scalar(call, name, torch.int32, torch.float32)
    if call.function == "masked_linear":
        x = call.get(("x",))
        found += _tensor(call, ("x",), ("x",))
        for label, wrong in (("0-dim", x[0, 0]), ("wider", torch.cat([x, x[:, :1]], 1))):
            found.append(Corruption(f"x {label}", ("x",), call.replaced(("x",), wrong)))
        found += _option(call, "sparse_kind", "l1", None, 3)
    if call.function in ("masked_linear", "sample_mask"):
        found += _option(call, "hard", "yes", None, 2)
    if call.function == "compose":
        found += _tensor(call, ("bits",), ("bits",))
        for label, wrong in _matrix_shapes(call.get(("bits",)), True, True):
            found.append(Corruption(f"bits {label}", ("bits",), call.replaced(("bits",), wrong)))
        found += _option(call, "dtype", torch.int8, torch.complex64, "float32")
    if call.function == "commit":
        found += [*_factors(call, ()), *_non_finite(call)]
    if call.function == "embedding_mlp":
        found += _mlps(call)
    if call.function == "fold_":
        found += _fold(call)
    return found
