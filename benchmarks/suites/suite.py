# SPDX-License-Identifier: Apache-2.0
"""What a suite is, and the interleaved run of contestants that most are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from stamina_adapters.evaluation.cost import saved_mib

from benchmarks.cases import LinearCase
from benchmarks.compiled import forget_compiled
from benchmarks.measure import (
    PASSES,
    Key,
    Measurement,
    check,
    error_limit,
    interleave,
    time_passes,
    timed,
)
from benchmarks.problem import make_problem
from benchmarks.record import Row
from benchmarks.rivals import RIVALS, Contestant
from benchmarks.summary import Summary


@dataclass(frozen=True)
class Settings:
    """How a suite is run."""

    quick: bool
    device: str


@dataclass(frozen=True)
class Task:
    """A part of a suite that the progress bar counts; what it compares is interleaved within it.

    run returns its measurements, and figures for the summary that no row holds.
    """

    label: str
    run: Callable[[], tuple[list[Measurement], Summary]]


@dataclass(frozen=True)
class Suite:
    """tasks lists the work without doing any; rivals says of every provider why it is missing."""

    name: str
    about: str
    rivals: Mapping[str, Callable[[], str | None]]
    tasks: Callable[[Settings], list[Task]]
    summary: Callable[[list[Row]], Summary]


def why_missing(providers: Sequence[str]) -> dict[str, Callable[[], str | None]]:
    """For each of these entries of `RIVALS`, what says why it is missing when asked."""

    def ask(name: str) -> str | None:
        return RIVALS[name].missing()

    return {name: partial(ask, name) for name in providers}


def build(case: LinearCase, providers: Sequence[str], device: str) -> dict[Key, Contestant]:
    """The contestants of a case that can run here, on the same inputs."""
    problem = make_problem(case, device)
    return {
        (case.name, name): RIVALS[name].build(problem)
        for name in providers
        if RIVALS[name].missing() is None
    }


def _measured(
    key: Key, contestant: Contestant, times: Mapping[str, Sequence[float]]
) -> list[Measurement]:
    errors = check(contestant)
    saved = saved_mib(contestant.run, contestant.known)
    limit = error_limit(contestant.leaves[0].dtype)
    return [
        replace(
            timed(*key, name, times[name]), saved_mib=saved, error=errors[name], error_limit=limit
        )
        for name in PASSES
    ]


def compete(contestants: Mapping[Key, Contestant], rounds: int, device: str) -> list[Measurement]:
    """Rows of every contestant and pass: interleaved times, saved memory, error against fp64."""
    samples = {key: partial(time_passes, it, device) for key, it in contestants.items()}
    timings = interleave(samples, rounds)
    rows = [row for key, it in contestants.items() for row in _measured(key, it, timings[key])]
    forget_compiled()
    return rows
