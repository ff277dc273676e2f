# SPDX-License-Identifier: Apache-2.0
"""Results as text: the summary, what changed between two, and Markdown tables."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table as ScreenTable

from benchmarks.record import Result, Row, failed, key
from benchmarks.summary import Table

REFUSED = "refused: check failed"
WHOLE = ("step", "fold")
"""The passes that stand for a case: what a user waits for."""


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def summary_table(summary: Mapping[str, float | None]) -> ScreenTable:
    """The summary on the screen; a null one was refused or has no rows."""
    table = ScreenTable("summary", "value")
    for name, value in sorted(summary.items()):
        table.add_row(name, number(value))
    return table


def _quantity(row: Row) -> tuple[str, float | None]:
    """What a row is compared by: its time, or its memory where it has no time."""
    if row["median_ms"] is not None:
        return "ms", row["median_ms"]
    return "MiB", row["peak_mib"]


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if not a or b is None else f"{b / a:.3f}"


def comparison(first: Result, second: Result) -> Iterator[ScreenTable | str]:
    """What changed from the first to the second result, ready to print."""
    before, after = ({key(row): row for row in result["rows"]} for result in (first, second))
    if _identity(first) != _identity(second):
        yield "The machines differ: ratios of times compare machines as well."
    table = ScreenTable("suite", "case", "provider", "pass", "A", "B", "unit", "B / A")
    for name in [name for name in before if name in after]:
        unit, a = _quantity(before[name])
        _, b = _quantity(after[name])
        refused = failed(before[name]) or failed(after[name])
        table.add_row(*name, number(a), number(b), unit, REFUSED if refused else _ratio(a, b))
    yield table
    for title, one, other in (("A", before, after), ("B", after, before)):
        if only := len(one.keys() - other.keys()):
            yield f"{only} rows are in {title} only."
    changed = ScreenTable("summary", "A", "B", "B / A")
    for entry in sorted(first["summary"] | second["summary"]):
        a, b = first["summary"].get(entry), second["summary"].get(entry)
        changed.add_row(entry, number(a), number(b), _ratio(a, b))
    yield changed


def _identity(result: Result) -> tuple[object, ...]:
    fields = ("cpu", "device", "threads", "simd_kernels", "simd_torch")
    return tuple(result["machine"].get(field) for field in fields)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if failed(row):
        return REFUSED
    return number(_quantity(row)[1])


def markdown(result: Result) -> str:
    """The result for a README: one line a case, one column a provider, then the summary."""
    rows = [row for row in result["rows"] if row["pass"] in WHOLE]
    table = Table(rows)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    passes = {row["case"]: row["pass"] for row in rows}
    unit = "peak MiB" if any(row["median_ms"] is None for row in rows) else "median ms"
    body = [
        [case, *(_cell(table.find(case, provider, passes[case])) for provider in providers)]
        for case in table.cases
    ]
    machine, versions = result["machine"], result["versions"]
    worst = max((row["error"] for row in rows if row["error"] is not None), default=None)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    about = (
        f"{rows[0]['machine'] if rows else machine['cpu']}; {packages}. "
        f"Largest relative RMS error against fp64: {number(worst)}."
    )
    summary = [[f"`{name}`", number(value)] for name, value in sorted(result["summary"].items())]
    return "\n".join(
        [
            *_markdown([unit, *providers], body),
            "",
            *_markdown(["summary", "value"], summary),
            "",
            about,
        ]
    )
