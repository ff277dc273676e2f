# SPDX-License-Identifier: Apache-2.0
"""Counter-based uniforms: Philox4x32-10 in plain PyTorch.

The mask bit of weight (i, j) must be the same in the forward, in the backward, under
recomputation and on every backend, so it is a pure function of its coordinates:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (j >> 2, i, step mod 2^32, layer_id)
    w       = Philox4x32-10(counter, key)[j & 3]
    u       = (2 (w >> 9) + 1) 2^-24            strictly inside (0, 1), exact in fp32

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011); the known-answer
vectors of Random123 are a test.
"""

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> Tensor:
    """Ten rounds of Philox4x32 on broadcastable int64 tensors that hold 32-bit words.

    Returns int64 words in [0, 2^32), shape = broadcast(counter, key) + [4].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64: low and masked high words are exact
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def uniform(seed: Tensor, step: Tensor, layer_id: int, rows: range, cols: range) -> Tensor:
    """Uniforms u(i, j) for the global rows i and columns j, fp32 [len(rows), len(cols)].

    seed, step: 0-dim int64 on the target device (any bit pattern; step counts modulo 2^32).
    rows, cols: ranges of step 1.
    """
    if len(rows) == 0 or len(cols) == 0:
        return torch.zeros(len(rows), len(cols), device=seed.device)
    first_block, last_block = cols.start >> 2, (cols.stop - 1) >> 2
    block = torch.arange(first_block, last_block + 1, device=seed.device)[None, :]
    row = torch.arange(rows.start, rows.stop, device=seed.device)[:, None]
    layer = torch.full_like(step, layer_id)
    words = philox4x32((block, row, step & _LOW, layer), (seed & _LOW, (seed >> 32) & _LOW))
    words = words.flatten(1)[:, cols.start - 4 * first_block :][:, : len(cols)]
    return (2 * (words >> 9) + 1).to(torch.float32) * 2.0**-24
