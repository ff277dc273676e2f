# SPDX-License-Identifier: Apache-2.0
"""What the public functions take and return: projections, outputs, committed adapters."""

from typing import NamedTuple

from torch import Tensor


class MaskedProjection(NamedTuple):
    """One projection W + s M (.) (A B) with everything the operation needs to know of it.

    weight      O x I, fp32 / bf16 / fp16, frozen
    A, B        O x r and r x I, fp32: the low-rank update
    U, V, b     O x m, m x I and 0-dim, fp32: the mask logits L = U V + b
    layer_id    32-bit identity of the layer in the random stream
    bias        O, or None
    weight_init O x I, the weight before any concept, or None where nothing was learned yet
    row0, col0  global position of weight[0, 0] where weight is a shard
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    U: Tensor
    V: Tensor
    b: Tensor
    layer_id: int
    bias: Tensor | None = None
    weight_init: Tensor | None = None
    row0: int = 0
    col0: int = 0


class MaskedLinearOutput(NamedTuple):
    """y [..., sum O]; per projection: forget, sparse (unweighted), counts [n, 2]; packed bits.

    counts holds the number of kept weights and of kept weights that earlier concepts changed.
    """

    y: Tensor
    forget: Tensor
    sparse: Tensor
    counts: Tensor
    bits: Tensor


class CommittedAdapter(NamedTuple):
    """A finished concept's update of one projection: D = scale 2^(ea + eb) M (.) (A B).

    A O x r and B r x I are fp16, exponent = (ea, eb), bits int32 [O, ceil(I / 32)].
    """

    A: Tensor
    B: Tensor
    exponent: tuple[int, int]
    bits: Tensor
    scale: float


class EmbeddingMLP(NamedTuple):
    """A small MLP over n embeddings, Y = silu(E W1^T + b1) W2^T + b2; everything fp32.

    E [n, d], W1 [h, d], b1 [h], W2 [m, h], b2 [m]; `transposed` asks for Y^T [m, n].
    """

    E: Tensor
    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor
    transposed: bool = False
