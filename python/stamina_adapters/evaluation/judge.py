# SPDX-License-Identifier: Apache-2.0
"""Whom pictures show, among learned concepts and distractors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from stamina_adapters.evaluation.embedder import Embedder
from stamina_adapters.evaluation.metrics import NearestCentroid

Pictures = Sequence[Image.Image]


class Judge:
    """Tells identities by an embedder, from real pictures of each.

    `real` are the embeddings of the learned concepts' real pictures, in their order; distractors
    come after them among the identities.
    """

    def __init__(
        self, embedder: Embedder, learned: Sequence[Pictures], others: Sequence[Pictures] = ()
    ) -> None:
        """`learned` and `others`: real pictures of each identity, at least two in all."""
        self.embedder = embedder
        real = [embedder.embed(pictures) for pictures in (*learned, *others)]
        self.real = real[: len(learned)]
        self.centroids = NearestCentroid(real)

    @property
    def identities(self) -> int:
        """How many identities there are to choose among; chance is one over it."""
        return len(self.centroids.centroids)

    def accuracy(self, images: Pictures, concept: int) -> float:
        """Share of pictures told as the concept at this position."""
        return self.centroids.accuracy(self.embedder.embed(images), concept)

    def cosine(self, embeddings: torch.Tensor, concept: int) -> float:
        """Mean cosine of embeddings [n, d] to the centroid of a concept's real pictures."""
        unit = F.normalize(embeddings.double(), dim=1)
        return (unit @ self.centroids.centroids[concept]).mean().item()

    def told(self, embeddings: torch.Tensor) -> dict[int, int]:
        """How many of the embeddings [n, d] are told as each identity; only those that occur."""
        values, counts = self.centroids.predict(embeddings).unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))
