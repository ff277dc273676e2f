# SPDX-License-Identifier: Apache-2.0
"""What a result holds: JSON lines, each with a `kind`. The report needs nothing else.

Tasks are numbered from 1; lists over concepts are in the order of learning. Shares are in [0, 1],
and figures are kept to five significant digits.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as _Field

from stamina_adapters.training.config import describe
from stamina_adapters.training.errors import InputError


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


Figure = Annotated[float, BeforeValidator(_short)]


class Row(BaseModel):
    """A line of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _OfRun(Row):
    method: str
    seed: int


class RunRow(_OfRun):
    """Once in each run: with what it was made."""

    kind: Literal["run"] = "run"
    benchmark: str
    concepts: int
    identities: int
    pictures: int
    training: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    threads: int


class LevelRow(Row):
    """Once for each concept: what methods are compared with.

    accuracy_family   pictures of the family's word on the untouched model
    accuracy_ceiling  the concept learned alone, in full
    """

    kind: Literal["level"] = "level"
    task: int
    concept: str
    family: str | None
    accuracy_family: Figure | None
    accuracy_ceiling: Figure | None
    cosine_ceiling: Figure | None
    mmd_ceiling: Figure | None
    seconds: Figure


class ConceptRow(_OfRun):
    """One concept, right after it was learned.

    accuracy, cosine, mmd  of its own pictures: told as itself; mean cosine to the real centroid;
                           discrepancy to the real ones
    told                   as whom its pictures are told: [identity, how many] pairs
    trained_percent        parameters that were trained, of the model's
    stored_percent         parameters that the model has grown by, of its own: needed to sample
    carried_percent        bytes kept only to learn the next concept, of the model's
    density                share of the adapted weights in its mask; None without masks
    overlap, overlaps      share of its mask that is in any earlier concept's, and in each one's;
                           None and empty where a method keeps no masks
    """

    kind: Literal["concept"] = "concept"
    task: int
    concept: str
    token: str
    family: str | None
    accuracy: Figure
    cosine: Figure
    mmd: Figure
    told: list[tuple[int, int]]
    loss_sampled: Figure
    loss_committed: Figure
    trained_percent: Figure
    stored_percent: Figure
    carried_percent: Figure
    density: Figure | None
    overlap: Figure | None
    overlaps: list[Figure]
    seconds: Figure
    peak_mib: Figure | None


class CheckpointRow(_OfRun):
    """All concepts so far, after task `after`; see `evaluation.metrics` for A_mmd and F_mmd.

    `confusion`: [task shown, identity told, how many], where identities below the number of
    concepts are concepts, counted from 0, and the others distractors.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    after: int
    accuracy: list[Figure]
    cosine: list[Figure]
    a_mmd: Figure
    a_mmd_each: list[Figure]
    f_mmd: Figure | None
    f_mmd_each: list[Figure]
    kid: Figure | None
    confusion: list[tuple[int, int, int]]
    seconds: Figure


class FailedRow(_OfRun):
    """The last row of a run that could not learn task `task`: why. Gone when the run goes on."""

    kind: Literal["failed"] = "failed"
    task: int
    reason: str


class PairRow(_OfRun):
    """Two concepts in one prompt: whose centroid is nearest to the pictures."""

    kind: Literal["pair"] = "pair"
    after: int
    first: int
    second: int
    share_first: Figure
    share_second: Figure
    share_either: Figure


class SummaryRow(_OfRun):
    """The first `concepts` of a run, in one line: means, sums of seconds, the highest peak."""

    kind: Literal["summary"] = "summary"
    concepts: int
    a_mmd: Figure
    f_mmd: Figure | None
    kid: Figure | None
    accuracy_after_learning: Figure
    accuracy_final: Figure
    accuracy_ceiling: Figure | None
    accuracy_family: Figure | None
    chance: Figure
    cosine_final: Figure
    trained_percent: Figure
    stored_percent: Figure
    carried_percent: Figure
    density: Figure | None
    seconds: Figure
    peak_mib: Figure | None


class PictureRow(Row):
    """Small pictures of a task for the report's grids: `data` is WebP in base64.

    `stage`: "real" (no method, no seed), "learned" or "final".
    """

    kind: Literal["picture"] = "picture"
    method: str | None = None
    seed: int | None = None
    stage: Literal["real", "learned", "final"]
    task: int
    concept: str
    data: list[str]


class TuningRow(Row):
    """One trial on the tuning concepts; `picked` marks the settings chosen for the method.

    `failed` says why a trial could not be finished; its figures are None.
    """

    kind: Literal["tuning"] = "tuning"
    method: str
    trial: int
    trials: int
    seed: int
    concepts: int
    settings: dict[str, Any]
    picked: bool
    failed: str | None
    accuracy_after_learning: Figure | None
    accuracy_final: Figure | None
    a_mmd: Figure | None
    f_mmd: Figure | None
    seconds: Figure | None


AnyRow = Annotated[
    RunRow
    | LevelRow
    | ConceptRow
    | CheckpointRow
    | FailedRow
    | PairRow
    | SummaryRow
    | PictureRow
    | TuningRow,
    _Field(discriminator="kind"),
]
_ANY: TypeAdapter[AnyRow] = TypeAdapter(AnyRow)


def to_line(row: BaseModel) -> str:
    """A row as one line of JSON with its end."""
    values = row.model_dump(mode="json")
    return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False) + "\n"


def from_line(line: str) -> AnyRow:
    """A row from its line. Raises pydantic's `ValidationError`, a `ValueError`."""
    return _ANY.validate_json(line)


def read_rows(files: Iterable[Path], argument: str) -> Iterator[AnyRow]:
    """The rows of files, in their order. Raises `InputError` for a line that is no row."""
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{argument}: {str(file)!r} cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            try:
                yield from_line(line)
            except ValidationError as error:
                reason = describe(error).splitlines()[0][:200]
                raise InputError(
                    f"{argument}: {str(file)!r} line {number} is no result row ({reason})"
                ) from error
