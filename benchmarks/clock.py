# SPDX-License-Identifier: Apache-2.0
"""How long a call takes: on the host's clock, by events on the device, and kernel by kernel."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

WHOLE = "step"
DEVICE, BUSY, LAUNCHES = "device.", "busy.", "launches."
"""Prefixes of what is no wall time where samples of several kinds share a dictionary."""


@dataclass(frozen=True)
class Call:
    """What is timed: parts that follow each other, by the name of their pass. Where there are
    several, all of them together are the pass WHOLE.

    parts    each is given what the one before returned, the first None
    prepare  undoes what an earlier call changed; not timed
    """

    parts: Mapping[str, Callable[[Any], Any]]
    prepare: Callable[[], None] = lambda: None


def alone(function: Callable[[], Any]) -> Callable[[Any], Any]:
    """A part that takes nothing from the part before."""
    return lambda _: function()


_FLUSH_BYTES = 2**28  # on top of the cache's size: a few large writes last longer than many small
_LONGEST_LEAD_MS = 50.0  # the device holds no more launches in waiting than the host makes in that


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; the CPU has."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _by_pass(names: Sequence[str], marks: Sequence[float]) -> dict[str, float]:
    """Differences of consecutive marks, and of the last and the first for the whole."""
    found = {name: marks[k + 1] - marks[k] for k, name in enumerate(names)}
    return found if len(names) == 1 else found | {WHOLE: marks[-1] - marks[0]}


def wall(call: Call, device: str) -> dict[str, float]:
    """Milliseconds of every part as the caller waits for it."""
    value: Any = None
    call.prepare()
    synchronize(device)
    marks = [1e3 * time.perf_counter()]
    for part in call.parts.values():
        value = part(value)
        synchronize(device)
        marks.append(1e3 * time.perf_counter())
    return _by_pass(list(call.parts), marks)


class _Event(Protocol):
    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class _HostEvent:
    """An event of the CPU, which has done its work when the host goes on."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return False  # never ahead of the host

    def elapsed_time(self, end_event: "_HostEvent") -> float:
        return 1e3 * (end_event._at - self._at)


def _event(device: str) -> _Event:
    if device == "cpu":
        return _HostEvent()
    event: _Event = torch.get_device_module(device).Event(enable_timing=True)
    return event


def _cache_bytes(device: str) -> int:
    properties = None if device == "cpu" else torch.get_device_module(device).get_device_properties
    return getattr(properties(), "L2_cache_size", 0) if properties else 0


class DeviceClock:
    """Milliseconds of every part between events on the device, from a cold L2 cache.

    The cache is overwritten before each call, and again until that lasts longer than the host may
    take to enqueue the call. Where the device begins before all is enqueued, because that takes
    longer still or because the call itself waits for the device, the events would time the host:
    then there is no time.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        size = 2**16 if device == "cpu" else _FLUSH_BYTES + 2 * _cache_bytes(device)
        self._cover = torch.empty(size, dtype=torch.uint8, device=device)
        self._cover.zero_()
        start, end = _event(device), _event(device)
        start.record()
        self._cover.zero_()
        end.record()
        synchronize(device)
        self._flush_ms = max(start.elapsed_time(end), 1e-3)

    def flush(self, lead_ms: float = 0.0) -> None:
        """Overwrite the cache for at least lead_ms; the CPU would only lose the time."""
        wanted = (
            1
            if self._device == "cpu"
            else 1 + math.ceil(min(lead_ms, _LONGEST_LEAD_MS) / self._flush_ms)
        )
        for _ in range(wanted):
            self._cover.zero_()

    def __call__(self, call: Call, lead_ms: float) -> dict[str, float]:
        events = [_event(self._device) for _ in range(len(call.parts) + 1)]
        value: Any = None
        call.prepare()
        synchronize(self._device)
        self.flush(lead_ms)
        events[0].record()
        for part, event in zip(call.parts.values(), events[1:], strict=True):
            value = part(value)
            event.record()
        begun = events[0].query()
        synchronize(self._device)
        if begun:
            return {}
        return _by_pass(list(call.parts), [events[0].elapsed_time(event) for event in events])


def wall_and_device(call: Call, clock: DeviceClock, device: str) -> dict[str, float]:
    """Both, the device's, where it has one, under keys that begin with DEVICE."""
    times = wall(call, device)
    by_events = clock(call, lead_ms=max(times.values()))
    return times | {DEVICE + name: value for name, value in by_events.items()}


def _device_work(events: Sequence[Any]) -> list[Any]:
    """The profiler's events that are kernels, copies or fills on a device."""
    return [
        event
        for event in events
        if event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False)
    ]


def profiled(call: Call, clock: DeviceClock, device: str) -> dict[str, float]:
    """Per part LAUNCHES, what the device was given, and BUSY, milliseconds that it worked.

    The time is the sum over kernels, whatever lies between them. Nothing where the profiler sees
    no device.
    """
    device_activities = supported_activities() - {ProfilerActivity.CPU}
    value: Any = None
    work, busy = [0.0], [0.0]
    call.prepare()
    for part in call.parts.values():
        clock.flush()
        synchronize(device)
        with profile(activities=device_activities or {ProfilerActivity.CPU}) as profiler:
            value = part(value)
            synchronize(device)
        found = _device_work(profiler.events() or [])
        work.append(work[-1] + len(found))
        busy.append(busy[-1] + sum(event.time_range.elapsed_us() for event in found) / 1e3)
    if not work[-1]:
        return {}
    names = list(call.parts)
    return {LAUNCHES + name: value for name, value in _by_pass(names, work).items()} | {
        BUSY + name: value for name, value in _by_pass(names, busy).items()
    }
