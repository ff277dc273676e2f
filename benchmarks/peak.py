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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from stamina_adapters.evaluation.cost import saved_mib

from benchmarks.cases import MEMORY_BY_NAME, LinearCase, MemoryCase
from benchmarks.clock import synchronize
from benchmarks.measure import check
from benchmarks.problem import Problem, make_input, make_problem
from benchmarks.rivals import RIVALS, Contestant

_WARM_UP = MemoryCase("warm-up", (LinearCase(64, (32,), 8),))
_MIB = 2**20


def problems(case: MemoryCase, device: str) -> list[Problem]:
    """One for every group of the case; all share X."""
    x = make_input(case.groups[0], device)
    layer, made = 0, []
    for group in case.groups:
        made.append(make_problem(group, device, x=x, layer=layer))
        layer += len(group.outs)
    return made


def contestants(problems: Sequence[Problem], provider: str) -> list[Contestant]:
    return [RIVALS[provider].build(problem) for problem in problems]


def forward(groups: Sequence[Contestant]) -> list[torch.Tensor]:
    return [output for contestant in groups for output in contestant.run()]


def backward(
    groups: Sequence[Contestant], outputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    upstream = [gradient for contestant in groups for gradient in contestant.upstream]
    leaves = dict.fromkeys(leaf for contestant in groups for leaf in contestant.leaves)
    return torch.autograd.grad(outputs, list(leaves), upstream)


def step(groups: Sequence[Contestant]) -> None:
    """All forwards, then one backward: everything saved is alive at once."""
    backward(groups, forward(groups))


def saved(groups: Sequence[Contestant]) -> float:
    """MiB that autograd keeps after all forwards."""
    known = [tensor for contestant in groups for tensor in contestant.known]
    return saved_mib(lambda: forward(groups), known)


def error(groups: Sequence[Contestant]) -> float:
    """Of the first and the last group."""
    return max(check(groups[k])["step"] for k in {0, len(groups) - 1})


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cpu_growth(work: Callable[[], object]) -> float:
    """MiB by which the resident set grows at its highest."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
        baseline = _resident("VmRSS")
    except OSError:
        # an earlier peak hides growth below it: a lower bound, where the kernel offers no reset
        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline) / _MIB
    work()
    return (_resident("VmHWM") - baseline) / _MIB


def _device_growth(work: Callable[[], object], device: str) -> float:
    """MiB by which allocated device memory grows at its highest."""
    backend = torch.get_device_module(device)
    synchronize(device)
    backend.reset_peak_memory_stats()
    baseline = backend.memory_allocated()
    work()
    synchronize(device)
    return (backend.max_memory_allocated() - baseline) / _MIB


def growth(work: Callable[[], object], device: str) -> float:
    """MiB by which memory grows at its highest while work runs; on the CPU, that of the process."""
    return _cpu_growth(work) if device == "cpu" else _device_growth(work, device)


def measure(case: MemoryCase, provider: str, device: str) -> dict[str, float]:
    """peak_mib and saved_mib of the whole step, error of its first and last group."""
    # loads libraries, starts threads
    step(contestants(problems(_WARM_UP, device), provider))
    groups = contestants(problems(case, device), provider)
    return {
        "peak_mib": growth(lambda: step(groups), device) * case.share,
        "saved_mib": saved(groups) * case.share,
        "error": error(groups),
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
