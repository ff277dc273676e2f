# SPDX-License-Identifier: Apache-2.0
"""Results as text: the summary, what changed between two, and Markdown tables."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Column
from rich.table import Table as ScreenTable

from benchmarks import record
from benchmarks.record import Result, Row, by_kernels, failed, key, milliseconds
from benchmarks.summary import Summary, Table

REFUSED = "refused: check failed"
PARTS = ("forward", "backward", "update")
"""Passes of a longer one. The others stand for a case: they are what a user waits for."""
Goals = Mapping[str, str]
Versions = dict[str, str | None]


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def _reached(value: float | None, goal: str) -> str:
    """Whether a figure is what a goal such as ">= 0.85" asks for."""
    if value is None:
        return "no figure"
    relation, bound = goal.split()
    holds = {">=": value >= float(bound), "<=": value <= float(bound), ">": value > float(bound)}
    return "yes" if holds[relation] else "no"


def _summary_cells(summary: Summary, goals: Goals) -> list[list[str]]:
    """Name, value and, where the suite has goals, goal and whether it is reached."""
    cells = []
    for name, value in sorted(summary.items()):
        goal = goals.get(name)
        asked = [goal or "", _reached(value, goal) if goal else ""] if goals else []
        cells.append([name, number(value), *asked])
    return cells


def _summary_header(goals: Goals) -> list[str]:
    return ["summary", "value", *(["goal", "reached"] if goals else [])]


def summary_table(summary: Summary, goals: Goals) -> ScreenTable:
    """The summary on the screen; a null one was refused or has no rows."""
    table = ScreenTable(*_summary_header(goals))
    for cells in _summary_cells(summary, goals):
        table.add_row(*cells)
    return table


_QUANTITIES = {
    "device ms": record.device_ms,
    "kernels ms": record.busy_ms,
    "wall ms": record.wall_ms,
    "peak MiB": record.peak_mib,
}


def _quantity(*rows: Row) -> tuple[str, list[float | None]]:
    """What rows are compared by: the first clock that all of them have, else their memory."""
    for unit, value in _QUANTITIES.items():
        values = [value(row) for row in rows]
        if None not in values:
            return unit, values
    return "", [None] * len(rows)


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if not a or b is None else f"{b / a:.3f}"


def comparison(first: Result, second: Result) -> Iterator[ScreenTable | str]:
    """What changed from the first to the second result, ready to print."""
    before, after = ({key(row): row for row in result["rows"]} for result in (first, second))
    if _identity(first) != _identity(second):
        yield "The machines differ: ratios of times compare machines as well."
    if versions := _differing_versions(first["versions"], second["versions"]):
        yield f"Versions differ: {versions}."
    # narrow screens may break a refusal between its words, not within one
    ratio = Column("B / A", min_width=max(map(len, REFUSED.split())))
    table = ScreenTable("suite", "case", "provider", "pass", "A", "B", "unit", ratio)
    for name in [name for name in before if name in after]:
        unit, (a, b) = _quantity(before[name], after[name])
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


def _differing_versions(first: Versions, second: Versions) -> str:
    """Such as "torch 2.11.0 in A and 2.13.0 in B"; empty where none differs."""
    return ", ".join(
        f"{name} {first.get(name) or 'none'} in A and {second.get(name) or 'none'} in B"
        for name in first | second
        if first.get(name) != second.get(name)
    )


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
    cell = number(_quantity(row)[1][0])
    return f"{cell} {_KERNELS}" if by_kernels(row) else cell


_KERNELS = "(kernels)"
_FIGURES: dict[str, str] = {
    "wall ms": "median_ms", "kernels ms": "busy_ms", "launches": "launches", "GB/s": "gb_s",
    "TFLOP/s": "tflop_s", "saved MiB": "saved_mib", "peak MiB": "peak_mib",
}  # fmt: skip


def _details(rows: Sequence[Row]) -> list[str]:
    """Every figure of every row that has times of a device."""
    body = [
        [
            f"{row['case']}, {row['pass']}, {row['provider']}",
            *(
                [REFUSED, *["-"] * len(_FIGURES)]
                if failed(row)
                else [number(row[field]) for field in ("device_ms", *_FIGURES.values())]  # type: ignore[literal-required]
            ),
            number(row["error"]),
        ]
        for row in rows
        if record.on_device(row)
    ]
    return ["", *_markdown(["row", "device ms", *_FIGURES, "error"], body)] if body else []


def markdown(result: Result, goals: Goals) -> str:
    """The result for a README: one line a case, one column a provider, then the summary."""
    rows = [row for row in result["rows"] if row["pass"] not in PARTS]
    table = Table(rows)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = dict.fromkeys((row["case"], row["pass"]) for row in rows)
    several = len({pass_ for _, pass_ in lines}) > 1
    on_device = any(map(record.on_device, rows))
    has_times = all(milliseconds(row) is not None for row in rows)
    unit = "device ms" if on_device else "median ms" if has_times else "peak MiB"
    body = [
        [
            f"{pass_}, {case}" if several else case,
            *(_cell(table.find(case, provider, pass_)) for provider in providers),
        ]
        for case, pass_ in lines
    ]
    machine, versions = result["machine"], result["versions"]
    worst = max((row["error"] for row in rows if row["error"] is not None), default=None)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    about = (
        f"{rows[0]['machine'] if rows else machine['cpu']}; {packages}. "
        f"Largest relative RMS error against fp64: {number(worst)}."
    )
    if on_device:
        products = machine["gemm_tflops_by_dtype"].items()
        rates = ", ".join(f"{dtype} {number(rate)}" for dtype, rate in products)
        about += f" Ceilings: copy {number(machine['copy_gb_s'])} GB/s; GEMM {rates} TFLOP/s."
    if any(map(by_kernels, rows)):
        about += (
            f" {_KERNELS}: the sum over the kernels, because the host could not enqueue the call "
            "ahead of the device, and events would have timed the host."
        )
    summary = [[f"`{name}`", *others] for name, *others in _summary_cells(result["summary"], goals)]
    left_out = [f"- {what}: {why}" for what, why in (result["skipped"] | result["errors"]).items()]
    return "\n".join(
        [
            *_markdown([unit, *providers], body),
            *_details(result["rows"]),
            "",
            *_markdown(_summary_header(goals), summary),
            "",
            about,
            *(["", "Left out:", "", *left_out] if left_out else []),
        ]
    )
