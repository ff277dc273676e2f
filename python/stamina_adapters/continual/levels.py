# SPDX-License-Identifier: Apache-2.0
"""What every method is compared with, once for each concept: the family's word, and the ceiling.

Both depend on the specification alone, so they are computed once for all methods and seeds and
kept in the output folder.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stamina_adapters.continual.materials import Concept, Material
from stamina_adapters.continual.rows import LevelRow, PictureRow
from stamina_adapters.continual.score import concept_scores
from stamina_adapters.continual.spec import BenchmarkSpec
from stamina_adapters.continual.store import RowLog
from stamina_adapters.continual.studio import Studio
from stamina_adapters.continual.thumbnails import encode
from stamina_adapters.embedded.ceiling import train_ceiling
from stamina_adapters.evaluation.judge import Judge

CEILING_PROMPT = "a photo of <v>"


def _families(
    pipe: Any, spec: BenchmarkSpec, studio: Studio, concepts: list[Concept]
) -> dict[str, list[Image.Image]]:
    words = list(dict.fromkeys(c.family for c in concepts if c.family is not None))
    if not words:
        return {}
    prompts = [spec.prompts.family.format(family=word) for word in words]
    return dict(zip(words, studio.draw(pipe, prompts, "families, draw"), strict=True))


def _ceiling(
    pipe: Any, spec: BenchmarkSpec, studio: Studio, concept: Concept, title: str
) -> list[Image.Image]:
    assert spec.ceiling is not None
    images = np.stack([np.asarray(image) for image in concept.dataset.images])
    settings = spec.ceiling.model_dump()
    taught = train_ceiling(pipe, images, like=concept.family or "face", **settings)
    return studio.draw(taught, [CEILING_PROMPT], f"{title}, draw")[0]


def find_levels(
    pipe: Any,
    spec: BenchmarkSpec,
    material: Material,
    judge: Judge,
    studio: Studio,
    file: Path,
    on_level: Callable[[], None] = lambda: None,
) -> list[LevelRow]:
    """The level of every concept, from `file` where it is known; `pipe` is left as it was.

    Also writes the real pictures of the tasks that the report shows.
    """
    log = RowLog(file)
    known = {row.task: row for row in log.rows if isinstance(row, LevelRow)}
    pictured = {row.task for row in log.rows if isinstance(row, PictureRow)}
    for task in spec.shown:
        if task not in pictured:
            concept = material.concepts[task - 1]
            data = encode(concept.dataset.images[: spec.shown_pictures])
            log.append(PictureRow(stage="real", task=task, concept=concept.name, data=data))
    missing = [task for task in range(1, len(material.concepts) + 1) if task not in known]
    families = _families(pipe, spec, studio, material.concepts) if missing else {}
    for task in range(1, len(material.concepts) + 1):
        if task not in known:
            concept = material.concepts[task - 1]
            title = f"ceiling {task}/{len(material.concepts)}"
            row = _level(pipe, spec, judge, studio, families, concept, task, title)
            log.append(row)
            known[task] = row
        on_level()
    return [known[task] for task in sorted(known)]


def _level(
    pipe: Any,
    spec: BenchmarkSpec,
    judge: Judge,
    studio: Studio,
    families: dict[str, list[Image.Image]],
    concept: Concept,
    task: int,
    title: str,
) -> LevelRow:
    started = time.perf_counter()
    alone: dict[str, Any] = {"accuracy": None, "cosine": None, "mmd": None}
    if spec.ceiling is not None:
        embeddings = judge.embedder.embed(_ceiling(pipe, spec, studio, concept, title))
        alone = concept_scores(judge, embeddings, task - 1)
    family = None
    if concept.family is not None:
        family = judge.accuracy(families[concept.family], task - 1)
    return LevelRow(
        task=task,
        concept=concept.name,
        family=concept.family,
        accuracy_family=family,
        accuracy_ceiling=alone["accuracy"],
        cosine_ceiling=alone["cosine"],
        mmd_ceiling=alone["mmd"],
        seconds=time.perf_counter() - started,
    )
