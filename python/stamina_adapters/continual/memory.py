# SPDX-License-Identifier: Apache-2.0
"""By how much memory grows at its highest while something runs."""

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

_MIB = 2**20
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _give_back_freed() -> None:
    """Freed memory back to the system, so that using it again counts as growth (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """A context manager; `mib` is the peak over where it began.

    On the CPU of the resident set, with what was freed before given back to the system where the C
    library can; None where the system does not tell. On other devices of allocated memory. device:
    the GPU where there is one, else the CPU, unless told.
    """

    def __init__(self, device: str | None = None) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mib: float | None = None
        self._device = None if device == "cpu" else torch.get_device_module(device)
        self._start: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._device is not None:
            self._device.synchronize()
            self._device.reset_peak_memory_stats()
            self._start = self._device.memory_allocated()
            return self
        try:
            _give_back_freed()
            _REFERENCES.write_text("5")  # the peak becomes the present size
            self._start = _resident("VmRSS")
        except OSError:
            self._start = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start is None:
            return
        if self._device is not None:
            self._device.synchronize()
            peak = self._device.max_memory_allocated()
        else:
            peak = _resident("VmHWM")
        self.mib = max(0.0, (peak - self._start) / _MIB)
