# SPDX-License-Identifier: Apache-2.0
"""Choosing settings: the same number of trials for every method, on the tuning concepts only.

A trial learns all tuning concepts with one of the settings that the method's list offers. The one
with the lowest A_mmd + F_mmd is picked. A_mmd is how far the pictures of all concepts are from real
ones in the end, which falls with learning and rises with forgetting; F_mmd is the forgetting alone,
counted twice because the sequence to come is longer and forgetting adds up. Accuracy cannot choose:
over five concepts it moves in steps of more than a hundredth, and several settings reach all of it.
"""

from collections.abc import Sequence
from typing import Any

from stamina_adapters.continual.registry import Registry
from stamina_adapters.continual.rows import SummaryRow, TuningRow
from stamina_adapters.continual.spec import BenchmarkSpec
from stamina_adapters.training.ablations import merged
from stamina_adapters.training.errors import InputError

_FIGURES = ("accuracy_after_learning", "accuracy_final", "a_mmd", "f_mmd", "seconds")


def trials_of(
    spec: BenchmarkSpec, lines: Sequence[str], registry: Registry
) -> dict[str, list[dict[str, Any]]]:
    """For every line, the settings of each of its trials: the line's own with a list's over them.

    Raises `InputError` where a method offers fewer than `spec.tuning.trials`, or the lists differ
    in length and that is not given: no method may have more tries than another.
    """
    offered = {}
    for name in lines:
        method = str(spec.line(name).method)
        if method not in registry.search:
            raise InputError(f"--methods: {name!r} has no settings to search; leave it out")
        offered[name] = list(registry.search[method])
    counts = {name: len(settings) for name, settings in offered.items()}
    trials = spec.tuning.trials
    if trials is None:
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(
                f"--sequence: methods offer different numbers of settings ({listed}); "
                "set tuning.trials"
            )
        trials = next(iter(counts.values()))
    for name, count in counts.items():
        if count < trials:
            raise InputError(f"--sequence: tuning.trials {trials}: {name!r} offers {count}")
    return {
        name: [merged(spec.line(name).settings, one) for one in offered[name][:trials]]
        for name in lines
    }


def best(outcomes: Sequence[SummaryRow | str]) -> int | None:
    """Which trial is picked: its position, None where all failed."""
    known = {index: row for index, row in enumerate(outcomes) if isinstance(row, SummaryRow)}
    if not known:
        return None
    return min(known, key=lambda index: known[index].a_mmd + (known[index].f_mmd or 0.0))


def tuning_rows(
    name: str,
    settings: Sequence[dict[str, Any]],
    outcomes: Sequence[SummaryRow | str],
    seed: int,
    concepts: int,
) -> list[TuningRow]:
    """All trials of a method, the picked one marked; an outcome is a summary, or why it failed."""
    picked = best(outcomes)
    rows = []
    for trial, outcome in enumerate(outcomes):
        figures: dict[str, Any] = {name: getattr(outcome, name, None) for name in _FIGURES}
        rows.append(
            TuningRow(
                method=name,
                trial=trial + 1,
                trials=len(outcomes),
                seed=seed,
                concepts=concepts,
                settings=settings[trial],
                picked=trial == picked,
                failed=None if isinstance(outcome, SummaryRow) else outcome,
                **figures,
            )
        )
    return rows


def tuned(spec: BenchmarkSpec, rows: Sequence[TuningRow]) -> BenchmarkSpec:
    """The specification with the picked settings in its methods."""
    picked = {row.method: row.settings for row in rows if row.picked}
    methods = {
        **spec.methods,
        **{
            name: spec.line(name).model_copy(update={"settings": settings})
            for name, settings in picked.items()
        },
    }
    return spec.model_copy(update={"methods": methods})
