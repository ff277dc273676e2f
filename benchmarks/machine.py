# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: machine, its measured peaks, versions."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import synchronize
from stamina_kernels import cpu

_PACKAGES = ("torch", "stamina-kernels", "peft", "lycoris-lora", "diffusers", "numpy")
GEMM_SIZE = 2048
COPY_BYTES = 2**28  # well beyond any cache
_REPEATS = 5


def versions() -> dict[str, str | None]:
    """Python and the packages that are compared; null where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return None


def _best_seconds(work: Callable[[], object], device: str) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _gemm_gflops(device: str) -> float:
    a, b, out = (torch.ones(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(3))
    seconds = _best_seconds(lambda: torch.mm(a, b, out=out), device)
    return 2 * GEMM_SIZE**3 / seconds / 1e9


def _copy_gb_s(device: str) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source), device) / 1e9


def machine(device: str) -> dict[str, Any]:
    """Processor, memory and instruction sets, with the fp32 GEMM rate and the copy bandwidth.

    The two peaks are the best of a few runs, bytes read and written both counted.
    """
    return {
        "cpu": _cpu_model(),
        "device": "cpu" if device == "cpu" else torch.get_device_module(device).get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd_kernels": None if cpu.unavailable_reason() else cpu.instruction_set(),
        "simd_torch": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "gemm_gflops": _gemm_gflops(device),
        "copy_gb_s": _copy_gb_s(device),
    }


def label(found: dict[str, Any]) -> str:
    """One line that tells machines apart."""
    name = found["cpu"] if found["device"] == "cpu" else found["device"]
    return f"{name}, {found['threads']} threads, {found['simd_kernels']}"
