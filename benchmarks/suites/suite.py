# SPDX-License-Identifier: Apache-2.0
"""What a suite is, and the interleaved run of contestants that most are made of."""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from stamina_adapters.evaluation.cost import saved_mib

from benchmarks.cases import LinearCase, Work
from benchmarks.clock import Call, DeviceClock, alone, profiled, wall, wall_and_device
from benchmarks.compiled import forget_compiled
from benchmarks.measure import (
    Key,
    Measurement,
    Timings,
    check,
    error_limit,
    interleave,
    timed,
)
from benchmarks.problem import make_problem
from benchmarks.record import Row
from benchmarks.rivals import RIVALS, Contestant
from benchmarks.summary import Summary

PASSES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Settings:
    """How a suite is run. After `seconds` no further task begins; None: they all do."""

    quick: bool
    device: str
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a task found: rows, figures for the summary that no row holds, and what failed and why.

    A failure of one way to compute a case does not cost the others theirs.
    """

    rows: list[Measurement]
    facts: Summary = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A part of a suite that the progress bar counts; what it compares is interleaved within it."""

    label: str
    run: Callable[[], Outcome]


@dataclass(frozen=True)
class Suite:
    """tasks lists the work without doing any; rivals says of every provider why it is missing on a
    device; goals are what the summary's figures should be, as in ">= 0.85"; slow are the rivals
    that a quick run leaves out."""

    name: str
    about: str
    rivals: Mapping[str, Callable[[str], str | None]]
    tasks: Callable[[Settings], list[Task]]
    summary: Callable[[list[Row]], Summary]
    goals: Mapping[str, str] = field(default_factory=dict)
    slow: Sequence[str] = ()


def why_missing(providers: Sequence[str]) -> dict[str, Callable[[str], str | None]]:
    """For each of these entries of `RIVALS`, what says why it is missing when asked."""

    def ask(name: str, device: str) -> str | None:
        return RIVALS[name].missing(device)

    return {name: partial(ask, name) for name in providers}


def one_line(error: BaseException) -> str:
    """An error as a result records it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


Item = TypeVar("Item")
Made = TypeVar("Made")


def attempt(
    items: Iterable[tuple[Key, Item]], make: Callable[[Key, Item], Made], errors: dict[str, str]
) -> dict[Key, Made]:
    """make(key, item) of every item; one that raises is left out and said in errors."""
    made: dict[Key, Made] = {}
    for key, item in items:
        try:
            made[key] = make(key, item)
        except Exception as error:  # whatever a rival, a compiler or a driver raises
            traceback.print_exc()
            errors[", ".join(key)] = one_line(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return made


def build(
    case: LinearCase, providers: Sequence[str], device: str, errors: dict[str, str]
) -> dict[Key, Contestant]:
    """The contestants of a case that can run here, on the same inputs."""
    problem = make_problem(case, device)
    present = [name for name in providers if RIVALS[name].missing(device) is None]
    return attempt(
        (((case.name, name), RIVALS[name]) for name in present),
        lambda _, rival: rival.build(problem),
        errors,
    )


def training_step(contestant: Contestant) -> Call:
    return Call({"forward": alone(contestant.run), "backward": contestant.backward})


def time_all(
    calls: Mapping[Key, Call],
    rounds: int,
    device: str,
    errors: dict[str, str],
    *,
    events: bool | None = None,
) -> Timings:
    """Samples of all calls, interleaved: wall times; with events, which is what devices other than
    the CPU get, the device's times as well, and then its kernels in one more call of each."""
    if not (device != "cpu" if events is None else events):
        return interleave({key: partial(wall, it, device) for key, it in calls.items()}, rounds)
    clock = DeviceClock(device)
    times = interleave(
        {key: partial(wall_and_device, it, clock, device) for key, it in calls.items()}, rounds
    )
    # times are worth keeping where a profiler fails
    kernels = attempt(calls.items(), lambda _, it: profiled(it, clock, device), errors)
    return {
        key: times[key] | {name: [value] for name, value in kernels.get(key, {}).items()}
        for key in calls
    }


def compete(
    contestants: Mapping[Key, Contestant],
    rounds: int,
    device: str,
    errors: dict[str, str],
    *,
    events: bool | None = None,
    works: Mapping[Key, Mapping[str, Work]] | None = None,
) -> list[Measurement]:
    """Rows of every contestant and pass: interleaved times, saved memory, error against fp64.

    works are what a contestant must do, pass by pass, where its rates are wanted.
    """

    def accuracy_and_memory(_: Key, contestant: Contestant) -> tuple[dict[str, float], float]:
        return check(contestant), saved_mib(contestant.run, contestant.known)

    found = attempt(contestants.items(), accuracy_and_memory, errors)
    calls = {key: training_step(contestants[key]) for key in found}
    timings = time_all(calls, rounds, device, errors, events=events)
    forget_compiled()
    return [
        replace(
            timed(*key, name, timings[key], (works or {}).get(key, {}).get(name)),
            saved_mib=saved,
            error=error[name],
            error_limit=error_limit(contestants[key].leaves[0].dtype),
        )
        for key, (error, saved) in found.items()
        for name in PASSES
    ]
