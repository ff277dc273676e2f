# SPDX-License-Identifier: Apache-2.0
"""What is measured. A case is known by its name, in result files and on the command line."""

from dataclasses import dataclass, replace

import torch

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

    @property
    def name(self) -> str:
        shape = f"{self.inner}->{'+'.join(map(str, self.outs))} x{self.tokens}"
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


def as_dtype(case: LinearCase, dtype: str) -> LinearCase:
    """The same case with weights and X in another dtype."""
    return replace(case, dtype=dtype)


BY_NAME = {
    case.name: case
    for base in (*LINEAR, *GROUP, *RANKS, *SHAPES)
    for case in (as_dtype(base, dtype) for dtype in DTYPES)
}
MEMORY_BY_NAME = {case.name: case for case in (*MEMORY, SDXL, SDXL_TENTH)}
