# SPDX-License-Identifier: Apache-2.0
"""`fold`: many finished adapters into all K/V layers of a model."""

import time
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import DTYPES, FOLD, FOLD_QUICK, FoldCase
from benchmarks.folders import FOLDERS, Folder
from benchmarks.measure import (
    Key,
    Measurement,
    error_limit,
    interleave,
    relative_rms,
    synchronize,
    timed,
)
from benchmarks.problem import fold_inputs
from benchmarks.record import Row
from benchmarks.suites.suite import Settings, Suite, Task
from benchmarks.summary import Summary, Table, speedup

ROUNDS, QUICK_ROUNDS = 7, 2


def _time(folder: Folder, device: str) -> dict[str, float]:
    folder.reset()
    synchronize(device)
    start = time.perf_counter()
    folder.fold()
    synchronize(device)
    return {"fold": 1e3 * (time.perf_counter() - start)}


def _exact(folder: Folder) -> list[torch.Tensor]:
    return [initial.double() + folder.delta(k) for k, initial in enumerate(folder.initial)]


def _error(folder: Folder, exact: list[torch.Tensor]) -> float:
    """The worst layer's relative RMS error after the last fold."""
    return max(relative_rms(*pair) for pair in zip(folder.weights, exact, strict=True))


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
def _run(case: FoldCase, settings: Settings) -> tuple[list[Measurement], Summary]:
    initial, adapters = fold_inputs(case, settings.device)
    folders: dict[Key, Folder] = {
        (case.name, name): rival.build(initial, adapters)
        for name, rival in FOLDERS.items()
        if rival.missing() is None
    }
    for dtype in ("bf16", "fp16"):
        lower = [tensor.to(DTYPES[dtype]) for tensor in initial]
        folders[replace(case, dtype=dtype).name, "ours"] = FOLDERS["ours"].build(lower, adapters)
    timings = interleave(
        {key: partial(_time, folder, settings.device) for key, folder in folders.items()},
        QUICK_ROUNDS if settings.quick else ROUNDS,
    )
    rows: list[Measurement] = []
    facts: Summary = {}
    for key, folder in folders.items():
        exact, kind = _exact(folder), folder.weights[0].dtype
        row = timed(*key, "fold", timings[key]["fold"])
        rows.append(replace(row, error=_error(folder, exact), error_limit=error_limit(kind)))
        if kind == torch.bfloat16:
            facts["fold.correctly_rounded"] = _rounded_fraction(folder, exact)
    return rows, facts


def _tasks(settings: Settings) -> list[Task]:
    case = FOLD_QUICK if settings.quick else FOLD
    return [Task(case.name, partial(_run, case, settings))]


def _summary(rows: list[Row]) -> Summary:
    table = Table(rows)
    return {
        f"fold.speedup.{rival}": speedup(table, table.cases, [rival], "fold")
        for rival in FOLDERS
        if rival != "ours"
    }


SUITE = Suite(
    "fold",
    f"{FOLD.adapters} finished adapters into {len(FOLD.layers)} layers",
    {name: rival.missing for name, rival in FOLDERS.items()},
    _tasks,
    _summary,
)
