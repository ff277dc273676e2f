# SPDX-License-Identifier: Apache-2.0
"""Rows from embeddings: what was learned, what is left of it, and a run in one line."""

from collections.abc import Sequence
from typing import Any

import torch

from stamina_adapters.continual.rows import CheckpointRow, ConceptRow, LevelRow, PairRow, SummaryRow
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.evaluation.kid import kid
from stamina_adapters.evaluation.metrics import mmd_each, polynomial_mmd


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values, None where any is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def concept_scores(judge: Judge, embeddings: torch.Tensor, concept: int) -> dict[str, Any]:
    """The figures of a `ConceptRow` that come from the pictures of concept `concept` alone."""
    return {
        "accuracy": judge.centroids.accuracy(embeddings, concept),
        "cosine": judge.cosine(embeddings, concept),
        "mmd": polynomial_mmd(judge.real[concept], embeddings),
        "told": sorted(judge.told(embeddings).items()),
    }


def checkpoint_row(
    judge: Judge,
    learned: Sequence[torch.Tensor],
    now: Sequence[torch.Tensor],
    **labels: Any,
) -> CheckpointRow:
    """All concepts so far: `learned` right after each was, `now` after the last one.

    `now`'s last entry may be `learned`'s: nothing was learned in between. KID is of all real and
    all generated pictures together.
    """
    each = range(len(now))
    drift = mmd_each(learned[: len(now) - 1], now[:-1])
    distance = mmd_each(judge.real[: len(now)], now)
    return CheckpointRow(
        after=len(now),
        accuracy=[judge.centroids.accuracy(now[k], k) for k in each],
        cosine=[judge.cosine(now[k], k) for k in each],
        a_mmd=mean(distance),
        a_mmd_each=distance,
        f_mmd=mean(drift) if drift else None,
        f_mmd_each=drift,
        kid=kid(torch.cat(judge.real[: len(now)]), torch.cat(list(now))),
        confusion=[
            (k + 1, told, count) for k in each for told, count in sorted(judge.told(now[k]).items())
        ],
        **labels,
    )


def pair_row(
    judge: Judge, embeddings: torch.Tensor, first: int, second: int, **labels: Any
) -> PairRow:
    """Pictures of two concepts, counted from 0, in one prompt."""
    share = [judge.centroids.accuracy(embeddings, k) for k in (first, second)]
    return PairRow(
        first=first + 1,
        second=second + 1,
        share_first=share[0],
        share_second=share[1],
        share_either=sum(share),
        **labels,
    )


def chosen_pairs(concepts: int, pairs: int) -> list[tuple[int, int]]:
    """Up to `pairs` neighbours (k, k + 1), spread over the sequence, none in two pairs."""
    places = concepts // 2
    count = min(pairs, places)
    starts = [2 * (k * places // count) for k in range(count)]
    return [(start, start + 1) for start in starts]


def _peak(rows: Sequence[ConceptRow]) -> float | None:
    """The highest peak, without the first concept's: it has what libraries allocate once."""
    known = [row.peak_mib for row in rows[1:] or rows if row.peak_mib is not None]
    return max(known, default=None)


def summary_row(
    concepts: Sequence[ConceptRow],
    checkpoint: CheckpointRow,
    levels: Sequence[LevelRow],
    chance: float,
) -> SummaryRow:
    """A checkpoint with the concepts until it, and their levels where those are known."""
    count = checkpoint.after
    first = list(concepts[:count])
    known = {level.task: level for level in levels}
    own = [known.get(task) for task in range(1, count + 1)]
    return SummaryRow(
        method=checkpoint.method,
        seed=checkpoint.seed,
        concepts=count,
        a_mmd=checkpoint.a_mmd,
        f_mmd=checkpoint.f_mmd,
        kid=checkpoint.kid,
        accuracy_after_learning=mean([row.accuracy for row in first]),
        accuracy_final=mean(checkpoint.accuracy),
        accuracy_ceiling=mean_known([None if x is None else x.accuracy_ceiling for x in own]),
        accuracy_family=mean_known([None if x is None else x.accuracy_family for x in own]),
        chance=chance,
        cosine_final=mean(checkpoint.cosine),
        trained_percent=mean([row.trained_percent for row in first]),
        stored_percent=first[-1].stored_percent,
        carried_percent=first[-1].carried_percent,
        density=mean_known([row.density for row in first]),
        seconds=sum(row.seconds for row in first),
        peak_mib=_peak(first),
    )
