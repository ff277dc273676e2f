# SPDX-License-Identifier: Apache-2.0
"""torch.compile, and why it may not work here."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """The function specialised to its shapes, in one graph or not at all."""
    specialised: _Function = torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return specialised


@cache
def compiler_missing(device: str) -> str | None:
    """None, or why torch.compile cannot run for the device: it needs a C++ compiler, or Triton."""
    try:
        compiled(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's absence has no type of its own
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def forget_compiled() -> None:
    """Drop what was compiled: dynamo allows a function eight variants, then it refuses."""
    torch._dynamo.reset()
