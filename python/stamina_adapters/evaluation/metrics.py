# SPDX-License-Identifier: Apache-2.0
"""Metrics of continual customisation, all on image embeddings.

For concept j of N, let D_j be its real images, X_{i,j} images of its prompt generated after
learning concept i, and MMD the discrepancy below. C-LoRA (Smith et al., 2023, arXiv 2304.06027)
defines, both the lower the better,

    A_mmd = 1/N     sum_j         MMD(D_j,     X_{N,j})      distance to the real ones
    F_mmd = 1/(N-1) sum_{j < N}   MMD(X_{j,j}, X_{N,j})      drift since learning

F_mmd alone rewards learning nothing: always show it beside accuracy right after learning.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

DEGREE = 3


def polynomial_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Biased squared maximum mean discrepancy between two sets of embeddings, [n, d] and [m, d].

    Rows are scaled to unit Euclidean length and the kernel is k(a, b) = (a . b + 1)^3, in fp64:

        MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    with the diagonal terms kept (Gretton et al., 2012, JMLR 13, eq. 5). Between 0 and 16, and 0
    for equal sets. The kernel inception distance scales a . b by 1/d instead and drops the
    diagonal; unit length makes values comparable between encoders.

    Raises `ValueError` when a set is empty or the widths differ.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(
            f"x and y must be non-empty [n, d] with one d, not {tuple(x.shape)}, {tuple(y.shape)}"
        )
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T + 1).pow(DEGREE).mean()

    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).clamp(min=0).item()


def a_mmd(real: Sequence[torch.Tensor], final: Sequence[torch.Tensor]) -> float:
    """Mean over concepts of MMD(real images, images generated after the last concept)."""
    return _mean_mmd(real, final)


def f_mmd(learned: Sequence[torch.Tensor], final: Sequence[torch.Tensor]) -> float:
    """Mean over all concepts but the last of MMD(right after learning, after the last concept).

    Raises `ValueError` for fewer than two concepts: nothing could be forgotten.
    """
    if len(final) < 2:
        raise ValueError(f"f_mmd needs at least two concepts, not {len(final)}")
    return _mean_mmd(learned[:-1], final[:-1])


def mmd_each(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[float]:
    """MMD of every concept: the terms of both means."""
    return [polynomial_mmd(x, y) for x, y in zip(left, right, strict=True)]


def _mean_mmd(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    each = mmd_each(left, right)
    if not each:
        raise ValueError("at least one concept is needed")
    return sum(each) / len(each)


class NearestCentroid:
    """Tells which of some identities a picture shows.

    Each identity's centroid is the mean of its unit-length embeddings, scaled to unit length; a
    picture shows the identity whose centroid has the largest dot product with its embedding.
    """

    def __init__(self, identities: Sequence[torch.Tensor]) -> None:
        """`identities`: for each identity, embeddings [n, d] of real pictures of it."""
        if len(identities) < 2:
            raise ValueError(f"identities must be at least two, not {len(identities)}")
        means = torch.stack([F.normalize(e.double(), dim=1).mean(0) for e in identities])
        self.centroids = F.normalize(means, dim=1)

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Index of the nearest identity for each row of [n, d], int64 [n]."""
        return (embeddings.double() @ self.centroids.T).argmax(1)

    def accuracy(self, embeddings: torch.Tensor, identity: int) -> float:
        """Share of rows that show `identity`."""
        return (self.predict(embeddings) == identity).double().mean().item()
