# SPDX-License-Identifier: Apache-2.0
"""Runs a suite and makes a result of it."""

from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.measure import Measurement
from benchmarks.record import Result, Row, failed
from benchmarks.suites import Suite
from benchmarks.suites.suite import Settings

Advance = Callable[[str], None]
"""Called with the label of the task that begins."""


def _row(suite: str, measured: Measurement, machine: str, versions: dict[str, str | None]) -> Row:
    fields: dict[str, Any] = vars(measured).copy()
    fields["pass"] = fields.pop("pass_")
    return {"suite": suite, **fields, "machine": machine, "versions": versions}  # type: ignore[typeddict-item]


def run_suite(suite: Suite, settings: Settings, advance: Advance) -> Result:
    """All tasks of a suite in order; the machine's peaks are measured first."""
    advance("peaks of this machine")
    found, versions = machine.machine(settings.device), machine.versions()
    rows: list[Row] = []
    facts: dict[str, float | None] = {}
    for task in suite.tasks(settings):
        advance(task.label)
        measured, extra = task.run()
        rows += [_row(suite.name, it, machine.label(found), versions) for it in measured]
        facts |= extra
    return {
        "machine": found,
        "versions": versions,
        "rows": rows,
        "summary": suite.summary(rows) | facts,
    }


def failures(result: Result) -> list[str]:
    """One line for every failed accuracy check."""
    return [
        f"{row['suite']}, {row['case']}, {row['provider']}, {row['pass']}: "
        f"error {row['error']:.1e} exceeds {row['error_limit']:.1e}"
        for row in result["rows"]
        if failed(row)
    ]
