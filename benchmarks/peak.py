# SPDX-License-Identifier: Apache-2.0
"""Memory of one training step, in a process of its own: `python -m benchmarks.peak CASE PROVIDER`.

Weights, W_init, factors, X and upstream gradients exist before the baseline is taken; what the
resident set grows by is what the step needs: outputs, gradients, saved tensors and scratch.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from stamina_adapters.evaluation.cost import saved_mib

from benchmarks.cases import MEMORY_BY_NAME, LinearCase, MemoryCase
from benchmarks.measure import check, synchronize
from benchmarks.problem import make_input, make_problem
from benchmarks.rivals import RIVALS, Contestant

_WARM_UP = MemoryCase("warm-up", (LinearCase(64, (32,), 8),))
_MIB = 2**20


def _contestants(case: MemoryCase, provider: str, device: str) -> list[Contestant]:
    x = make_input(case.groups[0], device)
    return [
        RIVALS[provider].build(make_problem(group, device, x=x, layer=2 * k))
        for k, group in enumerate(case.groups)
    ]


def _forward(contestants: Sequence[Contestant]) -> list[torch.Tensor]:
    return [output for contestant in contestants for output in contestant.run()]


def _step(contestants: Sequence[Contestant]) -> None:
    """All forwards, then one backward: everything saved is alive at once."""
    upstream = [gradient for contestant in contestants for gradient in contestant.upstream]
    leaves = dict.fromkeys(leaf for contestant in contestants for leaf in contestant.leaves)
    torch.autograd.grad(_forward(contestants), list(leaves), upstream)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cpu_growth(contestants: Sequence[Contestant]) -> float:
    """MiB by which the resident set grows at its highest."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
        baseline = _resident("VmRSS")
    except OSError:
        # an earlier peak hides growth below it: a lower bound, where the kernel offers no reset
        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _step(contestants)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline) / _MIB
    _step(contestants)
    return (_resident("VmHWM") - baseline) / _MIB


def _device_growth(contestants: Sequence[Contestant], device: str) -> float:
    """MiB by which allocated device memory grows at its highest."""
    backend = torch.get_device_module(device)
    synchronize(device)
    backend.reset_peak_memory_stats()
    baseline = backend.memory_allocated()
    _step(contestants)
    synchronize(device)
    return (backend.max_memory_allocated() - baseline) / _MIB


def measure(case: MemoryCase, provider: str, device: str) -> dict[str, float]:
    """peak_mib and saved_mib of the whole step, error of its first and last group."""
    _step(_contestants(_WARM_UP, provider, device))  # loads libraries, starts threads
    contestants = _contestants(case, provider, device)
    on_cpu = device == "cpu"
    peak = _cpu_growth(contestants) if on_cpu else _device_growth(contestants, device)
    known = [tensor for contestant in contestants for tensor in contestant.known]
    return {
        "peak_mib": peak * case.share,
        "saved_mib": saved_mib(lambda: _forward(contestants), known) * case.share,
        "error": max(check(contestants[k])["step"] for k in {0, len(contestants) - 1}),
    }


def measure_in_child(case: MemoryCase, provider: str, device: str) -> dict[str, float]:
    """`measure` in a fresh process, whose freed memory goes back to the system at once.

    Otherwise the step would reuse, unseen, what building its inputs had freed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # glibc; fixes a threshold that otherwise grows
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "benchmarks.peak", case.name, provider, device]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{case.name}, {provider}: {child.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(MEMORY_BY_NAME[sys.argv[1]], *sys.argv[2:4])))
