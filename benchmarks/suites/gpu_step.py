# SPDX-License-Identifier: Apache-2.0
"""`gpu-step`: all K and V projections of SDXL, forward and backward at once, with the memory.

The model's other layers are left out: what adapters cost here is what they add to a real step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks import peak
from benchmarks.cases import DTYPES, GPU_SMALL_MODEL, SDXL, SDXL_AT_ONCE, MemoryCase, model_wide
from benchmarks.clock import Call, alone
from benchmarks.compiled import forget_compiled
from benchmarks.measure import Key, error_limit, timed
from benchmarks.record import Row
from benchmarks.rivals import RIVALS, Contestant
from benchmarks.suites import gpu
from benchmarks.suites.suite import (
    Outcome,
    Settings,
    Suite,
    Task,
    attempt,
    time_all,
    why_missing,
)
from benchmarks.summary import Summary, Table, mean_ratio

ROUNDS = 10
AT_ONCE = MemoryCase("sdxl-140 at once", (SDXL_AT_ONCE,))
BESIDE_COMPILED = [replace(case, label=f"{case.label} beside compile") for case in (SDXL, AT_ONCE)]
RIVALS_HERE = ("gumbel", "eager", "peft", "loha", "dense")
COMPILED = "eager.compile"
Entries = Sequence[tuple[MemoryCase, Sequence[str]]]


def _groups(
    entries: Entries, device: str, errors: dict[str, str]
) -> dict[Key, Sequence[Contestant]]:
    """All ways to compute a case have the same weights: one copy of them, or memory runs out."""
    groups: dict[Key, Sequence[Contestant]] = {}
    for case, providers in entries:
        problems = peak.problems(case, device)
        present = [name for name in providers if RIVALS[name].missing(device) is None]
        groups |= attempt(
            (((case.name, name), (problems, name)) for name in present),
            lambda _, way: peak.contestants(*way),
            errors,
        )
    return groups


def _run(entries: Entries, settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    device = settings.device
    groups = _groups(entries, device, errors)

    def accuracy_and_memory(
        _: Key, group: Sequence[Contestant]
    ) -> tuple[float, float, float | None]:
        error = peak.error(group)
        peak.step(group)  # what is compiled or tuned at the first call is no part of a step
        return error, peak.saved(group), peak.growth(lambda: peak.step(group), device)

    found = attempt(groups.items(), accuracy_and_memory, errors)
    calls = {
        key: Call(
            {
                "forward": alone(partial(peak.forward, groups[key])),
                "backward": partial(peak.backward, groups[key]),
            }
        )
        for key in found
    }
    timings = time_all(calls, gpu.rounds(settings, ROUNDS), device, errors, events=True)
    forget_compiled()
    limit = error_limit(DTYPES[gpu.dtype(settings)])
    rows = [
        replace(
            timed(*key, name, timings[key]),
            saved_mib=saved,
            peak_mib=grown if name == "step" else None,
            error=error,
            error_limit=limit,
        )
        for key, (error, saved, grown) in found.items()
        for name in ("forward", "backward", "step")
    ]
    return Outcome(rows, errors=errors)


def _tasks(settings: Settings) -> list[Task]:
    kind = gpu.dtype(settings)
    by_block = GPU_SMALL_MODEL if settings.quick else SDXL
    runs: list[Entries] = [[(model_wide(by_block, kind), (*gpu.KERNELS, *RIVALS_HERE))]]
    if not settings.quick:
        runs[0] = [*runs[0], (model_wide(AT_ONCE, kind), gpu.KERNELS)]
        providers = ((*gpu.KERNELS, COMPILED), gpu.KERNELS)
        cases = (model_wide(case, kind) for case in BESIDE_COMPILED)
        runs.append(list(zip(cases, providers, strict=True)))
    return [Task(entries[0][0].name, partial(_run, entries, settings)) for entries in runs]


def _summary(rows: list[Row]) -> Summary:
    """Times of every rival over ours; ours over LoRA's in time and in memory."""
    table, found = Table(rows), Summary()
    at_once = [case for case in table.cases if case.startswith(AT_ONCE.label)]
    rivals = [name for name in (*RIVALS_HERE, COMPILED) if any(r["provider"] == name for r in rows)]
    for provider in gpu.backends_that_ran(rows):
        for rival in rivals:
            name = f"step.{provider}.over.{rival}"
            found |= gpu.ratios(table, table.cases, rival, provider, name)
            if at_once:
                found |= _at_once_ratios(table, at_once, rival, provider)
        if "peft" in rivals:
            found |= gpu.ratios(table, table.cases, provider, "peft", f"step.{provider}.of_lora")
            found[f"step.{provider}.of_lora.peak"] = gpu.peak_ratio(table, provider, "peft")
    return found


def _at_once_ratios(table: Table, cases: Sequence[str], rival: str, provider: str) -> Summary:
    """A rival's time over ours with all layers in one group: the same weights, which no rival can
    batch."""
    return {
        f"step.{provider}.at_once.over.{rival}.{clock}": mean_ratio(
            cases,
            lambda case: table.find(case.replace(AT_ONCE.label, SDXL.label), rival),
            lambda case: table.find(case, provider),
            *values,
        )
        for clock, values in gpu.CLOCKS.items()
    }


SUITE = Suite(
    "gpu-step",
    "a training step of all 140 K and V projections of SDXL, and its memory",
    why_missing((*gpu.KERNELS, *RIVALS_HERE, COMPILED)),
    _tasks,
    _summary,
    slow=(COMPILED,),
    goals={
        **gpu.goals(("step.{}.over.eager.device", "step.{}.at_once.over.eager.device"), ">= 10"),
        **gpu.goals(
            ("step.{}.over.eager.compile.device", "step.{}.at_once.over.eager.compile.device"),
            ">= 3",
        ),
        **gpu.goals(("step.{}.over.loha.device",), "> 1"),
        **gpu.goals(("step.{}.of_lora.peak",), "<= 1.02"),
    },
)
