# SPDX-License-Identifier: Apache-2.0
"""Runs a suite and makes a result of it."""

import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.measure import Measurement
from benchmarks.record import Result, Row, failed
from benchmarks.suites import Suite
from benchmarks.suites.suite import Settings, one_line

Advance = Callable[[str], None]
"""Called with the label of the task that begins."""


def _row(suite: str, measured: Measurement, machine: str, versions: dict[str, str | None]) -> Row:
    fields: dict[str, Any] = vars(measured).copy()
    fields["pass"] = fields.pop("pass_")
    return {"suite": suite, **fields, "machine": machine, "versions": versions}  # type: ignore[typeddict-item]


def run_suite(
    suite: Suite, settings: Settings, advance: Advance, keep: Callable[[Result], None]
) -> Result:
    """All tasks of a suite in order; the machine's peaks are measured first.

    A task that raises is recorded and the next one begins; after settings.seconds none does. What
    is there so far goes to keep after every task.
    """
    start = time.monotonic()
    advance("peaks of this machine")
    found, versions = machine.machine(settings.device), machine.versions()
    facts: dict[str, float | None] = {}
    result: Result = {
        "machine": found, "versions": versions, "rows": [], "summary": {},
        "skipped": dict.fromkeys(suite.slow if settings.quick else (), "--quick")
        | {
            name: reason
            for name, missing in suite.rivals.items()
            if (reason := missing(settings.device))
        },
        "errors": {},
    }  # fmt: skip
    for task in suite.tasks(settings):
        advance(task.label)
        if settings.seconds is not None and time.monotonic() - start > settings.seconds:
            result["skipped"][task.label] = f"the {settings.seconds:.0f} s of this run were used up"
            continue
        try:
            outcome = task.run()
        except Exception as error:  # the rows of the other tasks are worth keeping
            traceback.print_exc()
            result["errors"][task.label] = one_line(error)
            continue
        label = machine.label(found)
        result["rows"] += [_row(suite.name, it, label, versions) for it in outcome.rows]
        result["errors"] |= outcome.errors
        facts |= outcome.facts
        result["summary"] = suite.summary(result["rows"]) | facts
        keep(result)
    result["summary"] = suite.summary(result["rows"]) | facts
    return result


def failures(result: Result) -> list[str]:
    """One line for everything that raised and for every failed accuracy check."""
    raised = [f"error in {what}: {why}" for what, why in result["errors"].items()]
    return raised + [
        f"check failed: {row['suite']}, {row['case']}, {row['provider']}, {row['pass']}: "
        f"error {row['error']:.1e} exceeds {row['error_limit']:.1e}"
        for row in result["rows"]
        if failed(row)
    ]
