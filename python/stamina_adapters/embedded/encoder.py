# SPDX-License-Identifier: Apache-2.0
"""The image encoder of the metrics: which identity, and which attributes, a picture shows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stamina_adapters.embedded import world
from stamina_adapters.embedded.data import cached, to_unit
from stamina_adapters.embedded.training import FlatTrainer, Schedule, fit, generator_at

VIEWS = 4
IDENTITIES_PER_CHUNK = 64
TEMPERATURE = 0.1
SCHEDULE = Schedule(
    steps=1500, rate=1.5e-3, warmup=100, decay=0.6, ema=0.995, weight_decay=0.02, save_every=200
)


def attribute_table() -> dict[str, tuple[str, ...]]:
    """Every attribute the encoder reads: ``family``, then ``face.hair`` and so on."""
    table: dict[str, tuple[str, ...]] = {"family": world.FAMILIES}
    for family in world.FAMILIES:
        for name, words in {**world.attributes(family), **world.nuisance(family)}.items():
            table[f"{family}.{name}"] = words
    return table


class Encoder(nn.Module):
    """A small convolutional network for 64 x 64 pictures.

    Args:
        widths: channels of the four stride-2 stages.
        features: width of the layer that the attribute heads read.
        dimension: width of the embedding.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 96, 64),
        features: int = 160,
        dimension: int = 96,
    ) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "features": features, "dimension": dimension}
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [
                nn.Conv2d(before, width, 5 if before == 3 else 3, 2, 2 if before == 3 else 1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            before = width
        self.convolutions = nn.Sequential(*layers)
        self.trunk = nn.Linear(before * (world.SIZE // 2 ** len(widths)) ** 2, features)
        self.embedding = nn.Linear(features, dimension)
        self.heads = nn.Linear(features, sum(len(words) for words in attribute_table().values()))

    def features(self, images: Tensor) -> Tensor:
        """Features ``[n, features]`` of pictures in [-1, 1], ``[n, 3, 64, 64]``."""
        return F.silu(self.trunk(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (not normalised) and the logits of all attributes, side by side."""
        features = self.features(images)
        return self.embedding(features), self.heads(features)

    @torch.no_grad()
    def embed(self, images: Tensor | np.ndarray, batch: int = 256) -> Tensor:
        """Unit-length embeddings ``[n, dimension]``.

        Args:
            images: ``uint8`` in 0..255 or floating point in [0, 1], ``[n, 3, 64, 64]`` or
                ``[n, 64, 64, 3]``.
            batch: pictures at a time.

        Raises:
            ValueError: another shape or dtype.
        """
        return torch.cat([F.normalize(self(p)[0], dim=-1) for p in _prepare(images, batch)])

    @torch.no_grad()
    def attributes(self, images: Tensor | np.ndarray, batch: int = 256) -> dict[str, Tensor]:
        """Log probabilities of every attribute's values, by the names of `attribute_table`.

        Arguments and errors as in `embed`. Each value is ``[n, number of words]``.
        """
        logits = torch.cat([self(p)[1] for p in _prepare(images, batch)])
        table = attribute_table()
        parts = logits.split([len(words) for words in table.values()], dim=1)
        return {name: part.log_softmax(1) for name, part in zip(table, parts, strict=True)}

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))
        part = folder / "model.part"
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, part)
        os.replace(part, folder / "model.safetensors")


def _prepare(images: Tensor | np.ndarray, batch: int) -> list[Tensor]:
    pictures = torch.as_tensor(images)
    size = world.SIZE
    if pictures.ndim == 4 and pictures.shape[1:] == (size, size, 3):
        pictures = pictures.permute(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1:] != (3, size, size):
        raise ValueError(
            f"images must be [n, 3, {size}, {size}] or [n, {size}, {size}, 3], "
            f"not {list(pictures.shape)}"
        )
    if pictures.dtype == torch.uint8:
        return [to_unit(part) for part in pictures.split(batch)]
    if not pictures.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, not {pictures.dtype}")
    return [part.float() * 2.0 - 1.0 for part in pictures.split(batch)]


def read_encoder(folder: Path) -> Encoder:
    """Load an encoder written by `Encoder.save`, in fp32 and evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    model = Encoder(tuple(config["widths"]), config["features"], config["dimension"])
    model.load_state_dict(
        {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    )
    return model.eval().requires_grad_(False)


def _pair_sample(seed: int, index: int) -> world.Sample:
    return world.draw_training_sample(
        world.FAMILIES[index % 2],
        IDENTITIES_PER_CHUNK,
        generator_at(seed, "pairs", index),
        views=VIEWS,
    )


def _targets(seed: int, chunks: int) -> Tensor:
    """Attribute values of every cached picture, -1 where the family lacks the attribute."""
    rows = []
    names = list(attribute_table())
    for index in range(chunks):
        sample = _pair_sample(seed, index)
        row = torch.full((len(sample.discrete), len(names)), -1)
        row[:, 0] = world.FAMILIES.index(sample.family)
        columns = torch.cat((sample.discrete, sample.varied), 1)
        first = next(k for k, name in enumerate(names) if name.startswith(sample.family + "."))
        row[:, first : first + columns.shape[1]] = columns
        if sample.family == "face":
            # What does not show cannot be read: the colour of no hat, of no hair.
            hat = names.index("face.hat")
            row[:, names.index("face.hat_colour")][row[:, hat] == 0] = -1
        rows.append(row)
    return torch.cat(rows)


def contrastive_loss(left: Tensor, right: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent of two views ``[n, d]``: each row's partner among all the other 2n - 1 rows."""
    both = F.normalize(torch.cat((left, right)).float(), dim=-1)
    scores = both @ both.T / temperature
    scores.fill_diagonal_(float("-inf"))
    n = len(left)
    partner = torch.cat((torch.arange(n, 2 * n), torch.arange(n)))
    return F.cross_entropy(scores, partner)


def _attribute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    total = logits.new_zeros(())
    start = 0
    for column, words in enumerate(attribute_table().values()):
        part = logits[:, start : start + len(words)].float()
        start += len(words)
        total = total + F.cross_entropy(part, targets[:, column], ignore_index=-1)
    return total


def _degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a random half through half the resolution and add a little noise to all."""
    small = F.avg_pool2d(images, 2)
    blurred = F.interpolate(small, scale_factor=2, mode="bilinear")
    pick = torch.rand(len(images), 1, 1, 1, generator=generator)
    images = torch.lerp(images, blurred, (2.0 * pick - 1.0).clamp(min=0.0))
    return images + 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator) * torch.randn(
        images.shape, generator=generator
    )


def train_encoder(
    folder: Path,
    seed: int,
    schedule: Schedule = SCHEDULE,
    chunks: int = 160,
    identities: int = 96,
    resume: bool = True,
    stop_at: float | None = None,
) -> Encoder:
    """Train the encoder on random training identities and return its averaged weights.

    Args:
        folder: holds the pictures and the checkpoint ``encoder.safetensors``.
        seed: decides weights, pictures and batches.
        schedule: length and rates.
        chunks: picture chunks to draw from, faces and landmarks in turn.
        identities: identities a step, two views each.
        resume: continue from the checkpoint.
        stop_at: leave with a checkpoint at this time.
    """
    pictures = cached(
        folder / "pairs.npy",
        (3, world.SIZE, world.SIZE),
        np.uint8,
        chunks,
        lambda index: _pair_sample(seed, index).render().numpy(),
        "pairs",
        IDENTITIES_PER_CHUNK * VIEWS,
    )
    targets = _targets(seed, chunks)
    torch.manual_seed(seed)
    model = Encoder()
    trainer = FlatTrainer(model, schedule, torch.float32)

    def loss_at(step: int) -> Tensor:
        generator = generator_at(seed, "encoder", step)
        who = torch.randperm(chunks * IDENTITIES_PER_CHUNK, generator=generator)[:identities]
        views = torch.rand(identities, VIEWS, generator=generator).argsort(1)[:, :2]
        rows = (who[:, None] * VIEWS + views).T.reshape(-1)
        images = to_unit(torch.from_numpy(pictures[rows.numpy()]))
        images = _degrade(images, generator).contiguous(memory_format=torch.channels_last)
        embedded, logits = trainer.work(images)
        left, right = embedded.chunk(2)
        return contrastive_loss(left, right) + 0.1 * _attribute_loss(logits, targets[rows])

    fit(trainer, loss_at, folder / "encoder.safetensors", "encoder", resume, stop_at)
    trainer.export(model)
    return model.requires_grad_(False)


@torch.no_grad()
def centroids(encoder: Encoder, identities: list[world.Identity], pictures: int = 8) -> Tensor:
    """Mean embeddings of ``pictures`` real pictures of each identity, unit length, ``[m, d]``."""
    rows = [
        encoder.embed(world.render(identity, pictures, seed=1_000)).mean(0)
        for identity in identities
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def retrieval(encoder: Encoder, images: Tensor | np.ndarray, answer: Tensor, bank: Tensor) -> float:
    """Share of pictures whose nearest centroid in ``bank`` is the one numbered ``answer``."""
    nearest = (encoder.embed(images) @ bank.T).argmax(1)
    return float((nearest == answer).float().mean())
