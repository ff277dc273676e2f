# SPDX-License-Identifier: Apache-2.0
"""The concepts of a specification with their pictures, checked before anything is trained."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stamina_adapters.continual.spec import BenchmarkSpec, EmbeddedConcepts, FolderConcepts
from stamina_adapters.embedded import Identity, heldout_identities
from stamina_adapters.embedded.pictures import (
    REAL_PICTURES_SEED,
    TRAINING_PICTURES_SEED,
    pictures,
)
from stamina_adapters.training.config import (
    ConceptSpec,
    load_concepts_list,
    pictures_argument,
)
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.errors import InputError


@dataclass(frozen=True)
class Concept:
    """A task: how it is named and prompted, what it is learned from and compared with."""

    name: str
    family: str | None
    spec: ConceptSpec
    dataset: ConceptDataset
    real: list[Image.Image]


@dataclass(frozen=True)
class Material:
    """The concepts in the order of learning, and real pictures of the distractors."""

    concepts: list[Concept]
    others: list[list[Image.Image]]

    def digest(self) -> str:
        """SHA-256 over names, prompts and every picture."""
        found = hashlib.sha256()
        for concept in self.concepts:
            found.update(f"{concept.name}\n{concept.spec.instance_prompt}\n".encode())
            _add(found, concept.dataset.images)
            _add(found, concept.real)
        for images in self.others:
            _add(found, images)
        return found.hexdigest()


def _add(found: "hashlib._Hash", images: Sequence[Image.Image]) -> None:
    for image in images:
        found.update(f"{image.size}".encode())
        found.update(image.tobytes())


def embedded_identities(
    concepts: EmbeddedConcepts, tuning: bool
) -> tuple[list[Identity], list[Identity]]:
    """The identities to learn and the distractors; while tuning, none that is ever evaluated."""
    held = heldout_identities()
    sequence = [i for i in held if i.split == "sequence"]
    end = concepts.start + concepts.count
    evaluated, after = sequence[concepts.start : end], sequence[end:]
    before = sequence[: concepts.start][::-1]
    of_tuning = [i for i in held if i.split == "tuning"]
    rest = [i for i in held if i.split == "distractor"]
    learned = of_tuning[: concepts.tuning] if tuning else evaluated
    spare = [*rest, *of_tuning[concepts.tuning :], *after] if tuning else [*after, *rest]
    others = [*spare, *before]
    wanted = concepts.identities - len(learned)
    if wanted > len(others):
        raise InputError(
            f"--sequence: identities {concepts.identities} leaves too few distractors that are "
            f"not evaluated; there are {len(learned) + len(others)}"
        )
    return learned, others[:wanted]


def _embedded(spec: BenchmarkSpec, concepts: EmbeddedConcepts, tuning: bool) -> Material:
    learned, others = embedded_identities(concepts, tuning)
    made = []
    for number, identity in enumerate(learned, 1):
        token = f"<v{number}>"
        made.append(
            Concept(
                name=identity.id,
                family=identity.family,
                spec=ConceptSpec(
                    instance_prompt=spec.prompts.concept.format(token=token),
                    instance_data_dir=Path(identity.id),
                    token=token,
                ),
                dataset=ConceptDataset(
                    pictures(identity, concepts.pictures, TRAINING_PICTURES_SEED)
                ),
                real=pictures(identity, concepts.real_pictures, REAL_PICTURES_SEED),
            )
        )
    distractors = [pictures(i, concepts.real_pictures, REAL_PICTURES_SEED) for i in others]
    return Material(made, distractors)


def _folders(spec: FolderConcepts, tuning: bool) -> Material:
    file = spec.tuning_list if tuning else spec.concepts_list
    if file is None:
        raise InputError("--sequence: tuning_list is missing; name concepts to tune on")
    entries = load_concepts_list(file, file.parent)
    if tuning:
        listed = load_concepts_list(spec.concepts_list, spec.concepts_list.parent)
        evaluated = {one.instance_data_dir.resolve() for one in listed}
        for entry in entries:
            if entry.instance_data_dir.resolve() in evaluated:
                raise InputError(
                    f"--sequence: {str(entry.instance_data_dir)!r} is in tuning_list and in "
                    "concepts_list; tune on concepts that are not evaluated"
                )
    if len(entries) < 2:
        raise InputError(
            f"--concepts_list {str(file)!r}: needs at least two concepts to tell apart"
        )
    families = () if tuning else spec.families
    if families and len(families) != len(entries):
        raise InputError(
            f"--sequence: families has {len(families)} words for {len(entries)} concepts"
        )
    made = []
    for index, entry in enumerate(entries):
        where = pictures_argument(index, file)
        dataset = ConceptDataset.from_folder(entry.instance_data_dir, where)
        family = families[index] if families else None
        made.append(Concept(entry.name, family, entry, dataset, dataset.images))
    return Material(made, [])


def load_material(spec: BenchmarkSpec, tuning: bool = False) -> Material:
    """The concepts to evaluate, or those to tune on. Raises `InputError` for unusable pictures."""
    if isinstance(spec.concepts, EmbeddedConcepts):
        return _embedded(spec, spec.concepts, tuning)
    return _folders(spec.concepts, tuning)
