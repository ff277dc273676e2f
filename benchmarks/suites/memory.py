# SPDX-License-Identifier: Apache-2.0
"""`memory`: what a training step saves and how far the process grows, one process for each."""

from functools import partial

import torch

from benchmarks.cases import MEMORY, SDXL, SDXL_TENTH, MemoryCase
from benchmarks.measure import Measurement, error_limit
from benchmarks.peak import measure_in_child
from benchmarks.record import Row, peak_mib
from benchmarks.rivals import RIVALS
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, why_missing
from benchmarks.summary import Summary, Table, mean_ratio

PROVIDERS = ("ours", "gumbel", "eager", "peft", "loha", "dense")
_QUICK = ("ours", "eager")
_MODEL_WIDE = ((SDXL, "ours"), (SDXL_TENTH, "eager"), (SDXL_TENTH, "gumbel"))


def _run(case: MemoryCase, provider: str, settings: Settings) -> Outcome:
    found = measure_in_child(case, provider, settings.device)
    limit = error_limit(torch.float32)
    return Outcome([Measurement(case.name, provider, "step", error_limit=limit, **found)])


def _tasks(settings: Settings) -> list[Task]:
    if settings.quick:
        pairs = [(MEMORY[0], provider) for provider in _QUICK]
    else:
        pairs = [(case, provider) for case in MEMORY for provider in PROVIDERS]
        pairs += _MODEL_WIDE
    return [
        Task(f"{case.name}, {provider}", partial(_run, case, provider, settings))
        for case, provider in pairs
        if RIVALS[provider].missing(settings.device) is None
    ]


def _summary(rows: list[Row]) -> Summary:
    """Peak of ours over eager's, all 140 layers of SDXL."""
    table = Table(rows)
    ratio = mean_ratio(
        ["ours over eager"],
        lambda _: table.find(SDXL.name, "ours"),
        lambda _: table.find(SDXL_TENTH.name, "eager"),
        peak_mib,
    )
    return {"memory.sdxl_ours_over_eager": ratio}


SUITE = Suite(
    "memory",
    "memory saved for the backward and peak growth, up to all K and V of SDXL",
    why_missing(PROVIDERS),
    _tasks,
    _summary,
    slow=[name for name in PROVIDERS if name not in _QUICK],
)
