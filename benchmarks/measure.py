# SPDX-License-Identifier: Apache-2.0
"""The accuracy check, interleaved rounds, and the rows that come of them."""

import gc
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.clock import BUSY, DEVICE, LAUNCHES
from benchmarks.problem import FACTORS
from benchmarks.rivals import Contestant

FEWEST_ROUNDS = 5
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True)
class Measurement:
    """One row of a result, before it knows its suite and machine. Times in ms; null: not measured.

    median_ms      as the caller waits for it, with p20 and p80
    device_ms      between events on the device, from a cold cache, with p20 and p80; none where the
                   host could not enqueue all of the call ahead of it
    busy_ms        sum over the kernels, launches their number, in one profiled call
    gb_s, tflop_s  of what the formula must move and multiply, while the kernels run
    error          relative RMS error against fp64, error_limit the most that passes the check
    """

    case: str
    provider: str
    pass_: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    device_ms: float | None = None
    device_p20_ms: float | None = None
    device_p80_ms: float | None = None
    busy_ms: float | None = None
    launches: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    saved_mib: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    error_limit: float | None = None


def error_limit(dtype: torch.dtype) -> float:
    """The largest relative RMS error that passes.

    A result is rounded to its dtype a few times: 4 eps. Its sums are taken in fp32 over up to 4096
    products, whose roundings add up as a random walk: sqrt(4096) eps of fp32.
    """
    return 4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|; the largest number where got is not finite, as JSON has no other."""
    difference = (got.double() - exact).norm() / exact.norm().clamp(min=1e-300)
    return float(difference) if torch.isfinite(difference) else sys.float_info.max


def _joined(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, each 0-dim one appended to the matrix before the last.

    b is the coefficient of a constant column of U: its gradient is judged with U's, for alone the
    error of this one sum over all weights would be the cancellation in it.
    """
    joined: list[Tensor] = []
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.dim() == 0:
            position = FACTORS.index("U") - FACTORS.index("b")
            joined[position] = torch.cat([joined[position].flatten(), gradient.reshape(1)])
        else:
            joined.append(gradient)
    return joined


def worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest relative RMS error of (result, exact result)."""
    return max(relative_rms(got, exact) for got, exact in pairs)


def check(contestant: Contestant) -> dict[str, float]:
    """Error of every pass against the same maths in fp64 with the same noise.

    forward: the worst output. backward: the worst gradient. step: the worse of the two.
    """
    contestant.restart()
    outputs = contestant.run()
    gradients = contestant.backward(outputs)
    leaves = [leaf.detach().double().requires_grad_() for leaf in contestant.leaves]
    exact = contestant.formula(leaves)
    upstream = [gradient.double() for gradient in contestant.upstream]
    exact_gradients = torch.autograd.grad(exact, leaves, upstream)
    forward = worst((y.detach(), e.detach()) for y, e in zip(outputs, exact, strict=True))
    joined = (_joined(leaves, found) for found in (gradients, exact_gradients))
    backward = worst(zip(*joined, strict=True))
    return {"forward": forward, "backward": backward, "step": max(forward, backward)}


Key = tuple[str, str]
"""Case and provider."""

Timings = dict[Key, dict[str, list[float]]]


def interleave(
    samples: Mapping[Key, Callable[[], dict[str, float]]], rounds: int, warm_up: int = 1
) -> Timings:
    """Milliseconds per pass of every entry, one of each a round, in a new order every round.

    Whatever else the machine does then falls on all alike, and none always runs in the cache that
    the same other one left behind. An entry that has had its time rests after a few rounds: without
    16-bit instructions a plain product can take seconds.
    """
    timings: Timings = {key: {} for key in samples}
    spent = dict.fromkeys(samples, 0.0)
    order, shuffle = list(samples), random.Random(0)
    gc.collect()
    for number in range(warm_up + rounds):
        shuffle.shuffle(order)
        for key in order:
            if number >= warm_up + FEWEST_ROUNDS and spent[key] > ENOUGH_SECONDS:
                continue
            start = time.perf_counter()
            measured = samples[key]()
            if number < warm_up:
                continue
            spent[key] += time.perf_counter() - start
            for name, milliseconds in measured.items():
                timings[key].setdefault(name, []).append(milliseconds)
    return timings


def _quantiles(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    p20, median, p80 = np.percentile(np.asarray(milliseconds), [20, 50, 80]).tolist()
    return p20, median, p80


def timed(
    case: str,
    provider: str,
    pass_: str,
    times: Mapping[str, Sequence[float]],
    work: Work | None = None,
) -> Measurement:
    """A measurement of the times of one pass: medians, and the spread as 20 and 80 per cent.

    times holds the pass's wall times under its name and what else was sampled under the prefixes
    of `clock`; fewer than half as many samples between events are no median. The rates are of the
    kernels' time, or of the time between events where no kernel was seen.
    """
    p20, median, p80 = _quantiles(times[pass_])
    found = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
    samples = times.get(DEVICE + pass_) or []
    if 2 * len(samples) >= len(times[pass_]):
        names = ("device_p20_ms", "device_ms", "device_p80_ms")
        found |= dict(zip(names, _quantiles(samples), strict=True))
    if times.get(BUSY + pass_):
        found |= {"busy_ms": _quantiles(times[BUSY + pass_])[1]}
        found |= {"launches": _quantiles(times[LAUNCHES + pass_])[1]}
    running = found.get("busy_ms") or found.get("device_ms")
    if work and running:
        found |= {"gb_s": work.bytes / running / 1e6, "tflop_s": work.flops / running / 1e9}
    return Measurement(case, provider, pass_, **found)
