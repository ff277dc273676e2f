# SPDX-License-Identifier: Apache-2.0
"""Measure launch options on this machine's GPU and write them where `config.py` finds them.

    python -m stamina_kernels.triton.tune --output FOLDER
    STAMINA_TRITON_CONFIGS=FOLDER python ...

Nothing is tuned unless this is run. Every candidate computes the K and V projections of an SDXL
block (2048 -> 1280 twice, 154 tokens, rank 16, bf16 and fp32), makes their masks' factors, or folds
ten concepts into them. One that fails to launch, or whose results are not those of the default
options, is left out.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from stamina_kernels import (
    EmbeddingMLP,
    MaskedProjection,
    commit,
    compose,
    cost,
    embedding_mlp,
    fold_,
    masked_linear,
    sample_mask,
)
from stamina_kernels.checks import MAX_HIDDEN
from stamina_kernels.triton import config

Run = Callable[[], Sequence[Tensor]]
_SHAPES = {"rows": 1280, "columns": 2048, "tokens": 154, "rank": 16}
_CONCEPTS = 10
_PRODUCT_EPS = 2.0**-16  # of the products of fp32 factors where W has 16 bits: `dot_precision`


def _grid(**values: Sequence[int]) -> list[dict[str, int]]:
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


_GENERATING = ("statistics", "generate_fp32", "generate_half")
_ELEMENTWISE = _grid(BO=(16, 32), BI=(64, 128), num_warps=(4, 8), programs=(2, 4, 8))
_PRODUCT = _grid(BO=(32, 64, 128), BI=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4))
CANDIDATES = {
    "sample": _ELEMENTWISE,
    "compose": _ELEMENTWISE,
    "sample_compose": _ELEMENTWISE,
    "statistics": _ELEMENTWISE,
    "fold": _ELEMENTWISE,
    "mlp": _grid(BN=(32, 64, 128), num_warps=(2, 4, 8)),
    **{
        config.kernel_name(kernel, dtype): [c | {"BN": n} for c in _PRODUCT for n in tokens]
        for kernel, tokens in (("generate", (64, 128)), ("backward", (32, 64)))
        for dtype in (torch.float32, torch.bfloat16)
    },
    "backward_half_r32": [c | {"BN": 32} for c in _PRODUCT],
}


class _Case(NamedTuple):
    group: list[MaskedProjection]
    x: Tensor
    scalars: dict[str, Tensor]


def _case(device: torch.device, dtype: torch.dtype, shapes: dict[str, int]) -> _Case:
    generator = torch.Generator().manual_seed(0)
    rows, columns, rank = shapes["rows"], shapes["columns"], shapes["rank"]

    def normal(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device, to)

    group = []
    for layer_id in range(2):
        weight = normal(rows, columns, to=dtype)
        A, B, U, V = (normal(*s).requires_grad_() for s in ((rows, rank), (rank, columns)) * 2)
        b = torch.zeros((), device=device, requires_grad=True)
        initial = weight * 0.99
        group.append(MaskedProjection(weight, A, B, U, V, b, layer_id, weight_init=initial))
    numbers = {"scale": 1.0, "tau": 1.0, "seed": 0, "step": 0}
    scalars = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    return _Case(group, normal(shapes["tokens"], columns, to=dtype), scalars)


def _mlps(device: torch.device, shapes: dict[str, int]) -> Run:
    """Both factors of two masks from MLPs, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    rank = shapes["rank"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    mlps = [
        EmbeddingMLP(
            normal(shapes[side], rank), normal(MAX_HIDDEN, rank), normal(MAX_HIDDEN),
            normal(rank, MAX_HIDDEN), normal(rank), transposed=side == "columns",
        )
        for side in ("rows", "columns") * 2
    ]  # fmt: skip
    leaves = [t for mlp in mlps for t in mlp[:5]]

    def both() -> list[Tensor]:
        outputs = embedding_mlp(mlps, backend="triton")
        return [*outputs, *torch.autograd.grad([y.square().mean() for y in outputs], leaves)]

    return both


def _runs(kernel: str, device: torch.device, shapes: dict[str, int]) -> Run:
    """What exercises a kernel, and the tensors that show whether it still computes the same."""
    dtype = torch.float32 if kernel.endswith("fp32") else torch.bfloat16
    if device.type == "cpu":  # the interpreter, in tests
        dtype = torch.float32
    if kernel.endswith("_r32"):
        shapes = shapes | {"rank": 32}
    if kernel == "mlp":
        return _mlps(device, shapes)
    case = _case(device, dtype, shapes)
    scalars: dict[str, Any] = case.scalars

    def forward() -> Any:
        return masked_linear(case.x, case.group, **scalars, backend="triton")

    def draw() -> Tensor:
        seed, step = scalars["seed"], scalars["step"]
        return sample_mask(case.group, seed=seed, step=step, backend="triton")

    if kernel == "sample":
        return lambda: [draw()]
    if kernel == "compose":
        bits = draw()
        scale = case.scalars["scale"]
        return lambda: [compose(case.group, bits, scale=scale, backend="triton")]
    if kernel == "sample_compose" or kernel in _GENERATING:
        return lambda: list(forward()[:3])
    if kernel.startswith("backward"):
        leaves = [t for p in case.group for t in (p.A, p.B, p.U, p.V, p.b)]
        out = forward()
        outputs = [out.y.float().square().sum(), out.forget.sum(), out.sparse.sum()]
        return lambda: torch.autograd.grad(sum(outputs), leaves, retain_graph=True)
    weights = [torch.empty_like(p.weight) for p in case.group]
    factors = [[t.detach() for t in (p.A, p.B, p.U, p.V, p.b)] for p in case.group]
    adapters = [[commit(*f, scale=1.0, backend="triton")] * _CONCEPTS for f in factors]

    def fold() -> list[Tensor]:
        fold_(weights, [p.weight for p in case.group], adapters, backend="triton")
        return [weight.clone() for weight in weights]

    return fold


@contextmanager
def trial(device: torch.device, kernel: str, candidate: dict[str, int]) -> Iterator[None]:
    """Launch one kernel with other options inside the block."""
    table = config.table(config.device_name(device))
    before, table[kernel] = table[kernel], table[kernel] | candidate
    try:
        yield
    finally:
        table[kernel] = before


def _same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether they agree up to another order of summation and another matrix instruction."""

    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return torch.equal(a, b)
        eps = max(torch.finfo(a.dtype).eps, _PRODUCT_EPS)
        allowed = 8 * eps * b.double().abs().max().item()
        return bool((a.double() - b.double()).abs().max() <= allowed)

    return all(close(a, b) for a, b in zip(results, expected, strict=True))


def fastest(
    kernel: str,
    device: torch.device,
    candidates: Sequence[dict[str, int]],
    seconds: Callable[[Run], float],
    shapes: dict[str, int] = _SHAPES,
) -> dict[str, int]:
    """The options of the fastest valid candidate; the present ones where none is faster."""
    with cost.forced("generate" if kernel in _GENERATING else "compose"):
        run = _runs(kernel, device, shapes)
        expected = [result.clone() for result in run()]
        best = config.table(config.device_name(device))[kernel]
        least = seconds(run)
        for candidate in candidates:
            with trial(device, kernel, candidate):
                try:
                    if not _same(run(), expected):
                        continue
                    taken = seconds(run)
                except (triton.runtime.errors.OutOfResources, triton.CompilationError):
                    continue
            if taken < least:
                best, least = best | candidate, taken
    return best


def write(folder: Path, device: torch.device, options: config.Table) -> Path:
    """Write a device's file, in one step, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / config.file_name(config.device_name(device))
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(options, indent=1) + "\n")
    beside.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the device's file")
    folder = parser.parse_args().output
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        parser.exit(1, "no GPU is visible: nothing to measure\n")
    device = torch.device(accelerator.type, 0)

    def seconds(run: Run) -> float:
        return triton.testing.do_bench(run, return_mode="median") / 1e3

    found = {}
    for kernel, candidates in CANDIDATES.items():
        found[kernel] = fastest(kernel, device, candidates, seconds)
        print(kernel, found[kernel], flush=True)
    print(write(folder, device, found))


if __name__ == "__main__":
    main()
