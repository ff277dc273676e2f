# SPDX-License-Identifier: Apache-2.0
"""`gpu-ops`: compose, sample, fold, the masked product, beside copies and the vendor's product."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import (
    DTYPES,
    GPU_COMPOSE,
    GPU_FOLDS,
    GPU_GEMM,
    GPU_SMALL,
    GPU_SMALL_FOLD,
    FoldCase,
    LinearCase,
    as_dtype,
)
from benchmarks.clock import Call, alone
from benchmarks.folders import FOLDERS
from benchmarks.measure import Key, error_limit, timed
from benchmarks.operations import OPERATIONS, Operation, copy_of, fold
from benchmarks.problem import fold_inputs, make_problem
from benchmarks.record import Row
from benchmarks.rivals import OURS
from benchmarks.suites import gpu
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, attempt, time_all
from benchmarks.summary import Summary, Table, mean_ratio

# By pass; of the first case of a pass the summary tells how close it comes to the copy.
_LINEAR = {
    "compose": GPU_COMPOSE,
    "sample": GPU_COMPOSE,
    "sample_compose": GPU_COMPOSE,
    "linear_bits": (GPU_GEMM,),
    "linear_sampled": (GPU_GEMM,),
}
FOLD_ROUNDS = 10
_FOLD_PEERS = ("eager_masks", "peft_fuse", "loha_merge")
_CHECKED_LAYERS = 8  # an exact fold of every layer would take longer than all that is measured
_MOST_BOOLS = 2**32  # masks of a byte each: beyond this the eager peer fills the memory


def _measure(
    operations: Mapping[Key, Operation],
    pass_: str,
    kind: torch.dtype,
    settings: Settings,
    errors: dict[str, str],
    rounds: int = gpu.ROUNDS,
) -> Outcome:
    accuracy = attempt(operations.items(), lambda _, operation: operation.error(), errors)
    calls = {
        key: Call({pass_: alone(operations[key].run)}, operations[key].prepare) for key in accuracy
    }
    timings = time_all(calls, gpu.rounds(settings, rounds), settings.device, errors, events=True)
    rows = [
        replace(
            timed(*key, pass_, timings[key], operations[key].work),
            error=error,
            error_limit=error_limit(kind),
        )
        for key, error in accuracy.items()
    ]
    return Outcome(rows, errors=errors)


def _run_operation(pass_: str, case: LinearCase, settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    problem = make_problem(case, settings.device)
    # the definition would take longer for a whole model than all else together
    too_slow = [name for name in OURS if name not in gpu.KERNELS] if case.label else []
    entries = [
        ((case.name, name), entry)
        for name, entry in OPERATIONS[pass_].items()
        if entry.missing(settings.device) is None and name not in too_slow
    ]
    operations = attempt(entries, lambda _, entry: entry.build(case, problem), errors)
    return _measure(operations, pass_, DTYPES[case.dtype], settings, errors)


def _fold_peers(case: FoldCase) -> tuple[str, ...]:
    weights = sum(inner * out for inner, out in case.layers)
    return _FOLD_PEERS if weights * case.adapters < _MOST_BOOLS else ()


@torch.no_grad()
def _run_fold(case: FoldCase, settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    initial, adapters = fold_inputs(case, settings.device)
    initial = [tensor.to(DTYPES[case.dtype]) for tensor in initial]
    step = -(-len(initial) // _CHECKED_LAYERS)
    names = [
        name
        for name in (*gpu.KERNELS, *_fold_peers(case))
        if FOLDERS[name].missing(settings.device) is None
    ]
    operations = attempt(
        (((case.name, name), FOLDERS[name]) for name in names),
        lambda _, rival: fold(
            rival.build(initial, adapters), case.work(), range(0, len(initial), step)
        ),
        errors,
    )
    source = torch.cat([tensor.flatten() for tensor in initial])
    operations[case.name, "copy"] = copy_of(source)
    kind = DTYPES[case.dtype]
    return _measure(operations, _fold_pass(case), kind, settings, errors, FOLD_ROUNDS)


def _fold_pass(case: FoldCase) -> str:
    return f"fold_{case.adapters}"


def _tasks(settings: Settings) -> list[Task]:
    kind = gpu.dtype(settings)
    tasks = [
        Task(f"{pass_}, {case.name}", partial(_run_operation, pass_, case, settings))
        for pass_, cases in _LINEAR.items()
        for case in (as_dtype(it, kind) for it in ((GPU_SMALL,) if settings.quick else cases))
    ]
    folds = (GPU_SMALL_FOLD,) if settings.quick else GPU_FOLDS
    return tasks + [
        Task(f"{_fold_pass(case)}, {case.name}", partial(_run_fold, case, settings))
        for case in (as_dtype(it, kind) for it in folds)
    ]


def _bandwidth(row: Row) -> float | None:
    return row["gb_s"]


def _against_copy(table: Table, case: str, provider: str, pass_: str) -> float | None:
    return mean_ratio(
        [case],
        lambda name: table.find(name, provider, pass_),
        lambda name: table.find(name, "copy", pass_),
        _bandwidth,
    )


def _summary(rows: list[Row]) -> Summary:
    """Bandwidth of ours over that of the copy beside it, and every other peer's time over ours."""
    found = Summary()
    for pass_ in dict.fromkeys(row["pass"] for row in rows):
        of_pass = [row for row in rows if row["pass"] == pass_]
        table = Table(of_pass)
        ours = gpu.backends_that_ran(of_pass)
        peers = dict.fromkeys(row["provider"] for row in of_pass if row["provider"] not in ours)
        for provider in ours:
            for peer in peers:
                name = f"{pass_}.{provider}.over.{peer}"
                if peer == "copy":
                    found[name] = _against_copy(table, table.cases[0], provider, pass_)
                else:
                    found |= gpu.ratios(table, table.cases, peer, provider, name, pass_)
    return found


SUITE = Suite(
    "gpu-ops",
    "compose, sample, fold and the masked product, beside a copy and the vendor's product",
    {
        **{
            name: entry.missing
            for entries in OPERATIONS.values()
            for name, entry in entries.items()
        },
        **{name: FOLDERS[name].missing for name in _FOLD_PEERS},
    },
    _tasks,
    _summary,
    goals={
        **gpu.goals(("compose.{}.over.copy", "fold_1.{}.over.copy"), ">= 0.85"),
        **gpu.goals(("linear_bits.{}.over.frozen.device",), ">= 0.9"),
        **gpu.goals(("linear_sampled.{}.over.frozen.device",), ">= 0.75"),
    },
)
