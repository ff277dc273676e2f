# SPDX-License-Identifier: Apache-2.0
"""Some layers of a UNet's step, output and gradients, against fp64.

The step is the one that is timed, so what goes through a layer is noted on its way, and fp64 is
given the same X and dY.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.noise import philox_draws
from benchmarks.rivals import member_exact


@dataclass
class Passage:
    """What went through a layer in one step; dy, the gradient of Y, is there after the backward."""

    x: Tensor
    y: Tensor
    dy: Tensor = field(init=False)


Passages = dict[Any, Passage]
Pairs = list[tuple[Tensor, Tensor]]
"""A result and the exact one."""


def _note(passages: Passages, layer: Any, x: Tensor, y: Tensor) -> None:
    passage = passages[layer] = Passage(x.detach(), y.detach())
    y.register_hook(partial(setattr, passage, "dy"))


@contextmanager
def lora_passages(layers: Sequence[nn.Module]) -> Iterator[Passages]:
    """What goes through PEFT's layers inside the block."""
    found: Passages = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        _note(found, layer, arguments[0], y)

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stamina_passages(model: Any, layers: Sequence[nn.Module]) -> Iterator[Passages]:
    """What goes through ours inside the block.

    Noted where the processors ask for it: a layer with a hook would not be computed together with
    the others.
    """
    found: Passages = {}
    shared = next(iter(model.attn_processors.values())).shared
    project = shared.project

    def noting(pair: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = project(pair, x)
        for layer, y in zip(pair, outputs, strict=True):
            if layer in layers:
                _note(found, layer, x, y)
        return outputs

    shared.project = noting
    try:
        yield found
    finally:
        del shared.project


def _widened(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in parameters.items()}


def _judged_apart(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Matrices each by itself, vectors and numbers as one: those are sums over many weights, and
    the error of one alone could be the cancellation in it."""
    small = [gradient.flatten() for gradient in gradients if gradient.dim() < 2]
    return [g for g in gradients if g.dim() == 2] + ([torch.cat(small)] if small else [])


def _pairs(
    passage: Passage,
    parameters: dict[str, nn.Parameter],
    leaves: dict[str, Tensor],
    outputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> Pairs:
    """Of Y, the first of the exact outputs, and of the gradients."""
    exact = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    gradients = zip(_judged_apart(got), _judged_apart(exact), strict=True)
    return [(passage.y, outputs[0].detach()), *gradients]


def lora_pairs(layer: Any, passage: Passage) -> Pairs:
    """Y = X (W + B A)^T, as PEFT names the factors."""
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    parameters = {"A": a.weight, "B": b.weight}
    leaves = _widened(parameters)
    weight = layer.base_layer.weight.double() + leaves["B"] @ leaves["A"]
    y = passage.x.double() @ weight.t()
    return _pairs(passage, parameters, leaves, [y], [passage.dy.double()])


def _mlp(leaves: dict[str, Tensor], name: str) -> Tensor:
    """An MLP of the mask, over its embeddings."""
    parts = ("embedding", "weight1", "bias1", "weight2", "bias2")
    E, W1, b1, W2, b2 = (leaves[f"mask.{name}.{part}"] for part in parts)
    return F.silu(E @ W1.t() + b1) @ W2.t() + b2


def stamina_pairs(layer: Any, passage: Passage) -> Pairs:
    """Ours with the bits that the step drew, the mask's factors from their parameters included."""
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = _widened(parameters)
    factors = [_mlp(leaves, "row_mlp"), _mlp(leaves, "column_mlp").t(), leaves["mask.b"]]
    p = layer.projection()
    (draw,) = philox_draws([p], layer.seed, layer.step)
    inputs = [passage.x.double(), leaves["A"], leaves["B"], *factors]
    outputs = member_exact(p, draw, layer.scale, layer.tau, inputs)
    upstream = [passage.dy, layer.forget_weight, layer.sparse_weight]
    return _pairs(passage, parameters, leaves, outputs, [g.double() for g in upstream])
