# SPDX-License-Identifier: Apache-2.0
"""Kernel inception distance on embeddings, by torchmetrics."""

import warnings
from typing import Any

import torch

from stamina_adapters.training.errors import InputError

SUBSETS = 10


def metric_class() -> Any:
    """torchmetrics' class for it. Raises `InputError` where torchmetrics is not installed."""
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise InputError(
            "KID needs torchmetrics; pip install torchmetrics (the extra 'bench' has it)"
        ) from error
    return KernelInceptionDistance


def kid(real: torch.Tensor, generated: torch.Tensor) -> float | None:
    """Unbiased MMD^2 with k(a, b) = (a . b / d + 1)^3 between embeddings [n, d] and [m, d].

    Binkowski et al., 2018, arXiv 1801.01401; may be below 0 for sets that are alike. Computed in
    fp64 by `torchmetrics.image.kid.KernelInceptionDistance`, given the embeddings as its features.
    It needs equal sizes: for unequal sets it is the mean over `SUBSETS` random subsets of the
    smaller size, the same ones every time. None where a set has fewer than two rows, for which the
    estimator does not exist.

    Raises `InputError` when torchmetrics is not installed.
    """
    size = min(len(real), len(generated))
    if size < 2:
        return None
    kind = metric_class()
    subsets = 1 if len(real) == len(generated) else SUBSETS
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # it warns that it keeps features, which are small here
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = kind(torch.nn.Identity(), subsets=subsets, subset_size=size)
        metric.set_dtype(torch.float64)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        return metric.compute()[0].item()
