# SPDX-License-Identifier: Apache-2.0
"""Instruction sets of the C++ backend that this machine can run, and how to force one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from stamina_kernels import backends

ALL = ("portable", "avx2", "avx512", "avx512_bf16")


def supported(name: str) -> bool:
    """Whether the C++ backend runs here on this instruction set."""
    if backends()["cpu"] is not None:
        return False
    library = torch.ops.stamina_cpu
    previous = library.instruction_set("")
    try:
        library.instruction_set(name)
    except RuntimeError:
        return False
    library.instruction_set(previous)
    return True


@contextmanager
def forced(name: str) -> Iterator[str]:
    """Everything in the block that runs on backend `cpu` uses this instruction set."""
    if not supported(name):
        pytest.skip(f"this machine lacks {name}, or the C++ library")
    library = torch.ops.stamina_cpu
    previous = library.instruction_set("")
    library.instruction_set(name)
    try:
        yield name
    finally:
        library.instruction_set(previous)
