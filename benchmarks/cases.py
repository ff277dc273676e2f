# SPDX-License-Identifier: Apache-2.0
"""What is measured. A case is known by its name, in result files and on the command line."""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch


class Work(NamedTuple):
    """What a formula must at least do: floating-point operations and bytes moved."""

    flops: float
    bytes: float


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK = 16


@dataclass(frozen=True)
class LinearCase:
    """X [tokens, inner] through projections inner -> outs[k] that share it, of rank r = m."""

    inner: int
    outs: tuple[int, ...]
    tokens: int
    rank: int = RANK
    dtype: str = "fp32"
    model: str = ""
    label: str = ""  # in place of the shape, where that would be long

    @property
    def name(self) -> str:
        shape = self.label or f"{self.inner}->{'+'.join(map(str, self.outs))} x{self.tokens}"
        rank = f"r{self.rank}" if self.rank != RANK else ""
        dtype = self.dtype if self.dtype != "fp32" else ""
        return " ".join(part for part in (self.model, shape, rank, dtype) if part)

    @property
    def weights(self) -> int:
        """Adapted weights."""
        return self.inner * sum(self.outs)

    def step_flops(self) -> float:
        """Products of a masked training step, 2 per multiply-add; element-wise work is left out.

        Y, dX and G = dY^T X take 2 M O I each; P = A B, L = U V, dA, dB, dU and dV take 2 O I r
        each, r = m. What an implementation computes twice counts once.
        """
        return self.weights * (6.0 * self.tokens + 12.0 * self.rank)

    def step_bytes(self) -> float:
        """Least traffic of a masked training step: what must be read or written, once a direction.

        W and W_init twice, bits written and read; X twice, dX, Y and dY.
        """
        size = DTYPES[self.dtype].itemsize
        activations = self.tokens * (3 * self.inner + 2 * sum(self.outs))
        return self.weights * (4 * size + 2 / 8) + activations * size

    def forward_work(self) -> Work:
        """The forward's share: Y, P and L; W, W_init, X read, Y and bits written."""
        size = DTYPES[self.dtype].itemsize
        activations = self.tokens * (self.inner + sum(self.outs))
        return Work(
            flops=self.weights * (2.0 * self.tokens + 4.0 * self.rank),
            bytes=self.weights * (2 * size + 1 / 8) + activations * size,
        )

    def work(self) -> dict[str, Work]:
        """What a masked implementation must do, pass by pass."""
        step, forward = Work(self.step_flops(), self.step_bytes()), self.forward_work()
        backward = Work(step.flops - forward.flops, step.bytes - forward.bytes)
        return {"forward": forward, "backward": backward, "step": step}


@dataclass(frozen=True)
class FoldCase:
    """`adapters` concepts of rank 16 into every layer (inner, out)."""

    label: str
    layers: tuple[tuple[int, int], ...]
    adapters: int
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        dtype = self.dtype if self.dtype != "fp32" else ""
        return f"{self.label} x{self.adapters} {dtype}".strip()

    def work(self) -> Work:
        """A B of every concept; W_init and bits read, W written. Factors are small beside them."""
        weights = sum(inner * out for inner, out in self.layers)
        size = DTYPES[self.dtype].itemsize
        return Work(
            flops=2.0 * RANK * weights * self.adapters,
            bytes=weights * (2 * size + self.adapters / 8),
        )


@dataclass(frozen=True)
class MemoryCase:
    """One training step of all groups at once; `share` groups stand for share * len(groups)."""

    label: str
    groups: tuple[LinearCase, ...]
    share: int = 1

    @property
    def name(self) -> str:
        layers = sum(len(group.outs) for group in self.groups)
        return self.label if self.share == 1 else f"{self.label} ({layers} layers x {self.share})"


_CROSS_ATTENTION = (
    (768, 320), (768, 640), (768, 1280), (2048, 640), (2048, 1280), (1280, 1280),
)  # fmt: skip
_PROMPTS = (154, 308)  # two and four prompts of 77 tokens

LINEAR = tuple(
    LinearCase(inner, (out,), tokens) for tokens in _PROMPTS for inner, out in _CROSS_ATTENTION
)
GROUP = tuple(LinearCase(inner, (out, out), 154) for inner, out in _CROSS_ATTENTION)
RANKS = tuple(LinearCase(768, (1280,), 154, rank=rank) for rank in (4, 8, 16, 32, 64, 128))
SHAPES = (
    LinearCase(768, (320,), 154, model="SD1.5"),
    LinearCase(768, (1280,), 154, model="SD1.5"),
    LinearCase(2048, (640,), 154, model="SDXL"),
    LinearCase(2048, (1280,), 154, model="SDXL"),
    LinearCase(1536, (1536,), 333, model="SD3"),
    LinearCase(4096, (1536,), 333, model="SD3"),
    LinearCase(3072, (3072,), 512, model="Flux"),
    LinearCase(4096, (3072,), 512, model="Flux"),
)
CONCEPTS_UNIT = "concepts"
CONCEPTS = (1, 10, 100, 1000)
STACKED = (1, 10, 50)
CONCEPT_LAYER = LinearCase(768, (640,), 154)

_SD15_LAYERS = tuple(
    (768, out) for out, count in ((320, 10), (640, 10), (1280, 12)) for _ in range(count)
)
FOLD = FoldCase("SD1.5 K/V", _SD15_LAYERS, 50)
FOLD_QUICK = FoldCase("three K/V layers", _SD15_LAYERS[::11], 3)

_SDXL_BLOCKS = tuple(
    LinearCase(2048, (out, out), 154)
    for out, count in ((640, 10), (1280, 60))
    for _ in range(count)
)
SDXL = MemoryCase("sdxl-140", _SDXL_BLOCKS)
SDXL_TENTH = MemoryCase("sdxl-140", _SDXL_BLOCKS[::10], share=10)
MEMORY = tuple(MemoryCase(case.name, (case,)) for case in LINEAR if case.tokens == 154)


Typed = TypeVar("Typed", LinearCase, FoldCase)


def as_dtype(case: Typed, dtype: str) -> Typed:
    """The same case with weights and X in another dtype."""
    return replace(case, dtype=dtype)


def model_wide(case: MemoryCase, dtype: str) -> MemoryCase:
    """The same groups in another dtype."""
    label = case.label if dtype == "fp32" else f"{case.label} {dtype}"
    return replace(case, label=label, groups=tuple(as_dtype(group, dtype) for group in case.groups))


# Cases of the gpu suites, in the dtype that the device trains in; of a pass the first stands for
# what the machine can do.
_SDXL_LAYERS = tuple((group.inner, out) for group in _SDXL_BLOCKS for out in group.outs)
GPU_KV = tuple(
    LinearCase(inner, (out, out), tokens, model="SD1.5" if inner == 768 else "SDXL")
    for tokens in _PROMPTS
    for inner, out in _CROSS_ATTENTION[:-1]
)
GPU_KV_COMPILED = (GPU_KV[1], GPU_KV[4])  # compiling takes longer than all else together
SDXL_AT_ONCE = LinearCase(
    2048, tuple(out for _, out in _SDXL_LAYERS), 154, label="SDXL K/V, 140 at once"
)
GPU_COMPOSE = (SDXL_AT_ONCE, LinearCase(2048, (1280, 1280), 154, model="SDXL"))
GPU_GEMM = LinearCase(4096, (4096,), 4096)
GPU_FOLDS = (
    FoldCase("SDXL K/V", _SDXL_LAYERS, 1),
    FOLD,
    FoldCase("SDXL K/V", _SDXL_LAYERS, 50),
)
# for a trial: the same code in a second, the interpreter of Triton included
GPU_SMALL = LinearCase(64, (32, 48), 8, rank=4)
GPU_SMALL_FOLD = FoldCase("two layers", ((64, 32), (96, 40)), 3)
GPU_SMALL_MODEL = MemoryCase(
    "four layers", (LinearCase(64, (32, 32), 8), LinearCase(64, (48, 48), 8))
)


BY_NAME = {
    case.name: case
    for base in (*LINEAR, *GROUP, *RANKS, *SHAPES)
    for case in (as_dtype(base, dtype) for dtype in DTYPES)
}
MEMORY_BY_NAME = {case.name: case for case in (*MEMORY, SDXL, SDXL_TENTH)}
