# SPDX-License-Identifier: Apache-2.0
"""STAMINA's formula op by op in eager PyTorch, with one part replaced: ablations.

    D = s M (.) (A B)         M = [u < sigmoid(L)] while sampled, [L > 0] when committed
    L_total = L_diff + lambda / N sum (S (.) D)^2 + preservation + density hinges

The fused operator does not compute these parts, which exist to be compared:

    mask    "sampled": as above. "soft": M = sigmoid(L / tau), in training and in the fold.
            "none": M = 1, without hinges
    logits  "config": the adapter's own generator. "dense": L is a parameter, O x I of them.
            "shared_mlp": one MLP for all layers, over row and column embeddings of each
    reuse   False: M is 0 where an earlier concept changed the weight (S != 0), so that masks are
            disjoint and the forgetting term is exactly zero

With "sampled", "config" and reuse this is `StaminaMethod` with the same random bits, up to the
order of sums and the rounding of committed factors to fp16; a test holds it to that. Formulas are
those of `stamina_kernels.reference`; the noise of a step is drawn once.
"""

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from stamina_adapters.config import StaminaConfig, TokenConfig
from stamina_adapters.inject import layer_id, mask_seed
from stamina_adapters.masks import MaskGenerator, make_mask_generator
from stamina_adapters.training.config import METHOD_FIELDS, ConceptSpec, TrainingConfig
from stamina_adapters.training.methods import StaminaSettings
from stamina_adapters.training.penalties import DensityHinge
from stamina_adapters.training.preservation import Preservation
from stamina_adapters.training.rivals.base import RivalMethod
from stamina_adapters.training.rivals.delta import DeltaLinear, LowRankDelta, initial_B
from stamina_kernels.philox import uniform
from stamina_kernels.reference import pack_bits

_PROMPT = "prompt/"


class MaskedSettings(BaseModel):
    """STAMINA's settings, and what is replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stamina: StaminaSettings = StaminaSettings()
    mask: Literal["sampled", "soft", "none"] = "sampled"
    logits: Literal["config", "dense", "shared_mlp"] = "config"
    reuse: bool = True


class FactoredLogits(nn.Module):
    """L = U V + b of a generator."""

    def __init__(self, generator: MaskGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self) -> Tensor:
        U, V, b = self.generator()
        return U @ V + b


class DenseLogits(nn.Module):
    """L = Z + b with Z [O, I] a parameter, standard deviation `logit_std` at the start."""

    def __init__(
        self, rows: int, columns: int, config: StaminaConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        density = config.density_init
        self.Z = nn.Parameter(torch.randn(rows, columns, generator=generator) * config.logit_std)
        self.b = nn.Parameter(torch.tensor(math.log(density / (1 - density))))

    def forward(self) -> Tensor:
        return self.Z + self.b


class SharedMLP(nn.Module):
    """An MLP m -> hidden -> m with SiLU, one for all layers, rows and columns.

    Over normal embeddings its outputs have mean zero and root mean square `std` at the start.
    """

    HIDDEN = 32

    def __init__(self, config: StaminaConfig, generator: torch.Generator) -> None:
        super().__init__()
        rank = config.mask_rank
        std = (config.logit_std / rank**0.5) ** 0.5  # of U and V, so that U V has logit_std
        first = torch.randn(self.HIDDEN, rank, generator=generator) * rank**-0.5
        second = torch.randn(rank, self.HIDDEN, generator=generator) * self.HIDDEN**-0.5
        self.weight1, self.weight2 = nn.Parameter(first), nn.Parameter(second)
        self.bias1 = nn.Parameter(torch.zeros(self.HIDDEN))
        self.bias2 = nn.Parameter(torch.zeros(rank))
        with torch.no_grad():
            inputs = torch.randn(4096, rank, generator=generator)
            self.bias2.sub_(self(inputs).mean(0))
            gain = std / self(inputs).square().mean().sqrt()
            self.weight2.mul_(gain)
            self.bias2.mul_(gain)

    def forward(self, embedding: Tensor) -> Tensor:
        hidden = F.silu(F.linear(embedding, self.weight1, self.bias1))
        return F.linear(hidden, self.weight2, self.bias2)


class SharedLogits(nn.Module):
    """L = f(E_rows) f(E_columns)^T + b with the layer's own embeddings and b, and a shared f."""

    def __init__(
        self,
        rows: int,
        columns: int,
        config: StaminaConfig,
        mlp: SharedMLP,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        rank, density = config.mask_rank, config.density_init
        self.rows = nn.Parameter(torch.randn(rows, rank, generator=generator))
        self.columns = nn.Parameter(torch.randn(columns, rank, generator=generator))
        self.b = nn.Parameter(torch.tensor(math.log(density / (1 - density))))
        self.mlp = mlp

    def forward(self) -> Tensor:
        return self.mlp(self.rows) @ self.mlp(self.columns).t() + self.b


class MaskedDelta(LowRankDelta):
    """D = s M (.) (A B); `noise` [O, I] samples the mask, None takes the committed one.

    `allowed` [O, I], bool, is where M may be 1; None everywhere.
    """

    noise: Tensor | None
    allowed: Tensor | None
    preconditioner: Tensor | None

    def __init__(
        self, rows: int, B: Tensor, scale: float, tau: float, soft: bool, logits: nn.Module | None
    ) -> None:
        super().__init__(rows, B, scale)
        self.logits, self.tau, self.soft = logits, tau, soft
        self.register_buffer("noise", None, persistent=False)
        self.register_buffer("allowed", None, persistent=False)
        self.register_buffer("preconditioner", None, persistent=False)

    @property
    def right_factor(self) -> Tensor:
        return self.B if self.preconditioner is None else self.B @ self.preconditioner

    def mask(self) -> Tensor | None:
        """M with its straight-through gradient, None for no mask."""
        if self.logits is None:
            return None
        L = self.logits()
        if self.soft:
            M = torch.sigmoid(L / self.tau)
        elif self.noise is None:
            z = torch.sigmoid(L / self.tau)
            M = (L > 0).float() + (z - z.detach())  # in this order M is exactly 0 or 1
        else:
            z = torch.sigmoid((L - torch.logit(self.noise)) / self.tau)
            M = (self.noise < torch.sigmoid(L)).float() + (z - z.detach())
        return M if self.allowed is None else M * self.allowed

    def forward(self) -> Tensor:
        M, P = self.mask(), super().forward()
        return P if M is None else M * P

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.logits is None:
            return super().project(x, weight, bias)
        return F.linear(x, (weight + self()).to(x.dtype), bias)

    def sparse(self, kind: str) -> Tensor:
        """sum sigmoid(L) or sum relu(L), where a mask is allowed."""
        assert self.logits is not None
        L = self.logits()
        values = torch.sigmoid(L) if kind == "sigmoid" else F.relu(L)
        return (values if self.allowed is None else values * self.allowed).sum()

    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B]

    def learned(self) -> dict[str, Tensor]:
        """A, B and the mask: `bits` packed as in STAMINA's files, or the values `mask`."""
        kept: dict[str, Tensor] = {"A": self.A, "B": self.right_factor}
        M = self.mask()
        if M is not None:
            kept |= {"mask": M} if self.soft else {"bits": pack_bits(M > 0.5)}
        return kept


class MaskedLinear(DeltaLinear):
    """A layer with a `MaskedDelta`."""

    delta: MaskedDelta

    def set_preconditioner(self, C: Tensor) -> None:
        """As `StaminaLinear.set_preconditioner`."""
        self.delta.preconditioner = C


class MaskedMethod(RivalMethod):
    """STAMINA in eager PyTorch; see the module."""

    kind = "ablation"
    reads = METHOD_FIELDS
    settings_type = MaskedSettings
    carries = ("change",)
    layer_type = MaskedLinear

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._prompts: dict[str, str] = {}  # learned word -> the prompt it was learned with

    def _target_modules(self) -> tuple[str, ...]:
        adapter: StaminaConfig = self._settings.stamina.adapter
        return adapter.target_modules

    def _token(self) -> TokenConfig:
        token: TokenConfig = self._settings.stamina.token
        return token

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        config = self._settings.stamina.training.over(config)
        seed = {"seed": concept.seed(config.seed)}
        self._adapter: StaminaConfig = self._settings.stamina.adapter.model_copy(update=seed)
        self._shared = (
            SharedMLP(self._adapter, torch.Generator().manual_seed(self._adapter.seed))
            if self._settings.logits == "shared_mlp"
            else None
        )
        self._mask_seed = mask_seed(self._adapter, concept.name)
        self._step = 0
        self._measured: dict[str, float] = {}
        groups = super().attach(pipe, concept, config)
        self._total = sum(layer.weight.numel() for layer in self._layers.values())
        self._hinges = {path: DensityHinge(config, self._total) for path in self._layers}
        self._preservation = Preservation(pipe, concept, self._layers, config, self._prompts)
        return groups

    def _logits(
        self, rows: int, columns: int, generator: torch.Generator
    ) -> FactoredLogits | DenseLogits | SharedLogits:
        if self._settings.logits == "dense":
            return DenseLogits(rows, columns, self._adapter, generator)
        if self._shared is not None:
            return SharedLogits(rows, columns, self._adapter, self._shared, generator)
        return FactoredLogits(make_mask_generator(rows, columns, self._adapter, generator))

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> MaskedDelta:
        rows, columns = weight.shape
        kind = self._settings.mask
        logits = None if kind == "none" else self._logits(rows, columns, generator)
        B = initial_B(self._adapter.r, columns, generator)
        delta = MaskedDelta(rows, B, self._adapter.scale, self._adapter.tau, kind == "soft", logits)
        if not self._settings.reuse and self._learned:
            delta.allowed = self._carried["change"][path] == 0
        return delta

    def _groups(self, token: nn.Module) -> list[dict]:
        mask = {
            id(parameter): parameter  # the shared MLP's are met in every layer
            for delta in self._deltas().values()
            if delta.logits is not None
            for parameter in delta.logits.parameters()
        }
        config = self._config
        factors = [p for delta in self._deltas().values() for p in delta.factors()]
        groups: list[dict] = [{"params": factors, "lr": config.learning_rate}]
        if mask:
            groups.append({"params": list(mask.values()), "lr": config.mask_learning_rate})
        rate = config.token_learning_rate
        return [*groups, {"params": list(token.parameters()), "lr": rate}]

    def _deltas(self) -> dict[str, MaskedDelta]:
        return {path: layer.delta for path, layer in self._layers.items()}  # type: ignore[misc]

    @property
    def _masked(self) -> bool:
        return bool(self._settings.mask != "none")

    def begin_step(self, step: int) -> float | None:
        config = self._config
        self._step = step
        self.set_sampling(step < config.first_hard_step)
        if not self._masked:
            return None
        if config.measures_density(step):
            self._measured = self.densities()
        self._weights = {
            path: hinge.weight(step, self._measured[path]) for path, hinge in self._hinges.items()
        }
        kept = (n * self._layers[path].weight.numel() for path, n in self._measured.items())
        return sum(kept) / self._total

    @torch.no_grad()
    def densities(self) -> dict[str, float]:
        densities = {}
        for path, delta in self._deltas().items():
            noise, delta.noise = delta.noise, None
            M = delta.mask()
            delta.noise = noise
            if M is not None:
                densities[path] = M.mean().item()
        return densities

    def set_sampling(self, sampling: bool) -> None:
        for path, delta in self._deltas().items():
            rows, columns = len(delta.A), delta.B.shape[1]
            delta.noise = None
            if sampling and self._settings.mask == "sampled":
                device = delta.A.device
                seed = torch.tensor(self._mask_seed, device=device)
                step = torch.tensor(self._step, device=device)
                number = layer_id(self._concept.name, path)
                delta.noise = uniform(seed, step, number, range(rows), range(columns))

    def penalty(self) -> Tensor | None:
        preserve = self._preservation.term(
            lambda paths, H: [self._layers[path].change(H) for path in paths]
        )
        terms = [] if preserve is None else [preserve]
        for path, delta in self._deltas().items():
            if self._learned and self._config.forget_weight:
                overlap = (self._carried["change"][path] * delta()).square().sum()
                terms.append(self._config.forget_weight / self._total * overlap)
            if self._masked and (weight := self._weights[path]):
                terms.append(weight * delta.sparse(self._adapter.sparse_kind))
        return torch.stack(terms).sum() if terms else None

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        self._add_to_change(path, layer.delta())
        return super()._fold(path, layer)

    def finish(self) -> dict[str, Tensor]:
        self.set_sampling(False)
        tensors = super().finish()
        self._prompts[self._concept.token] = self._concept.instance_prompt
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        prompts = {
            f"{_PROMPT}{word}": torch.frombuffer(bytearray(prompt.encode()), dtype=torch.uint8)
            for word, prompt in self._prompts.items()
        }
        return {**super().state_dict(), **prompts}

    def load_state_dict(self, pipe: Any, state: dict[str, Tensor]) -> None:
        prompts = {
            key.removeprefix(_PROMPT): tensor.cpu().numpy().tobytes().decode()
            for key, tensor in state.items()
            if key.startswith(_PROMPT)
        }
        others = {key: t for key, t in state.items() if not key.startswith(_PROMPT)}
        super().load_state_dict(pipe, others)
        self._prompts = prompts
