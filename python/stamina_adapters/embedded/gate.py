# SPDX-License-Identifier: Apache-2.0
"""The gate of the embedded model: what must hold before any method is tuned on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from tqdm import tqdm

from stamina_adapters.embedded import world
from stamina_adapters.embedded.captions import full_caption
from stamina_adapters.embedded.ceiling import load_pipeline, sample, train_ceiling
from stamina_adapters.embedded.data import to_unit
from stamina_adapters.embedded.encoder import (
    Encoder,
    attribute_table,
    centroids,
    read_encoder,
    retrieval,
)

RECONSTRUCTION_BOUND = 0.95
CEILING_BOUND = 0.8
# Words that a caption leaves out: they name the lack of something.
_SILENT = ("none", "neutral")


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderTiny, images: np.ndarray, batch: int = 128) -> np.ndarray:
    """Pictures through the autoencoder: ``uint8 [n, h, w, 3]`` to floating point in [0, 1]."""
    pictures = torch.as_tensor(images).permute(0, 3, 1, 2)
    parts = [
        autoencoder.decode(autoencoder.encode(to_unit(part)).latents).sample
        for part in pictures.split(batch)
    ]
    whole = (torch.cat(parts) * 0.5 + 0.5).clamp(0.0, 1.0)
    return whole.permute(0, 2, 3, 1).contiguous().numpy()


def check_reconstruction(
    autoencoder: AutoencoderTiny, encoder: Encoder, identities: list[world.Identity]
) -> dict[str, float]:
    """Retrieval of identities from real pictures and from their reconstructions.

    Centroids come from 8 real pictures of each identity, queries from 8 others.
    """
    bank = centroids(encoder, identities)
    real = np.concatenate([world.render(identity, 8, seed=2_000) for identity in identities])
    answer = torch.arange(len(identities)).repeat_interleave(8)
    rebuilt = reconstruct(autoencoder, real)
    error = np.square(rebuilt - real / 255.0).reshape(len(real), -1).mean(1)
    return {
        "identities": len(identities),
        "retrieval_real": retrieval(encoder, real, answer, bank),
        "retrieval_reconstructed": retrieval(encoder, rebuilt, answer, bank),
        "psnr_db": float((-10.0 * np.log10(error)).mean()),
    }


def _prompts(family: str) -> dict[str, list[tuple[int, str]]]:
    """For every attribute, each value that captions name, with captions that name it."""
    out: dict[str, list[tuple[int, str]]] = {}
    kinds = world.attributes("landmark")["kind"]
    for name, words in {**world.attributes(family), **world.nuisance(family)}.items():
        rows = []
        for value, word in enumerate(words):
            if word in _SILENT:
                continue
            told = {name: word}
            if name == "hat_colour":
                told["hat"] = ("cap", "crown", "beanie")[value % 3]
            if family == "landmark" and name != "kind":
                told["kind"] = kinds[value % len(kinds)]
            rows.append((value, full_caption(family, told)))
        out[name] = rows
    return out


def check_attributes(
    pipe: StableDiffusionPipeline, encoder: Encoder, samples: int, seed: int
) -> dict[str, dict[str, float]]:
    """How often samples show what the prompt names, per attribute, as the encoder reads it.

    Each row holds ``accuracy``, the encoder's accuracy on real held-out pictures (``real``) and
    ``chance`` (one over the number of words).
    """
    table = attribute_table()
    report = {}
    for family in world.FAMILIES:
        real = _real_accuracy(encoder, family)
        for name, rows in tqdm(_prompts(family).items(), desc=f"{family} prompts"):
            prompts = [caption for _, caption in rows for _ in range(samples)]
            answer = torch.tensor([value for value, _ in rows]).repeat_interleave(samples)
            read = encoder.attributes(sample(pipe, prompts, seed))[f"{family}.{name}"].argmax(1)
            report[f"{family}.{name}"] = {
                "accuracy": float((read == answer).float().mean()),
                "real": real[name],
                "chance": 1.0 / len(table[f"{family}.{name}"]),
            }
    return report


def _real_accuracy(encoder: Encoder, family: str) -> dict[str, float]:
    people = [i for i in world.heldout_identities() if i.family == family]
    drawn = [world.sample_identity(identity, 4, seed=3_000) for identity in people]
    read = encoder.attributes(torch.cat([s.render() for s in drawn]))
    truth = torch.cat([torch.cat((s.discrete, s.varied), 1) for s in drawn])
    names = [*world.attributes(family), *world.nuisance(family)]
    out = {}
    for column, name in enumerate(names):
        right = read[f"{family}.{name}"].argmax(1) == truth[:, column]
        if name == "hat_colour":
            right = right[truth[:, names.index("hat")] > 0]
        out[name] = float(right.float().mean())
    return out


def check_ceiling(
    pipe: StableDiffusionPipeline,
    encoder: Encoder,
    concepts: list[world.Identity],
    bank: list[world.Identity],
    images: int = 16,
    samples: int = 16,
    seed: int = 0,
    **training: Any,
) -> dict[str, Any]:
    """Identity accuracy of each concept's samples among ``bank``, concepts learned one by one.

    Args:
        pipe: the base pipeline in fp32; left as it was.
        encoder: the metric encoder.
        concepts: what to learn; each must be in ``bank``.
        bank: the identities to tell apart, by centroids of real pictures.
        images: training pictures a concept.
        samples: pictures sampled after learning.
        seed: decides pictures, training and samples.
        training: further arguments of `train_ceiling`.
    """
    centres = centroids(encoder, bank)
    rows = {}
    for concept in tqdm(concepts, desc="ceiling"):
        shown = world.render(concept, images, seed=4_000 + seed)
        taught = train_ceiling(pipe, shown, like=concept.family, seed=seed, **training)
        drawn = sample(taught, ["a photo of <v>"] * samples, seed)
        answer = torch.full((samples,), [i.id for i in bank].index(concept.id))
        rows[concept.id] = retrieval(encoder, drawn, answer, centres)
    return {
        "among": len(bank),
        "images": images,
        "samples": samples,
        "mean": float(np.mean(list(rows.values()))),
        "concepts": rows,
    }


def check(
    model_dir: Path,
    samples: int = 8,
    ceiling_concepts: int = 10,
    seed: int = 0,
    report_path: Path | None = None,
) -> dict[str, Any]:
    """Measure the gate of a model folder (a pipeline with the encoder in ``encoder``).

    Args:
        model_dir: the folder.
        samples: samples for each attribute value.
        ceiling_concepts: held-out concepts of the ceiling, of both families in turn.
        seed: decides every sample.
        report_path: where to write the result as JSON; None writes nothing.

    Returns:
        ``reconstruction``, ``attributes`` and ``ceiling`` with their bounds, and ``passed``.

    Raises:
        FileNotFoundError: ``model_dir`` holds no pipeline.
    """
    if not (model_dir / "model_index.json").exists():
        raise FileNotFoundError(f"model_dir {model_dir} holds no model_index.json")
    pipe = load_pipeline(model_dir)
    encoder = read_encoder(model_dir / "encoder")
    sequence = [i for i in world.heldout_identities() if i.split == "sequence"]
    reconstruction: dict[str, Any] = check_reconstruction(pipe.vae, encoder, sequence)
    reconstruction["bound"] = RECONSTRUCTION_BOUND
    ceiling = check_ceiling(pipe, encoder, sequence[:ceiling_concepts], sequence[:50], seed=seed)
    ceiling["bound"] = CEILING_BOUND
    report = {
        "reconstruction": reconstruction,
        "attributes": check_attributes(pipe, encoder, samples, seed),
        "ceiling": ceiling,
        "passed": reconstruction["retrieval_reconstructed"] >= RECONSTRUCTION_BOUND
        and ceiling["mean"] >= CEILING_BOUND,
    }
    if report_path is not None:
        part = report_path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(part, report_path)
    return report
