# SPDX-License-Identifier: Apache-2.0
"""The accuracy check and the clock."""

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.problem import FACTORS
from benchmarks.rivals import Contestant

PASSES = ("forward", "backward", "step")
FEWEST_ROUNDS = 5
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True)
class Measurement:
    """One row of a result, before it knows its suite and machine. Times in ms; null: not measured.

    error is the relative RMS error against fp64, error_limit the most that passes the check.
    """

    case: str
    provider: str
    pass_: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    saved_mib: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    error_limit: float | None = None


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; the CPU has."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


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


def _worst(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(relative_rms(a, b) for a, b in zip(got, exact, strict=True))


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
    forward = _worst([y.detach() for y in outputs], [y.detach() for y in exact])
    backward = _worst(_joined(leaves, gradients), _joined(leaves, exact_gradients))
    return {"forward": forward, "backward": backward, "step": max(forward, backward)}


def time_passes(contestant: Contestant, device: str) -> dict[str, float]:
    """Milliseconds of one forward and one backward; a step is both."""
    synchronize(device)
    start = time.perf_counter()
    outputs = contestant.run()
    synchronize(device)
    middle = time.perf_counter()
    contestant.backward(outputs)
    synchronize(device)
    end = time.perf_counter()
    return {
        "forward": 1e3 * (middle - start),
        "backward": 1e3 * (end - middle),
        "step": 1e3 * (end - start),
    }


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


def timed(case: str, provider: str, pass_: str, milliseconds: Sequence[float]) -> Measurement:
    """A measurement of the times alone: their median, and the spread as 20 and 80 per cent."""
    p20, median, p80 = np.percentile(np.asarray(milliseconds), [20, 50, 80]).tolist()
    return Measurement(case, provider, pass_, median_ms=median, p20_ms=p20, p80_ms=p80)
