# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: machine, its measured peaks, versions."""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.clock import Call, DeviceClock
from stamina_kernels import cpu

_PACKAGES = ("torch", "triton", "stamina-kernels", "peft", "lycoris-lora", "diffusers", "numpy")
GEMM_SIZE = 2048
COPY_BYTES = 2**28  # well beyond any cache
GEMM_SIZE_GPU = 8192
COPY_BYTES_GPU = 2**30
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
    """Of a few runs; the warm cache and the clock's lead cost a peak nothing."""
    clock, call = DeviceClock(device), Call({"work": lambda _: work()})
    work()
    return min(clock(call, lead_ms=1.0)["work"] for _ in range(_REPEATS)) / 1e3


def _gemm_gflops(device: str, dtype: torch.dtype) -> float:
    size = GEMM_SIZE if device == "cpu" else GEMM_SIZE_GPU
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device) / 1e9


def _copy_gb_s(device: str) -> float:
    size = COPY_BYTES if device == "cpu" else COPY_BYTES_GPU
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device) / 1e9


def _gpu(device: str) -> dict[str, Any]:
    """What tells GPUs of one name apart; read only."""
    properties = torch.get_device_module(device).get_device_properties()
    found = {
        name: getattr(properties, name, None)
        for name in ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
    }
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"]
    try:
        smi = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = ""
    return found | {"cuda": torch.version.cuda, "driver_clocks_power": smi or None}


def machine(device: str) -> dict[str, Any]:
    """Processor, memory and instruction sets, with the GEMM rates and the copy bandwidth.

    The peaks are the best of a few runs on random numbers, bytes read and written both counted;
    gemm_gflops is that of fp32. The CPU's 16-bit rates are left out: without instructions for them
    one product takes half a minute.
    """
    dtypes = ("fp32",) if device == "cpu" else tuple(DTYPES)
    rates = {dtype: _gemm_gflops(device, DTYPES[dtype]) for dtype in dtypes}
    return {
        "cpu": _cpu_model(),
        "device": "cpu" if device == "cpu" else torch.get_device_module(device).get_device_name(),
        "gpu": None if device == "cpu" else _gpu(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd_kernels": None if cpu.unavailable_reason() else cpu.instruction_set(),
        "simd_torch": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "gemm_gflops": rates["fp32"],
        "gemm_tflops_by_dtype": {dtype: rate / 1e3 for dtype, rate in rates.items()},
        "copy_gb_s": _copy_gb_s(device),
    }


def threads(found: dict[str, Any]) -> str:
    """As in "1 thread" or "8 threads"."""
    count = found["threads"]
    return f"{count} thread{'' if count == 1 else 's'}"


def label(found: dict[str, Any]) -> str:
    """One line that tells machines apart."""
    name = found["cpu"] if found["device"] == "cpu" else found["device"]
    return f"{name}, {threads(found)}, {found['simd_kernels']}"
