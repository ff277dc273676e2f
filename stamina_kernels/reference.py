# SPDX-License-Identifier: Apache-2.0
"""Backend `reference`: the definition of every operation, in plain PyTorch.

For one projection with weight W (O x I), factors A (O x r), B (r x I), U (O x m), V (m x I) and a
0-dim bias b of the mask logits:

    P = A B                     L = U V + b
    M = [u < sigmoid(L)]        sampled, u from `philox.uniform`: the hard two-class Gumbel sample
    M = [L > 0]                 hard: evaluation and commit, the sample at u = 1/2
    D = s M (.) P               W_eff = W + D               Y = X W_eff^T + bias
    forget = sum (S (.) D)^2    S = W - W_init              sparse = sum sigmoid(L) or sum relu(L)

Backward, with the bits of the forward, z = sigmoid((L - logit u) / tau):

    G  = dY^T X + 2 g_f S^2 (.) D               dX = dY W_eff
    dA = s (M (.) G) B^T                        dB = s A^T (M (.) G)
    dL = s G (.) P (.) z(1-z) / tau + g_s sparse'(L)
    dU = dL V^T         dV = U^T dL             db = sum dL

The mask's factors may come from small MLPs over learned embeddings (E n x d, W1 h x d, W2 m x h):

    Z  = E W1^T + b1            Y   = silu(Z) W2^T + b2
    dZ = (dY W2) (.) silu'(Z)   dE  = dZ W1
    dW1 = dZ^T E   db1 = sum dZ   dW2 = dY^T silu(Z)   db2 = sum dY      sums over the n rows

Source: Smith et al., STAMINA (arXiv 2311.18763), abstract and method; the backward is derived here.

Arguments are those of the operations in `ops.py`, validated by `functional.py`. A group of n
projections shares X and is stacked along O. M selects: where it is 0, M (.) P is 0 even if P is
not finite. Rows are processed in blocks, so that no O x I temporary outlives its block.
Accumulation is fp32, or fp64 when the factors are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stamina_kernels.philox import uniform

Tensors = Sequence[Tensor]
_BLOCK_ELEMENTS = 1 << 20
_BIT_VALUES = [1 << k for k in range(31)] + [-(1 << 31)]


def unavailable_reason() -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


class _Factors(NamedTuple):
    A: Tensor
    B: Tensor
    U: Tensor
    V: Tensor
    b: Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """bool [O, I] -> int32 [O, word_count(I)]; bit j & 31 of word j >> 5, padding zero."""
    padded = F.pad(mask, (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32))
    values = torch.tensor(_BIT_VALUES, dtype=torch.int32, device=mask.device)
    return (padded * values).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    """int32 [O, ceil(I / 32)] -> bool [O, I], the inverse of `pack_bits`."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :in_features].bool()


def word_count(in_features: int) -> int:
    """ceil(I / 32): the words that hold the mask bits of a row."""
    return -(-in_features // 32)


def select(mask: Tensor, values: Tensor) -> Tensor:
    """M (.) values; 0 where M is, whatever the value."""
    return torch.where(mask, values, values.new_zeros(()))


def mask_logits(U: Tensor, V: Tensor, b: Tensor) -> Tensor:
    """L = U V + b as one chain over ascending k, so that every backend rounds alike."""
    logits = U[:, 0:1] * V[0]
    for k in range(1, U.shape[1]):
        logits = torch.addcmul(logits, U[:, k : k + 1], V[k])
    return logits + b


def _row_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // in_features)
    for start in range(0, out_features, rows):
        yield slice(start, min(start + rows, out_features))


def _uniform_block(
    seed: Tensor, step: Tensor, layer_id: int, row0: int, col0: int, rows: slice, columns: int
) -> Tensor:
    return uniform(
        seed,
        step,
        layer_id,
        range(row0 + rows.start, row0 + rows.stop),
        range(col0, col0 + columns),
    )


def _mask_block(logits: Tensor, u: Tensor | None) -> Tensor:
    return logits > 0 if u is None else u < torch.sigmoid(logits)


def sample(
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
) -> Tensor:
    """Mask bits of the group, int32 [sum O, ceil(I / 32)]."""
    blocks = []
    for k in range(len(U)):
        columns = V[k].shape[1]
        for rows in _row_blocks(U[k].shape[0], columns):
            logits = mask_logits(U[k][rows], V[k], b[k])
            u = (
                None
                if hard
                else _uniform_block(seed, step, layer_id[k], row0[k], col0[k], rows, columns)
            )
            blocks.append(pack_bits(_mask_block(logits, u)))
    return torch.cat(blocks)


def compose(
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """W_eff = W + s M (.) (A B) of the group from its bits, [sum O, I] in `dtype`, one rounding."""
    blocks, first_row = [], 0
    for W, a, b in zip(weight, A, B, strict=True):
        for rows in _row_blocks(*W.shape):
            mask = unpack_bits(bits[first_row + rows.start : first_row + rows.stop], W.shape[1])
            blocks.append((W[rows].to(a.dtype) + select(mask, scale * (a[rows] @ b))).to(dtype))
        first_row += W.shape[0]
    return torch.cat(blocks)


def masked_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y [..., sum O], forget [n], sparse [n], counts int64 [n, 2] and bits of the group.

    counts are the numbers of weights with M = 1, and with M = 1 and S != 0.
    """
    outputs, bits = [], []
    forget = torch.zeros(len(weight), dtype=A[0].dtype, device=x.device)
    sparse = torch.zeros_like(forget)
    counts = torch.zeros(len(weight), 2, dtype=torch.int64, device=x.device)
    for k, W in enumerate(weight):
        columns = W.shape[1]
        for rows in _row_blocks(*W.shape):
            logits = mask_logits(U[k][rows], V[k], b[k])
            u = (
                None
                if hard
                else _uniform_block(seed, step, layer_id[k], row0[k], col0[k], rows, columns)
            )
            mask = _mask_block(logits, u)
            delta = select(mask, scale * (A[k][rows] @ B[k]))
            effective = (W[rows].to(delta.dtype) + delta).to(x.dtype)
            row_bias = bias[k][rows].to(x.dtype) if bias else None
            outputs.append(F.linear(x, effective, row_bias))
            bits.append(pack_bits(mask))
            positive = logits.sigmoid() if sparse_kind == "sigmoid" else logits.relu()
            sparse[k] += positive.sum()
            counts[k, 0] += mask.sum()
            if weight_init:
                change = W[rows].to(delta.dtype) - weight_init[k][rows].to(delta.dtype)
                forget[k] += (change * delta).square().sum()
                counts[k, 1] += (mask & (change != 0)).sum()
    return torch.cat(outputs, -1), forget, sparse, counts, torch.cat(bits)


def _logit_gradient(
    logits: Tensor,
    u: Tensor | None,
    tau: Tensor,
    through_mask: Tensor,
    g_sparse: Tensor,
    sparse_kind: str,
) -> Tensor:
    """dL of one block; through_mask = s G (.) P is the gradient with respect to the mask."""
    shifted = logits if u is None else logits - torch.logit(u.to(logits.dtype))
    z = torch.sigmoid(shifted / tau)
    if sparse_kind == "sigmoid":
        p = logits.sigmoid()
        slope = p * (1 - p)
    else:
        slope = (logits > 0).to(logits.dtype)
    return through_mask * z * (1 - z) / tau + g_sparse * slope


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    U: Sequence[Tensor],
    V: Sequence[Tensor],
    b: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    bits: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    step: Tensor,
    g_forget: Tensor,
    g_sparse: Tensor,
    layer_id: Sequence[int],
    row0: Sequence[int],
    col0: Sequence[int],
    hard: bool,
    sparse_kind: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dX (empty unless need_dx) and the flat gradients dA, dB, dU, dV, db of every member."""
    accumulate = A[0].dtype
    x_rows = x.reshape(-1, x.shape[-1])
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dx = torch.zeros(x_rows.shape, dtype=accumulate, device=x.device) if need_dx else x.new_empty(0)
    x_wide, dy_wide = x_rows.to(accumulate), dy_rows.to(accumulate)
    gradients, first_row = [], 0
    for k, W in enumerate(weight):
        grad = _Factors(*(torch.zeros_like(t) for t in (A[k], B[k], U[k], V[k], b[k])))
        for rows in _row_blocks(*W.shape):
            span = slice(first_row + rows.start, first_row + rows.stop)
            mask = unpack_bits(bits[span], W.shape[1])
            product = A[k][rows] @ B[k]
            delta = select(mask, scale * product)
            wide = W[rows].to(accumulate)
            G = dy_wide[:, span].t() @ x_wide
            if weight_init:
                change = wide - weight_init[k][rows].to(accumulate)
                G += 2 * g_forget[k] * change.square() * delta
            if need_dx:
                dx += dy_wide[:, span] @ (wide + delta).to(x.dtype).to(accumulate)
            masked = select(mask, scale * G)
            u = (
                None
                if hard
                else _uniform_block(seed, step, layer_id[k], row0[k], col0[k], rows, W.shape[1])
            )
            logits = mask_logits(U[k][rows], V[k], b[k])
            dL = _logit_gradient(logits, u, tau, scale * G * product, g_sparse[k], sparse_kind)
            grad.A[rows] = masked @ B[k].t()
            grad.B.add_(A[k][rows].t() @ masked)
            grad.U[rows] = dL @ V[k].t()
            grad.V.add_(U[k][rows].t() @ dL)
            grad.b.add_(dL.sum())
        gradients += [t.flatten() for t in grad]
        first_row += W.shape[0]
    return (dx.to(x.dtype).view_as(x) if need_dx else dx), torch.cat(gradients)


def embedding_mlp(
    E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors, transposed: Sequence[bool]
) -> Tensor:
    """Y [n, m] of every MLP, or Y^T [m, n] where it is `transposed`: flat, one after another."""
    sizes = [e.shape[0] * w.shape[0] for e, w in zip(E, W2, strict=True)]
    out = E[0].new_empty(sum(sizes))
    mlps = zip(out.split(sizes), E, W1, b1, W2, b2, transposed, strict=True)
    for piece, e, w1, c1, w2, c2, flipped in mlps:
        hidden = F.silu(torch.addmm(c1, e, w1.t()))
        if flipped:
            torch.addmm(c2[:, None], w2, hidden.t(), out=piece.view(len(w2), len(e)))
        else:
            torch.addmm(c2, hidden, w2.t(), out=piece.view(len(e), len(w2)))
    return out


def embedding_mlp_backward(
    dY: Tensors, E: Tensors, W1: Tensors, b1: Tensors, W2: Tensors, b2: Tensors,
    transposed: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dE of every MLP, and dW1, db1, dW2, db2 of every MLP: flat, one after another."""
    dE, parameters = [], []
    for dy, e, w1, c1, w2, flipped in zip(dY, E, W1, b1, W2, transposed, strict=True):
        dy = dy.t() if flipped else dy
        z = torch.addmm(c1, e, w1.t())
        dz = torch.ops.aten.silu_backward(dy @ w2, z)
        dE.append(dz @ w1)
        parameters += [dz.t() @ e, dz.sum(0), dy.t() @ F.silu(z), dy.sum(0)]
    return torch.cat([d.view(-1) for d in dE]), torch.cat([d.view(-1) for d in parameters])


def _half_with_exponent(factor: Tensor) -> tuple[Tensor, int]:
    exponent = int(torch.frexp(factor.abs().max()).exponent)
    return (factor.double() * 2.0**-exponent).to(torch.float16), exponent


def round_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A16 = fp16(A 2^-ea), B16 = fp16(B 2^-eb) and (ea, eb) of a finished adapter.

    max|A| 2^-ea and max|B| 2^-eb lie in [1/2, 1).
    """
    A16, ea = _half_with_exponent(A)
    B16, eb = _half_with_exponent(B)
    return A16, B16, (ea, eb)


def fold_overflow(layer: int, dtype: torch.dtype) -> OverflowError:
    """What `fold_` raises after restoring every weight."""
    return OverflowError(
        f"fold: layer {layer} overflows {dtype}; "
        "all weights of the call were restored to weight_init"
    )


def fold_(
    weight: Sequence[Tensor],
    weight_init: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    bits: Sequence[Tensor],
    first: Sequence[int],
) -> None:
    """W_k = round(W_init_k + sum_t s_t M_t (.) (A_t B_t)) in place, t = first[k] .. first[k+1]-1.

    Deltas are summed first, in fp32 and in ascending t; then one rounding to W's dtype. Where a
    result is not finite every weight of the call is set back to W_init and OverflowError names the
    layer.
    """
    overflowed = None
    for k, (W, initial) in enumerate(zip(weight, weight_init, strict=True)):
        if first[k] == first[k + 1]:
            W.copy_(initial)
            continue
        for rows in _row_blocks(*W.shape):
            total = torch.zeros(W[rows].shape, dtype=torch.float32, device=W.device)
            for t in range(first[k], first[k + 1]):
                mask = unpack_bits(bits[t][rows], W.shape[1])
                total += select(mask, scale[t] * (A[t][rows].float() @ B[t].float()))
            W[rows] = (initial[rows].float() + total).to(W.dtype)
        if not torch.isfinite(W).all():
            overflowed = k
            break
    if overflowed is None:
        return
    for W, initial in zip(weight, weight_init, strict=True):
        W.copy_(initial)
    raise fold_overflow(overflowed, weight[overflowed].dtype)
