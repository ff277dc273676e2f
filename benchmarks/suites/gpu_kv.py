# SPDX-License-Identifier: Apache-2.0
"""`gpu-kv`: a training step of K and V of one block, on every backend and beside every rival."""

from collections.abc import Sequence
from functools import partial

from benchmarks.cases import GPU_KV, GPU_KV_COMPILED, GPU_SMALL, LinearCase, as_dtype
from benchmarks.record import Row
from benchmarks.rivals import OURS, RIVALS
from benchmarks.suites import gpu
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, build, compete, why_missing
from benchmarks.summary import Summary, Table

RIVALS_HERE = ("gumbel", "eager", "peft", "loha", "dense", "frozen")
COMPILED = "eager.compile"


def _run(case: LinearCase, rivals: Sequence[str], settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    contestants = build(case, rivals, settings.device, errors)
    work = case.work()
    rows = compete(
        contestants,
        gpu.rounds(settings),
        settings.device,
        errors,
        events=True,
        works={key: work for key in contestants if RIVALS[key[1]].masked},
    )
    return Outcome(rows, errors=errors)


def _tasks(settings: Settings) -> list[Task]:
    if settings.quick:
        cases: Sequence[LinearCase] = (GPU_SMALL,)
    else:  # those that a compiler joins come last: if time runs out, it costs the fewest rows
        cases = sorted(GPU_KV, key=GPU_KV_COMPILED.__contains__)
    return [
        Task(
            case.name,
            partial(
                _run,
                as_dtype(case, gpu.dtype(settings)),
                (*OURS, *RIVALS_HERE, *((COMPILED,) if case in GPU_KV_COMPILED else ())),
                settings,
            ),
        )
        for case in cases
    ]


def _summary(rows: list[Row]) -> Summary:
    """Times of every rival over ours, as geometric means over the cases that both ran."""
    table, found = Table(rows), Summary()
    rivals = [name for name in (*RIVALS_HERE, COMPILED) if any(r["provider"] == name for r in rows)]
    for provider in gpu.backends_that_ran(rows):
        for rival in rivals:
            name = f"kv.{provider}.over.{rival}"
            found |= gpu.ratios(table, table.cases, rival, provider, name)
    return found


SUITE = Suite(
    "gpu-kv",
    "a training step of K and V together, shapes of SD 1.5 and SDXL, beside every rival",
    why_missing((*OURS, *RIVALS_HERE, COMPILED)),
    _tasks,
    _summary,
    slow=(COMPILED,),
    goals={
        **gpu.goals(("kv.{}.over.eager.device",), ">= 10"),
        **gpu.goals(("kv.{}.over.eager.compile.device",), ">= 3"),
        **gpu.goals(("kv.{}.over.loha.device",), "> 1"),
    },
)
