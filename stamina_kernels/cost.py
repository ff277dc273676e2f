# SPDX-License-Identifier: Apache-2.0
"""Which strategy computes Y = X W_eff^T on a GPU, and why: a roofline of both.

compose   one launch draws the bits and writes W_eff; the vendor's GEMM reads it
generate  one launch draws the bits; our GEMM makes every tile of W_eff in its main loop

A launch takes launch_us plus the largest of

    bytes / bandwidth        instructions / issue rate        flops / matrix rate

With O x I weights, N tokens, p = ceil(r / 16) 16 and T = ceil(N / n) tiles of n = 128 tokens whose
P takes k = 3 products of bf16 halves (fp32: n = 32, k = 1):

    draw      bytes  bits (+ W and W_init for the forgetting term)       + O I w_instructions
    compose   bytes  W (+ W_init) + W_eff + bits                          + O I c_instructions
    GEMM      bytes  W_eff + X + Y                       flops  2 N O I
    generate  bytes  W + bits + X + Y                    flops  T (2 n + 2 k p) O I
                                                         instructions  T O I g_instructions

W_eff costs no bandwidth where it stays in half of the L2 cache. The generating GEMM has as many
programs as tiles of Y: its instructions and flops take longer by how far that is from filling the
multiprocessors. A dtype of 4 bytes multiplies on the ordinary units: two flops an instruction.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from stamina_kernels.override import Override

_log = logging.getLogger(__name__)
STRATEGIES = ("compose", "generate")
VARIABLE = "STAMINA_STRATEGY"
_forced = Override()
_DEVICES = Path(__file__).with_name("devices.json")
_MAX_PIPELINED_RANK = 32

# Instructions a thread issues per weight at rank 16. Drawing, composing and W_init: counted in the
# code of the Triton kernels for sm_90. Generating: what an H200's 1.41 ms for a forward of 4096^3
# come to, stalls included. A hard draw is an estimate: the draw without its ten Philox rounds.
_MASK_RANK = 16
_LOGITS_PER_RANK = 1.3
_DRAW, _DRAW_HARD = 72.0, 40.0
_COMPOSE, _INITIAL, _GENERATE = 45.0, 64.0, 84.0


class _Tile(NamedTuple):
    """A tile of the generating GEMM, and how often it multiplies for P."""

    tokens: int
    rows: int
    products: int


_HALF_TILE, _FP32_TILE = _Tile(128, 64, 3), _Tile(32, 32, 1)


class Device(NamedTuple):
    """A GPU's peaks from its maker's data sheet; launch_s is an assumption, the same for all."""

    name: str
    multiprocessors: int
    clock_hz: float
    bandwidth: float  # bytes / s
    matrix_flops: float  # dense, 16-bit operands, fp32 accumulation
    l2_bytes: float
    launch_s: float  # from one kernel to the next on a stream

    @property
    def issue_rate(self) -> float:
        """Instructions of single threads per second: 4 schedulers of 32 lanes."""
        return self.multiprocessors * 128 * self.clock_hz


class Problem(NamedTuple):
    """A group of projections that share X, stacked to O rows."""

    out_features: int
    in_features: int
    tokens: int
    rank: int
    mask_rank: int
    weight_bytes: int = 2
    x_bytes: int = 2
    sampled: bool = True
    has_initial: bool = True


class Launch(NamedTuple):
    """One kernel's needs, and the seconds that each would take alone."""

    what: str
    bytes: float
    instructions: float
    flops: float
    memory_s: float
    issue_s: float
    matrix_s: float
    launch_s: float

    @property
    def seconds(self) -> float:
        return self.launch_s + max(self.memory_s, self.issue_s, self.matrix_s)

    @property
    def bound(self) -> str:
        """What it waits for the longest."""
        waits = {
            "memory": self.memory_s,
            "issue": self.issue_s,
            "matrix": self.matrix_s,
            "launch": self.launch_s,
        }
        return max(waits, key=lambda name: waits[name])


class Choice(NamedTuple):
    """The chosen strategy, why in a sentence, and the launches of both."""

    strategy: str
    reason: str
    launches: dict[str, list[Launch]]


def total_seconds(launches: Sequence[Launch]) -> float:
    return sum(launch.seconds for launch in launches)


@cache
def devices() -> dict[str, Device]:
    """The known GPUs by the part of the name that identifies them."""
    known = json.loads(_DEVICES.read_text())
    return {name: Device(name, **figures) for name, figures in known.items()}


def find_device(name: str) -> Device:
    """The known GPU whose name is part of `name`; any other is taken for an A100."""
    found = next((device for key, device in devices().items() if key in name), None)
    return found or devices()["A100"]


def _launch(
    device: Device,
    what: str,
    bytes_: float,
    instructions: float = 0.0,
    flops: float = 0.0,
    x_bytes: int = 2,
    idle: float = 1.0,
) -> Launch:
    """idle >= 1: what the multiprocessors' time is stretched by because some have nothing to do."""
    if x_bytes > 2:  # fused multiply-adds on the ordinary units
        instructions, flops = instructions + flops / 2, 0.0
    return Launch(
        what, bytes_, instructions, flops,
        bytes_ / device.bandwidth,
        instructions / device.issue_rate * idle,
        flops / device.matrix_flops * idle,
        device.launch_s,
    )  # fmt: skip


def estimate(device: Device, problem: Problem) -> dict[str, list[Launch]]:
    """The launches of both strategies."""
    p, weights = problem, problem.out_features * problem.in_features
    bits = weights / 8
    initial = weights * p.weight_bytes if p.has_initial else 0
    per_weight = (_DRAW if p.sampled else _DRAW_HARD) + _LOGITS_PER_RANK * (
        p.mask_rank - _MASK_RANK
    )
    product = _INITIAL + _COMPOSE if p.has_initial else _COMPOSE
    effective = weights * p.x_bytes
    in_cache = effective <= device.l2_bytes / 2
    activations = p.tokens * (p.in_features + p.out_features) * p.x_bytes
    tile = _FP32_TILE if p.x_bytes > 2 else _HALF_TILE
    token_tiles = -(-p.tokens // tile.tokens)
    padded_rank = -(-p.rank // 16) * 16
    tiles = -(-p.out_features // tile.rows) * token_tiles
    rounds = -(-tiles // device.multiprocessors)
    return {
        "compose": [
            _launch(
                device, "draw, write W_eff",
                weights * p.weight_bytes + initial + bits + (0 if in_cache else effective),
                weights * (per_weight + product),
            ),
            _launch(
                device, "vendor GEMM",
                activations + (0 if in_cache else effective),
                flops=2.0 * p.tokens * weights, x_bytes=p.x_bytes,
            ),
        ],
        "generate": [
            _launch(
                device, "draw",
                bits + 2 * initial,
                weights * (per_weight + (product if p.has_initial else 0)),
            ),
            _launch(
                device, "GEMM, makes W_eff",
                weights * p.weight_bytes + bits + activations,
                token_tiles * weights * _GENERATE,
                token_tiles * weights * 2.0 * (tile.tokens + tile.products * padded_rank),
                p.x_bytes,
                idle=max(1.0, rounds * device.multiprocessors / max(tiles, 1)),
            ),
        ],
    }  # fmt: skip


def choose(device_name: str, problem: Problem) -> Choice:
    """What `forced` or the variable STAMINA_STRATEGY says, else the faster by `estimate`.

    Logged once for every problem. Raises ValueError where the variable names no strategy.
    """
    return _choose(device_name, problem, _forced.value, os.environ.get(VARIABLE) or None)


@cache
def _choose(device_name: str, problem: Problem, forced: str | None, variable: str | None) -> Choice:
    launches = estimate(find_device(device_name), problem)
    choice = Choice(*_pick(launches, problem, forced, variable), launches)
    _log.info(
        "strategy %r for %d x %d and %d tokens on %s: %s",
        choice.strategy, problem.out_features, problem.in_features, problem.tokens, device_name,
        choice.reason,
    )  # fmt: skip
    return choice


def _pick(
    launches: dict[str, list[Launch]], problem: Problem, forced: str | None, variable: str | None
) -> tuple[str, str]:
    if forced is not None:
        return forced, "the caller says so"
    if variable is not None:
        if variable not in STRATEGIES:
            raise ValueError(f"{VARIABLE} must be {' or '.join(STRATEGIES)}, got {variable!r}")
        return variable, f"{VARIABLE} says so"
    if problem.rank > _MAX_PIPELINED_RANK:
        return "compose", (
            f"the loop that makes W_eff is not pipelined above rank {_MAX_PIPELINED_RANK}"
        )
    seconds = {name: total_seconds(launches[name]) for name in STRATEGIES}
    best, other = sorted(STRATEGIES, key=lambda name: seconds[name])
    slowest = max(launches[other], key=lambda launch: launch.seconds)
    return best, (
        f"{seconds[best] * 1e6:.1f} us against {seconds[other] * 1e6:.1f} us, where "
        f"'{slowest.what}' waits for {slowest.bound}"
    )


def forced(name: str) -> AbstractContextManager[None]:
    """Use one strategy for all calls in this process inside the block."""
    return _forced.set(name)
