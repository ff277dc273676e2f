# SPDX-License-Identifier: Apache-2.0
"""The embedded model and its concepts, as the commands use them."""

from pathlib import Path

from stamina_adapters.cli.workspace import write_png
from stamina_adapters.embedded import Identity, assets_dir, heldout_identities
from stamina_adapters.embedded.pictures import TRAINING_PICTURES_SEED, pictures
from stamina_adapters.training.config import ConceptSpec
from stamina_adapters.training.errors import InputError

CONCEPTS = 5
PICTURES = 12


def model_path() -> Path:
    """The embedded model's folder. Raises `InputError` when the installation lacks it."""
    folder = assets_dir()
    if not folder.is_dir():
        raise InputError(
            f"embedded model: {str(folder)!r} is missing; reinstall the package, "
            "or make the model with stamina pretrain"
        )
    return folder


def sequence_identities() -> list[Identity]:
    """The identities of the embedded concepts, faces and landmarks in turn."""
    return [i for i in heldout_identities() if i.split == "sequence"][:CONCEPTS]


def embedded_concepts(folder: Path) -> list[ConceptSpec]:
    """The embedded concepts, their pictures in folders of `folder` that are yet to be written."""
    return [
        ConceptSpec(
            instance_prompt=f"a photo of <v{number}>", instance_data_dir=folder / identity.id
        )
        for number, identity in enumerate(sequence_identities(), 1)
    ]


def write_embedded_images(concepts: list[ConceptSpec]) -> None:
    """Write the pictures that `embedded_concepts` promised, as PNG."""
    for concept, identity in zip(concepts, sequence_identities(), strict=True):
        concept.instance_data_dir.mkdir(parents=True)
        for number, picture in enumerate(pictures(identity, PICTURES, TRAINING_PICTURES_SEED)):
            write_png(concept.instance_data_dir / f"{number:02d}.png", picture)
