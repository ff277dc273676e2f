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
    """For every line, the settings of each of its trials: what its method's list offers, and what
    of the line's own settings no trial changes. The others are what an earlier search picked.

    Raises `InputError` where a method offers fewer than `spec.tuning.trials`, or the lists differ
    in length and that is not given: no method may have more tries than another. So it does where
    two trials of a line, or two lines, would be the same.
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
    found = {}
    for name, settings in offered.items():
        own = _unsearched(spec.line(name).settings, settings)
        found[name] = _distinct(name, own, settings[:trials])
    for k, name in enumerate(lines):
        for other in lines[:k]:
            if spec.line(name).method == spec.line(other).method and found[name] == found[other]:
                raise InputError(
                    f"--methods: {name!r} would be tried with the settings of {other!r}; leave one "
                    "of them out"
                )
    return found


def _unsearched(settings: dict[str, Any], offered: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that none of those offered changes, group by group."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        changed = [one[key] for one in offered if key in one]
        if not changed:
            kept[key] = value
        elif isinstance(value, dict) and (inner := _unsearched(value, changed)):
            kept[key] = inner
    return kept


def _distinct(
    name: str, own: dict[str, Any], offered: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    trials = [merged(own, one) for one in offered]
    for k, trial in enumerate(trials):
        if trial in trials[:k]:
            first, again = trials.index(trial) + 1, k + 1
            raise InputError(f"--methods: trials {first} and {again} of {name!r} are the same")
    return trials


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
