# SPDX-License-Identifier: Apache-2.0
"""`scale`: concepts already learned, ranks, and the shapes of four models."""

from collections.abc import Sequence
from functools import partial

from benchmarks.cases import (
    CONCEPT_LAYER,
    CONCEPTS,
    CONCEPTS_UNIT,
    RANKS,
    SHAPES,
    STACKED,
    LinearCase,
)
from benchmarks.measure import Key
from benchmarks.problem import Problem, committed, make_problem
from benchmarks.record import Row
from benchmarks.rivals import RIVALS, Contestant, peft_lora
from benchmarks.suites.suite import Outcome, Settings, Suite, Task, build, compete, why_missing
from benchmarks.summary import Summary, Table, mean_ratio
from stamina_kernels import fold_

ROUNDS, QUICK_ROUNDS = 25, 3
CONCEPT_ROUNDS = 200  # a ratio is to be known within 5 per cent on a machine that others share
RANK_RIVALS = ("ours", "eager", "peft", "dense")
SHAPE_RIVALS = ("ours", "eager", "gumbel", "peft", "loha", "dense")


def concepts_case(count: int) -> str:
    return f"{count} {CONCEPTS_UNIT}"


def _learned(count: int, device: str) -> Problem:
    """A layer into which `count` finished concepts are folded, about to learn the next one."""
    problem = make_problem(CONCEPT_LAYER, device)
    (projection,) = problem.group
    weight = projection.weight_init
    assert weight is not None
    folded = weight.clone()
    (out,) = CONCEPT_LAYER.outs
    fold_([folded], [weight], [[committed(CONCEPT_LAYER.inner, out, device) for _ in range(count)]])
    problem.group[0] = projection._replace(weight=folded)
    return problem


def _run_concepts(settings: Settings) -> Outcome:
    """A step of ours after many concepts, and of PEFT LoRA with as many adapters active."""
    counts, stacks = (CONCEPTS[::3], STACKED[:2]) if settings.quick else (CONCEPTS, STACKED)
    contestants: dict[Key, Contestant] = {
        (concepts_case(count), "ours"): RIVALS["ours"].build(_learned(count, settings.device))
        for count in counts
    }
    if RIVALS["peft"].missing(settings.device) is None:
        problem = make_problem(CONCEPT_LAYER, settings.device)
        contestants |= {
            (concepts_case(count), "peft"): peft_lora(problem, adapters=count) for count in stacks
        }
    rounds = QUICK_ROUNDS if settings.quick else CONCEPT_ROUNDS
    errors: dict[str, str] = {}
    return Outcome(compete(contestants, rounds, settings.device, errors), errors=errors)


def _run_case(case: LinearCase, rivals: Sequence[str], settings: Settings) -> Outcome:
    errors: dict[str, str] = {}
    contestants = build(case, rivals, settings.device, errors)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    return Outcome(compete(contestants, rounds, settings.device, errors), errors=errors)


def _tasks(settings: Settings) -> list[Task]:
    groups = ((RANKS, RANK_RIVALS), (SHAPES, SHAPE_RIVALS))
    chosen = [
        (case, rivals)
        for registry, rivals in groups
        for case in (registry[:1] if settings.quick else registry)
    ]
    named = {case.name: (case, rivals) for case, rivals in chosen}
    return [Task("concepts learned", partial(_run_concepts, settings))] + [
        Task(name, partial(_run_case, case, rivals, settings))
        for name, (case, rivals) in named.items()
    ]


def _summary(rows: list[Row]) -> Summary:
    """The last count of concepts over the first: a step of ours, and one of stacked LoRA."""
    table = Table(rows)

    def growth(provider: str, last: int) -> float | None:
        return mean_ratio(
            [provider],
            lambda name: table.find(concepts_case(last), name),
            lambda name: table.find(concepts_case(1), name),
        )

    return {
        "scale.step_1000_over_1": growth("ours", CONCEPTS[-1]),
        "scale.peft_50_over_1": growth("peft", STACKED[-1]),
    }


SUITE = Suite(
    "scale",
    "1 to 1000 concepts learned, ranks 4 to 128, shapes of SD 1.5, SDXL, SD 3 and Flux",
    why_missing(SHAPE_RIVALS),
    _tasks,
    _summary,
)
