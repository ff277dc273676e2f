# SPDX-License-Identifier: Apache-2.0
"""Memory of one training step, in a process of its own: `python -m benchmarks.peak CASE PROVIDER`.

Weights, W_init, factors, X and upstream gradients exist before the baseline is taken; what the
resident set grows by is what the step needs: outputs, gradients, saved tensors and scratch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from stamina_adapters.continual.memory import PeakMemory
from stamina_adapters.evaluation.cost import saved_mib

from benchmarks.cases import MEMORY_BY_NAME, LinearCase, MemoryCase
from benchmarks.measure import check
from benchmarks.problem import Problem, make_input, make_problem
from benchmarks.rivals import RIVALS, Contestant

_WARM_UP = MemoryCase("warm-up", (LinearCase(64, (32,), 8),))


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


def growth(work: Callable[[], object], device: str) -> float | None:
    """MiB by which memory grows at its highest while work runs; on the CPU, that of the process.

    None where the system does not tell.
    """
    with PeakMemory(device) as peak:
        work()
    return peak.mib


def measure(case: MemoryCase, provider: str, device: str) -> dict[str, float | None]:
    """peak_mib and saved_mib of the whole step, error of its first and last group."""
    # loads libraries, starts threads
    step(contestants(problems(_WARM_UP, device), provider))
    groups = contestants(problems(case, device), provider)
    grown = growth(lambda: step(groups), device)
    return {
        "peak_mib": None if grown is None else grown * case.share,
        "saved_mib": saved(groups) * case.share,
        "error": error(groups),
    }


def measure_in_child(case: MemoryCase, provider: str, device: str) -> dict[str, float | None]:
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
    found: dict[str, float | None] = json.loads(child.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(MEMORY_BY_NAME[sys.argv[1]], *sys.argv[2:4])))
