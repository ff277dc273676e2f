# SPDX-License-Identifier: Apache-2.0
"""Weights of the two regularisers over a training run.

Let layer l have n_l adapted weights, N = sum_l n_l, committed density rho_l = mean [L_l > 0],
deltas D_l and earlier change S_l. The loss of a step is

    mean squared error
      + lambda / N  sum_l sum (S_l (.) D_l)^2
      + the preservation of earlier prompts' keys and values
      + mu / 2      sum_l (n_l / N) (max(0, rho_l - rho*(t))^2 + max(0, rho_min - rho_l)^2)

Why hinges. At the start A B = 0, so the task gives the mask no gradient, while a plain sparsity
term pushes every logit the same way; Adam divides by the gradient's size, so the offset b falls
one learning rate a step whatever the weight of the term, until the mask is empty. The hinges have
no gradient while the density is between rho_min and the target, and the target comes down only
after the factors have moved, on the cubic schedule of gradual pruning (Zhu and Gupta, 2017, arXiv
1710.01878):

    rho*(t) = rho_end + (rho_start - rho_end) (1 - x)^3,   x = (t - t0) / (t1 - t0) in [0, 1]

with t0, t1 the start and end steps and rho_start the density measured at t0. Each layer has
hinges of its own, so none can empty itself to pay for another. The step function [L > 0] takes the
straight-through derivative sigmoid'(L), which is what the operator's `sparse` scalar supplies:
the weight of sum sigmoid(L) in layer l is

    mu (max(0, rho_l - rho*(t)) - max(0, rho_min - rho_l)) / N
"""

from stamina_adapters.training.config import TrainingConfig


class DensityHinge:
    """The hinges of one layer: measured densities in, weights of its `sparse` scalar out."""

    def __init__(self, config: TrainingConfig, total_weights: int) -> None:
        self._weight = config.sparse_weight / total_weights
        self._floor = config.min_density
        self._end = config.target_density
        self._t0 = config.sparse_start * config.max_train_steps
        self._t1 = config.sparse_end * config.max_train_steps
        self._start: float | None = None

    def target(self, step: int) -> float:
        """rho*(step); 1 before the upper hinge starts."""
        if step < self._t0 or self._start is None:
            return 1.0
        if step >= self._t1:
            return self._end
        x = (step - self._t0) / (self._t1 - self._t0)
        return self._end + (self._start - self._end) * (1 - x) ** 3

    def weight(self, step: int, density: float) -> float:
        """Weight of sum sigmoid(L) at this step, given the layer's committed density."""
        if step >= self._t0 and self._start is None:
            self._start = max(density, self._end)
        above = max(0.0, density - self.target(step))
        return self._weight * (above - max(0.0, self._floor - density))
