# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the one place that decides.

Precedence: the `backend` argument, `use_backend`, the environment variable STAMINA_BACKEND, then
the default of the device: the first of `cpu` on CPUs, of `cuda` and `triton` on NVIDIA GPUs, of
`triton` on others that is available, or `reference`. A name that is unknown, or that cannot serve
the device, raises and says what can.
"""

import importlib
import logging
import os
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType

from stamina_kernels.override import Override

_log = logging.getLogger(__name__)

_MODULES = {
    "reference": "stamina_kernels.reference",
    "cpu": "stamina_kernels.cpu",
    "triton": "stamina_kernels.triton",
    "cuda": "stamina_kernels.cuda",
}
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "xpu"), "cuda": ("cuda",)}
DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
VARIABLE = "STAMINA_BACKEND"
_override = Override()


@cache
def load(name: str) -> ModuleType:
    """The backend's module, imported on first use."""
    return importlib.import_module(_MODULES[name])


@cache
def _unavailable_reason(name: str) -> str | None:
    reason: str | None = load(name).unavailable_reason()
    return reason


def backends() -> dict[str, str | None]:
    """Every backend's name with the reason why it cannot be used here, or None where it can."""
    return {name: _unavailable_reason(name) for name in _MODULES}


def _serves(name: str, device_type: str) -> bool:
    if name == "triton" and device_type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device_type in _DEVICES.get(name, (device_type,))


@cache
def _default(device_type: str) -> str:
    reasons = {}
    for name in DEFAULTS.get(device_type, ()):
        reason = _unavailable_reason(name)
        if reason is None:
            break
        reasons[name] = reason
    else:
        name = "reference"
    level = logging.WARNING if name == "reference" else logging.INFO
    for missing, reason in reasons.items():
        _log.log(level, "backend %r is not available, using %r: %s", missing, name, reason)
    return name


def _check_name(name: str, origin: str = "") -> None:
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {', '.join(_MODULES)}, got {name!r}{origin}")


def asked_for(backend: str | None) -> tuple[str | None, str]:
    """The backend that somebody wants, or None, and words that tell where it was named."""
    if backend is None:
        backend = _override.value
    if backend is None and (named := os.environ.get(VARIABLE)):
        return named, f" (from the environment variable {VARIABLE})"
    return backend, ""


def resolve(backend: str | None, device_type: str) -> str:
    """Name of the backend for tensors on `device_type`; compiled code keeps its first answer.

    Raises ValueError for an unknown name and RuntimeError for one that cannot run here, naming
    what can.
    """
    chosen, origin = asked_for(backend)
    name = _default(device_type) if chosen is None else chosen
    _check_name(name, origin)
    reason = _unavailable_reason(name)
    if reason is None and not _serves(name, device_type):
        reason = f"it does not run on device {device_type!r}"
    if reason is not None:
        usable = [n for n, why in backends().items() if why is None and _serves(n, device_type)]
        raise RuntimeError(
            f"backend {name!r}{origin} cannot be used: {reason}; "
            f"supported here: {', '.join(usable)}"
        )
    return name


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: compiled code
# takes the answer as it was when it was traced.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend for all calls in this process inside the block.

    Raises ValueError for an unknown name.
    """
    _check_name(name)
    return _override.set(name)
