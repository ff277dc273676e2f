# SPDX-License-Identifier: Apache-2.0
"""`fold`: many finished adapters into all K/V layers of a model."""

from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import DTYPES, FOLD, FOLD_QUICK, FoldCase, as_dtype
from benchmarks.clock import Call, alone
from benchmarks.folders import FOLDERS, Folder
from benchmarks.measure import (
    Key,
    Measurement,
    error_limit,
    timed,
    worst,
)
from benchmarks.problem import fold_inputs
from benchmarks.record import Row
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, time_all
from benchmarks.summary import Summary, Table, speedup

ROUNDS, QUICK_ROUNDS = 7, 2
PROVIDERS = ("ours", "eager_masks", "peft_fuse", "loha_merge")


def _exact(folder: Folder) -> list[torch.Tensor]:
    return [initial.double() + folder.delta(k) for k, initial in enumerate(folder.initial)]


def _error(folder: Folder, exact: list[torch.Tensor]) -> float:
    """The worst layer's relative RMS error after the last fold."""
    return worst(zip(folder.weights, exact, strict=True))


def correctly_rounded(weight: torch.Tensor, exact: torch.Tensor) -> int:
    """How many elements are the nearest of their dtype to the exact value.

    Compared with the neighbour towards it: converting fp64 to 16 bits rounds twice in PyTorch.
    """
    towards = torch.where(exact > weight, torch.inf, -torch.inf).to(weight.dtype)
    neighbour = torch.nextafter(weight, towards)
    distance, other = ((value.double() - exact).abs() for value in (weight, neighbour))
    return int((distance <= other).sum())


def _rounded_fraction(folder: Folder, exact: list[torch.Tensor]) -> float:
    good = sum(correctly_rounded(*pair) for pair in zip(folder.weights, exact, strict=True))
    return good / sum(weight.numel() for weight in folder.weights)


@torch.no_grad()
def _run(case: FoldCase, settings: Settings) -> Outcome:
    initial, adapters = fold_inputs(case, settings.device)
    folders: dict[Key, Folder] = {
        (case.name, name): FOLDERS[name].build(initial, adapters)
        for name in PROVIDERS
        if FOLDERS[name].missing(settings.device) is None
    }
    for dtype in ("bf16", "fp16"):
        lower = [tensor.to(DTYPES[dtype]) for tensor in initial]
        folders[as_dtype(case, dtype).name, "ours"] = FOLDERS["ours"].build(lower, adapters)
    calls = {
        key: Call({"fold": alone(folder.fold)}, folder.reset) for key, folder in folders.items()
    }
    errors: dict[str, str] = {}
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    timings = time_all(calls, rounds, settings.device, errors)
    rows: list[Measurement] = []
    facts: Summary = {}
    for key, folder in folders.items():
        exact, kind = _exact(folder), folder.weights[0].dtype
        row = timed(*key, "fold", timings[key])
        rows.append(replace(row, error=_error(folder, exact), error_limit=error_limit(kind)))
        if kind == torch.bfloat16:
            facts["fold.correctly_rounded"] = _rounded_fraction(folder, exact)
    return Outcome(rows, facts, errors)


def _tasks(settings: Settings) -> list[Task]:
    case = FOLD_QUICK if settings.quick else FOLD
    return [Task(case.name, partial(_run, case, settings))]


def _summary(rows: list[Row]) -> Summary:
    table = Table(rows)
    return {
        f"fold.speedup.{rival}": speedup(table, table.cases, [rival], "fold")
        for rival in PROVIDERS[1:]
    }


SUITE = Suite(
    "fold",
    f"{FOLD.adapters} finished adapters into {len(FOLD.layers)} layers",
    {name: FOLDERS[name].missing for name in PROVIDERS},
    _tasks,
    _summary,
)
