# SPDX-License-Identifier: Apache-2.0
"""Backend `cuda` on the CPU: its library compiled by the host compiler against the emulation.

The kernels, the launches and the C interface are those of csrc/cuda; only the instructions of
`primitives.cuh` are replaced (`cuda/emulation.h`).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from stamina_kernels import backends, cuda, cuda_interface, dispatch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# unknown: unroll and friends; aliasing: shared memory is read as vectors, which nvcc allows
TOLERATED = ["-Wno-unknown-pragmas", "-fno-strict-aliasing"]
# a vector at an address that is none of its size stops the process, as it would stop a GPU
CHECKED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


@cache
def library(major: int = 9, enough_tasks: int = 512, reverse: int = 0) -> Any:
    """As a GPU of this compute capability runs it; groups of fewer tasks are cut into more; lanes,
    warps and blocks in ascending order, or the reverse."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = Path(mkdtemp(prefix="stamina-emulated-")) / "_cuda.so"
    subprocess.run(
        [compiler, "-x", "c++", *FLAGS, *TOLERATED, *CHECKED, "-fPIC", "-shared",
         f"-DEMULATED_MAJOR={major}", f"-DENOUGH_TASKS={enough_tasks}", f"-DREVERSED={reverse}",
         "-fvisibility=hidden",
         "-I", str(ROOT / "tests/kernels/cuda"), str(ROOT / "csrc/cuda/library.cu"),
         "-o", str(target)],
        check=True,
    )  # fmt: skip
    return cuda_interface.load(target)


@contextmanager
def emulated(*variant: int) -> Iterator[None]:
    """Backend `cuda` serves CPU tensors inside the block."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "_library", lambda: library(*variant))
    patch.setattr(cuda, "unavailable_reason", lambda: None)
    patch.setitem(dispatch._DEVICES, "cuda", ("cuda", "cpu"))
    dispatch._unavailable_reason.cache_clear()
    try:
        yield
    finally:
        patch.undo()
        dispatch._unavailable_reason.cache_clear()


@contextmanager
def cuda_on(where: str | tuple[int, ...]) -> Iterator[str]:
    """The device on which backend `cuda` runs: the GPU, or the CPU, emulating a variant of one."""
    if where == "gpu":
        reason = backends()["cuda"]
        if reason is not None:
            pytest.skip(f"backend 'cuda': {reason}")
        yield "cuda"
        return
    with emulated(*where):
        yield "cpu"
