# SPDX-License-Identifier: Apache-2.0
"""`csrc/cuda/interface.h` in ctypes: structures, functions and statuses of `_cuda.so`."""

import ctypes
from pathlib import Path
from typing import Any

from stamina_kernels.libraries import check_interface

_INTERFACE_VERSION = 2  # of interface.h
_INVALID_ARGUMENT = 1


class Member(ctypes.Structure):
    """stamina_member of interface.h."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("weight", "weight_init", "A", "B", "U", "V", "b")
    ] + [
        (name, ctypes.c_int64)
        for name in ("out_features", "rank", "mask_rank", "dtype", "layer_id", "row0", "col0")
    ]


class Adapter(ctypes.Structure):
    """stamina_adapter of interface.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("A", "B", "bits")),
        ("rank", ctypes.c_int64),
        ("coefficient", ctypes.c_double),
    ]


class Layer(ctypes.Structure):
    """stamina_layer of interface.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "weight_init")] + [
        (name, ctypes.c_int64) for name in ("out_features", "in_features", "dtype", "adapters")
    ]


def load(path: Path) -> Any:
    """The library with its functions declared; raises OSError where it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    check_interface(getattr(library, "stamina_interface_version", None), _INTERFACE_VERSION)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    group = (pointer, integer, integer)
    signatures = {
        "sample": (*group, pointer, pointer, integer, pointer, pointer),
        "compose": (*group, pointer, pointer, integer, pointer, pointer),
        "scratch_bytes": group,
        "sample_compose": (
            *group, pointer, pointer, pointer, integer, integer, integer, *[pointer] * 6, integer,
            pointer,
        ),
        "backward_scratch_bytes": (*group, pointer, pointer, integer),
        "backward": (
            *group, pointer, pointer, integer, *[pointer] * 6, integer, integer, integer, pointer,
            pointer, pointer, integer, pointer,
        ),
        "fold_scratch_bytes": (integer, pointer, integer),
        "fold": (pointer, integer, pointer, integer, pointer, pointer, integer, pointer),
        "usable": (),
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(library, f"stamina_{name}")
        function.argtypes = arguments
        function.restype = integer if name.endswith("_bytes") else ctypes.c_int
    library.stamina_error.restype = ctypes.c_char_p
    return library


def check(library: Any, status: int) -> None:
    """Raise ValueError for a wrong argument, RuntimeError for a launch that failed."""
    if status == 0:
        return
    message = library.stamina_error().decode()
    if status == _INVALID_ARGUMENT:
        raise ValueError(f"cuda: {message}")
    raise RuntimeError(f"cuda: launch failed: {message}")
