# SPDX-License-Identifier: Apache-2.0
"""What this installation can do: versions, devices, backends and why one is missing."""

import platform
from importlib import metadata
from typing import Any

import torch

from stamina_kernels import dispatch

_PACKAGES = (
    "stamina-kernels",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return names


def _default_backend() -> tuple[str | None, str | None]:
    try:
        return dispatch.resolve(None, "cpu"), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def info() -> dict[str, Any]:
    """Versions, devices and backends, as plain JSON types.

    backends maps each name to {"available": bool, "reason": str or None}; default_backend is the
    one that CPU tensors use, or None with the reason in default_backend_error where what
    STAMINA_BACKEND or `use_backend` asks for cannot serve them.
    """
    default, error = _default_backend()
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "platform": platform.platform(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "backends": {
            name: {"available": reason is None, "reason": reason}
            for name, reason in dispatch.backends().items()
        },
        "default_backend": default,
        "default_backend_error": error,
    }
