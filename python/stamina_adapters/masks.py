# SPDX-License-Identifier: Apache-2.0
"""Mask generators: modules that return the factors of the mask logits L = U V + b.

U is O x m, V is m x I, b is 0-dim, all fp32 whatever the model's dtype or autocast. At the start
the entries of U V have standard deviation `logit_std` and b = logit(density_init). Weights are
plain Parameters, never `nn.Linear`, so that nothing that searches a model for linears finds them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stamina_kernels as kernels
from stamina_adapters.config import StaminaConfig
from stamina_adapters.hooks import has_hooks

Factors = tuple[Tensor, Tensor, Tensor]
# how parameters are made: torch's default dtype and device are the user's
FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def _normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator, **FP32) * std)


class MaskGenerator(nn.Module):
    """Base of the generators: holds b [1] and calls `_factors` in fp32 with autocast off."""

    def __init__(self, density_init: float) -> None:
        super().__init__()
        # of one element, because fully_shard takes no 0-dim parameter
        self.b = nn.Parameter(torch.tensor([math.log(density_init / (1 - density_init))], **FP32))

    def _factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self) -> Factors:
        """U [O, m], V [m, I], b []."""
        with torch.autocast(self.b.device.type, enabled=False):
            U, V = self._factors()
        return U, V, self.b.squeeze()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        b = state_dict.get(prefix + "b")
        if b is not None and b.dim() == 0:  # as it was once kept
            state_dict[prefix + "b"] = b[None]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FreeFactors(MaskGenerator):
    """U and V are parameters: (O + I) m + 1 of them."""

    def __init__(self, rows: int, columns: int, config: StaminaConfig, generator: torch.Generator):
        super().__init__(config.density_init)
        std = _factor_std(config)
        self.U = _normal(generator, rows, config.mask_rank, std=std)
        self.V = _normal(generator, config.mask_rank, columns, std=std)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.U, self.V


class EmbeddingMLP(nn.Module):
    """n x m matrix: an MLP m -> hidden -> m with SiLU over n learned embeddings of size m.

    n m + 2 hidden m + hidden + m parameters. At the start each column has mean zero (n > 1)
    and the entries have root mean square `std`. The backward computes the activations again: kept,
    they would take six times the memory of the mask's bits.
    """

    HIDDEN = 32

    def __init__(self, count: int, rank: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = _normal(generator, count, rank)
        self.weight1 = _normal(generator, self.HIDDEN, rank, std=rank**-0.5)
        self.bias1 = nn.Parameter(torch.zeros(self.HIDDEN, **FP32))
        self.weight2 = _normal(generator, rank, self.HIDDEN, std=self.HIDDEN**-0.5)
        self.bias2 = nn.Parameter(torch.zeros(rank, **FP32))
        with torch.no_grad():
            if count > 1:
                # a column mean in U and one in V would shift every logit, hence the density
                self.bias2.sub_(self().mean(0))
            gain = std / self().square().mean().sqrt()
            self.weight2.mul_(gain)
            self.bias2.mul_(gain)

    def weights(self, transposed: bool = False) -> kernels.EmbeddingMLP:
        """The MLP as the operator takes it."""
        inputs = (self.embedding, self.weight1, self.bias1, self.weight2, self.bias2)
        return kernels.EmbeddingMLP(*inputs, transposed)

    def forward(self, transposed: bool = False) -> Tensor:
        return kernels.embedding_mlp([self.weights(transposed)])[0]


class EmbeddingMLPFactors(MaskGenerator):
    """U from row embeddings and V from column embeddings, each through an MLP of its own.

    (O + I) m + 130 m + 65 parameters: within 2 (O + I) m + 10^4 when m <= 76 or O + I >= 130.
    """

    def __init__(self, rows: int, columns: int, config: StaminaConfig, generator: torch.Generator):
        super().__init__(config.density_init)
        std = _factor_std(config)
        self.row_mlp = EmbeddingMLP(rows, config.mask_rank, std, generator)
        self.column_mlp = EmbeddingMLP(columns, config.mask_rank, std, generator)

    def mlps(self) -> list[kernels.EmbeddingMLP]:
        """What makes U and V."""
        return [self.row_mlp.weights(), self.column_mlp.weights(transposed=True)]

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.row_mlp(), self.column_mlp(transposed=True)


class ConstantMLP(nn.Module):
    """n x m matrix: an MLP 1 -> hidden -> n m with SiLU on the constant 1, 2 n m + 4 parameters."""

    HIDDEN = 2

    def __init__(self, count: int, rank: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = (count, rank)
        self.weight1 = nn.Parameter(torch.ones(self.HIDDEN, **FP32))
        self.bias1 = nn.Parameter(torch.zeros(self.HIDDEN, **FP32))
        # the hidden units start equal to silu(1); different output weights tell them apart
        std /= F.silu(torch.tensor(1.0, **FP32)).item() * self.HIDDEN**0.5
        self.weight2 = _normal(generator, count * rank, self.HIDDEN, std=std)

    def forward(self) -> Tensor:
        return (self.weight2 @ F.silu(self.weight1 + self.bias1)).view(self.shape)


class ConstantMLPFactors(MaskGenerator):
    """U and V from MLPs on a constant input: a reparameterisation, 2 (O + I) m + 9 parameters."""

    def __init__(self, rows: int, columns: int, config: StaminaConfig, generator: torch.Generator):
        super().__init__(config.density_init)
        std = _factor_std(config)
        self.row_mlp = ConstantMLP(rows, config.mask_rank, std, generator)
        self.column_mlp = ConstantMLP(columns, config.mask_rank, std, generator)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.row_mlp(), self.column_mlp().t()


def _factor_std(config: StaminaConfig) -> float:
    # an entry of U V sums m products of independent factors: std = sqrt(m) sigma^2
    return (config.logit_std / config.mask_rank**0.5) ** 0.5


_GENERATORS: dict[str, type[EmbeddingMLPFactors | ConstantMLPFactors | FreeFactors]] = {
    "embedding_mlp": EmbeddingMLPFactors,
    "constant_mlp": ConstantMLPFactors,
    "free": FreeFactors,
}


def make_mask_generator(
    rows: int, columns: int, config: StaminaConfig, generator: torch.Generator
) -> MaskGenerator:
    """The generator that `config.mask_generator` names, for an O x I layer, drawn on the CPU."""
    return _GENERATORS[config.mask_generator](rows, columns, config, generator)


def mask_factors(masks: Sequence[nn.Module]) -> list[Factors]:
    """U, V and b of every generator, in one launch where all are MLPs over embeddings."""
    plain = [mask for mask in masks if type(mask) is EmbeddingMLPFactors and _is_plain(mask)]
    if len(plain) < len(masks):
        return [mask() for mask in masks]
    outputs = iter(kernels.embedding_mlp([mlp for mask in plain for mlp in mask.mlps()]))
    return [(U, V, mask.b.squeeze()) for mask, U, V in zip(plain, outputs, outputs, strict=True)]


def _is_plain(mask: EmbeddingMLPFactors) -> bool:
    return not any(map(has_hooks, (mask, mask.row_mlp, mask.column_mlp)))
