# SPDX-License-Identifier: Apache-2.0
"""`gpu-unet`: a whole training step of a UNet of SDXL's shape, beside PEFT LoRA of its rank."""

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import peak, unet
from benchmarks.cases import DTYPES
from benchmarks.clock import WHOLE, Call
from benchmarks.measure import Key, error_limit, timed
from benchmarks.record import Row
from benchmarks.rivals import OURS, RIVALS, UNUSABLE, absent
from benchmarks.suites import gpu
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, attempt, time_all
from benchmarks.summary import Summary, Table

ROUNDS = 6  # a step takes a fifth of a second, and is timed by three clocks
LORA = "peft"


NO_UNET = absent("diffusers")
_OWN_REASON = {name: UNUSABLE[name] for name in gpu.KERNELS} | {LORA: RIVALS[LORA].missing}


def _missing(name: str, device: str) -> str | None:
    return NO_UNET(device) or _OWN_REASON[name](device)


MISSING = {name: partial(_missing, name) for name in _OWN_REASON}


def _step(call: Call) -> None:
    value: Any = None
    for part in call.parts.values():
        value = part(value)


def _run(label: str, config: dict[str, Any], settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    device, kind = settings.device, DTYPES[gpu.dtype(settings)]
    present = [name for name, missing in MISSING.items() if missing(device) is None]
    batch = unet.make_batch(config, device, kind)
    for_ours, for_lora = unet.make_unets(config, device, kind)
    on_backend = unet.with_stamina(for_ours)
    trained = attempt(
        (((label, name), name) for name in present),
        lambda _, name: unet.with_lora(for_lora) if name == LORA else on_backend(OURS[name]),
        errors,
    )
    calls = {key: it.call(batch) for key, it in trained.items()}

    def accuracy_and_memory(key: Key, it: unet.Trained) -> tuple[float, float | None]:
        error = it.error(batch)
        _step(calls[key])  # the optimiser's state and what is compiled come with the first step
        return error, peak.growth(lambda: _step(calls[key]), device)

    found = attempt(trained.items(), accuracy_and_memory, errors)
    timed_calls = {key: calls[key] for key in found}
    rounds = gpu.rounds(settings, ROUNDS)
    timings = time_all(timed_calls, rounds, device, errors, events=True)
    rows = [
        replace(
            timed(*key, name, timings[key]),
            peak_mib=grown if name == WHOLE else None,
            error=error,
            error_limit=error_limit(kind),
        )
        for key, (error, grown) in found.items()
        for name in (*calls[key].parts, WHOLE)
    ]
    return Outcome(rows, errors=errors)


def _tasks(settings: Settings) -> list[Task]:
    if NO_UNET(settings.device):
        return []
    label, config = ("small UNet", unet.SMALL) if settings.quick else ("SDXL's UNet", unet.SDXL)
    label = f"{label} x{unet.BATCH} {gpu.dtype(settings)}"
    return [Task(label, partial(_run, label, config, settings))]


def _summary(rows: list[Row]) -> Summary:
    """Ours over LoRA, in time and in what a step adds to the memory."""
    table, found = Table(rows), Summary()
    for provider in gpu.backends_that_ran(rows):
        found |= gpu.ratios(table, table.cases, provider, LORA, f"unet.{provider}.of_lora")
        found[f"unet.{provider}.of_lora.peak"] = gpu.peak_ratio(table, provider, LORA)
    return found


SUITE = Suite(
    "gpu-unet",
    "a whole training step of a UNet of SDXL's shape, beside PEFT LoRA of the same rank",
    MISSING,
    _tasks,
    _summary,
    goals={
        **gpu.goals(("unet.{}.of_lora.device", "unet.{}.of_lora.wall"), "<= 1.1"),
        **gpu.goals(("unet.{}.of_lora.peak",), "<= 1.02"),
    },
)
