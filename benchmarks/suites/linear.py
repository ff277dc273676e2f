# SPDX-License-Identifier: Apache-2.0
"""`linear`: one projection. `group`: K and V together, in one call and separately."""

from collections.abc import Sequence
from functools import partial

from benchmarks import cases
from benchmarks.cases import BY_NAME, LinearCase, as_dtype
from benchmarks.measure import Key
from benchmarks.record import Row
from benchmarks.rivals import Contestant
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, build, compete, why_missing
from benchmarks.summary import Summary, Table, geometric_mean, mean_ratio, speedup

ROUNDS, QUICK_ROUNDS = 25, 3
EAGER = ("eager", "eager.compile")
LINEAR_RIVALS = (
    "ours", "gumbel", "gumbel.compile", *EAGER, "peft", "loha", "dense", "frozen",
)  # fmt: skip
GROUP_RIVALS = ("ours.separate", *LINEAR_RIVALS)
HALF_RIVALS = ("ours", "dense", "frozen")
HALF_DTYPES = ("bf16", "fp16")
_COMPILED = ("gumbel.compile", "eager.compile")


def run_case(
    case: LinearCase, rivals: Sequence[str], halves: Sequence[str], settings: Settings
) -> Outcome:
    """The case with all rivals in fp32, and some of them with 16-bit weights and X, interleaved."""
    entries = [(case, rivals)]
    entries += [(as_dtype(case, dtype), HALF_RIVALS) for dtype in halves]
    contestants: dict[Key, Contestant] = {}
    errors: dict[str, str] = {}
    for entry, names in entries:
        contestants |= build(entry, names, settings.device, errors)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    return Outcome(compete(contestants, rounds, settings.device, errors), errors=errors)


def _tasks(
    settings: Settings,
    registry: Sequence[LinearCase],
    rivals: Sequence[str],
    halves: Sequence[str],
) -> list[Task]:
    if settings.quick:  # compiling one shape takes longer than all else
        registry, rivals = registry[:1], [name for name in rivals if name not in _COMPILED]
    return [Task(case.name, partial(run_case, case, rivals, halves, settings)) for case in registry]


def _dtype_ratios(table: Table, cases32: Sequence[str]) -> Summary:
    """Step in 16 bits over step in fp32: ours, and the plain trainable layer's own."""
    ratios: Summary = {}
    for dtype in HALF_DTYPES:
        for key, provider in (("dtype_ratio", "ours"), ("gemm_ratio", "dense")):
            ratios[f"{key}.{dtype}"] = mean_ratio(
                cases32,
                lambda case, d=dtype, p=provider: table.find(as_dtype(BY_NAME[case], d).name, p),  # type: ignore[misc]
                lambda case, p=provider: table.find(case, p),  # type: ignore[misc]
            )
    return ratios


def _saved_bits(table: Table, names: Sequence[str]) -> float | None:
    rows = [row for name in names if (row := table.find(name, "ours"))]
    return geometric_mean(
        row["saved_mib"] * 8 * 2**20 / BY_NAME[row["case"]].weights
        for row in rows
        if row["saved_mib"]
    )


def fp32_cases(table: Table) -> list[str]:
    """Cases in fp32: the others do not enter the means over rivals."""
    return [name for name in table.cases if BY_NAME[name].dtype == "fp32"]


def summarise(rows: list[Row]) -> Summary:
    """Speed-ups over rivals, the ratio to the dense floor and the bits saved per weight."""
    table = Table(rows)
    names = fp32_cases(table)
    return {
        "speedup.gumbel": speedup(table, names, ["gumbel"]),
        "speedup.eager_best": speedup(table, names, EAGER),
        "speedup.loha": speedup(table, names, ["loha"]),
        "floor_ratio": mean_ratio(
            names, lambda case: table.find(case, "ours"), lambda case: table.find(case, "dense")
        ),
        "saved_bits_per_weight": _saved_bits(table, names),
    }


def _linear_summary(rows: list[Row]) -> Summary:
    table = Table(rows)
    return summarise(rows) | _dtype_ratios(table, fp32_cases(table))


def _group_summary(rows: list[Row]) -> Summary:
    table = Table(rows)
    separate = speedup(table, table.cases, ["ours.separate"])
    return {f"group.{key}": value for key, value in summarise(rows).items()} | {
        "group.speedup.separate": separate
    }


LINEAR_SUITE = Suite(
    "linear",
    "one projection: forward, backward and step, beside every rival and in 16 bits",
    why_missing(LINEAR_RIVALS),
    lambda settings: _tasks(settings, cases.LINEAR, LINEAR_RIVALS, HALF_DTYPES),
    _linear_summary,
    slow=_COMPILED,
)
GROUP_SUITE = Suite(
    "group",
    "K and V of a block in one call, in two, and beside every rival",
    why_missing(GROUP_RIVALS),
    lambda settings: _tasks(settings, cases.GROUP, GROUP_RIVALS, ()),
    _group_summary,
    slow=_COMPILED,
)
