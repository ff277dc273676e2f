# SPDX-License-Identifier: Apache-2.0
"""What all rivals share: a token, a delta on every adapted layer, the fold, what is carried on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor, nn

from stamina_adapters.concept import weight_digest
from stamina_adapters.config import StaminaConfig, TokenConfig
from stamina_adapters.files import write_beside
from stamina_adapters.inject import find_targets, init_seed, layer_id
from stamina_adapters.models import adapted_model
from stamina_adapters.tokens import add_custom_token, fold_custom_token, remove_custom_token
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.rivals.delta import Delta, DeltaLinear

_LEARNED, _WEIGHTS = "learned", "weights"
_Self = TypeVar("_Self", bound="RivalMethod")


def _digest(layers: dict[str, nn.Module]) -> Tensor:
    """SHA-256 of the layers' weights: a state goes on with the weights it was taken with."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        weight: Any = layer.weight
        digest.update(f"{path} {weight_digest(weight)}\n".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


class RivalSettings(BaseModel):
    """Settings that every rival has; rates are AdamW's and take the place of the run's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target_modules: tuple[str, ...] = Field(("attn2.to_k", "attn2.to_v"), min_length=1)
    learning_rate: float = Field(1e-3, gt=0, description="rate of what changes the weights")
    token: TokenConfig = TokenConfig()
    token_learning_rate: float = Field(3e-3, gt=0, description="rate of the token")


class LowRankSettings(RivalSettings):
    """D = (alpha / r) A B; alpha None means r, so that the scale is 1."""

    r: int = Field(16, ge=1, le=256)
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class RivalMethod:
    """A `Method` made of one `Delta` for every adapted layer.

    kind     the method's name
    carries  names of the tensors that every layer keeps from concept to concept, no more than the
             method needs; with "initial", W_init, every concept is learned on W_init and not on
             the weight that has the earlier ones in it
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    kind: ClassVar[str]
    settings_type: ClassVar[type[BaseModel]] = RivalSettings
    carries: ClassVar[tuple[str, ...]] = ()
    layer_type: ClassVar[type[DeltaLinear]] = DeltaLinear

    def __init__(self, settings: Any = None) -> None:
        self._settings: Any = self.settings_type() if settings is None else settings
        self._carried: dict[str, dict[str, Tensor]] = {name: {} for name in self.carries}
        self._learned = 0
        self._layers: dict[str, DeltaLinear] = {}
        self._pipe: Any = None
        self._word: str | None = None  # of the live concept
        self._before: tuple[dict[str, dict[str, Tensor]], list[tuple[Tensor, Tensor]]] = ({}, [])

    @classmethod
    def build(cls: type[_Self], overrides: dict[str, Any]) -> _Self:
        """The method with some settings; pydantic's ValidationError for one it does not have."""
        return cls(cls.settings_type.model_validate(overrides))

    # ---- what a method may define

    def _delta(self, path: str, weight: Tensor, generator: torch.Generator) -> Delta:
        """The layer's new delta, on the CPU; `generator` is seeded for concept and layer."""
        raise NotImplementedError

    def _fold(self, path: str, layer: DeltaLinear) -> Tensor:
        """W_t of a layer, rounded to its dtype afterwards; moves on what the layer carries."""
        return layer.weight + layer.delta()

    def _add_to_change(self, path: str, D: Tensor) -> Tensor:
        """C_t = C_{t-1} + D, the fp32 sum of all that was learned, which becomes carried."""
        change = self._carried["change"]
        change[path] = change[path] + D if path in change else D.clone()
        return change[path]

    def _groups(self, token: nn.Module) -> list[dict]:
        factors = [p for layer in self._layers.values() for p in layer.delta.factors()]
        groups = [{"params": list(token.parameters()), "lr": self._settings.token_learning_rate}]
        if factors:
            groups.insert(0, {"params": factors, "lr": self._settings.learning_rate})
        return groups

    def _target_modules(self) -> tuple[str, ...]:
        return self._settings.target_modules

    def _token(self) -> TokenConfig:
        return self._settings.token

    # ---- the protocol

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        self._pipe, self._config, self._concept = pipe, config, concept
        replaced: list[tuple[Tensor, Tensor]] = []
        self._before = ({name: dict(layers) for name, layers in self._carried.items()}, replaced)
        targets = self._targets(pipe)
        for path, layer in targets.items():
            if type(layer) is not nn.Linear:
                raise TypeError(
                    f"target_modules: only a plain nn.Linear can be adapted, {path!r} is "
                    f"{type(layer).__name__}"
                )
        seed = concept.seed(config.seed)
        seeded = self._token().model_copy(update={"seed": seed})
        token = add_custom_token(pipe, concept.token, seeded)
        self._word = concept.token
        for path, layer in targets.items():
            number = init_seed(StaminaConfig(seed=seed), layer_id(concept.name, path))
            generator = torch.Generator().manual_seed(number)
            weight: Any = layer.weight
            if "initial" in self._carried:
                before = weight.detach().clone()
                replaced.append((weight.data, before))
                weight.data.copy_(self._carried["initial"].setdefault(path, before))
            self._layers[path] = self.layer_type.attach(layer, self._delta(path, weight, generator))
        return self._groups(token)

    def begin_step(self, step: int) -> float | None:
        return None

    def densities(self) -> dict[str, float]:
        return {}

    def set_sampling(self, sampling: bool) -> None:
        pass

    def penalty(self) -> Tensor | None:
        return None

    def consolidate(self, loss: Callable[[], Tensor]) -> None:
        pass

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Fold and return the concept's own tensors. ValueError if one is not finite."""
        tensors = self._tensors()
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self._concept.token}: {key} is not finite")
        fold_custom_token(self._pipe, self._concept.token)
        for path, layer in self._layers.items():
            layer.weight.copy_(self._fold(path, layer))
            layer.detach()
        self._layers, self._word, self._before = {}, None, ({}, [])
        self._learned += 1
        return tensors

    def abandon(self) -> None:
        for layer in self._layers.values():
            layer.detach()
        carried, replaced = self._before
        for weight, before in replaced:
            weight.copy_(before)
        if self._word is not None:
            remove_custom_token(self._pipe, self._word)
        if carried:
            self._carried = carried
        self._layers, self._word, self._before = {}, None, ({}, [])

    def save(self, state: Any, file: Path) -> None:
        write_beside(file, save(state, {"method": self.kind}))

    def settings(self) -> dict[str, Any]:
        return {"method": self.kind, **self._settings.model_dump(mode="json")}

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {
            f"{name}/{path}": tensor.detach().cpu().clone().contiguous()
            for name, layers in self._carried.items()
            for path, tensor in layers.items()
        }
        # the name keeps two methods that carry alike apart
        tensors[f"{_LEARNED}/{self.kind}"] = torch.tensor(self._learned)
        if self._pipe is not None:
            tensors[_WEIGHTS] = _digest(self._targets(self._pipe))
        return tensors

    def load_state_dict(self, pipe: Any, state: dict[str, Tensor]) -> None:
        if self._learned or self._layers:
            raise RuntimeError("a state is loaded into a new method, before it learns")
        state = dict(state)
        learned = state.pop(f"{_LEARNED}/{self.kind}", None)
        if learned is None:
            raise ValueError(f"the state is not one of {self.kind!r}")
        targets = self._targets(pipe)
        weights = state.pop(_WEIGHTS, None)  # none was taken before the first concept
        fits = not learned if weights is None else torch.equal(weights.cpu(), _digest(targets))
        if not fits:
            raise ValueError(
                f"the state of {self.kind!r} does not belong to this pipeline's weights"
            )
        carried: dict[str, dict[str, Tensor]] = {name: {} for name in self.carries}
        for key, tensor in state.items():
            name, _, path = key.partition("/")
            if name not in carried or path not in targets:
                raise ValueError(f"the state of {self.kind!r} holds an unknown key {key!r}")
            weight: Any = targets[path].weight
            carried[name][path] = tensor.to(weight.device, copy=True)
        wanted = targets.keys() if learned else set()
        if any(layers.keys() != wanted for layers in carried.values()):
            raise ValueError(f"the state of {self.kind!r} is incomplete")
        self._carried, self._learned, self._pipe = carried, int(learned), pipe

    # ---- helpers

    def _targets(self, pipe: Any) -> dict[str, nn.Module]:
        names = self._target_modules()
        return find_targets(adapted_model(pipe), names) if names else {}

    def _tensors(self) -> dict[str, Tensor]:
        """All that was learned for the live concept: tensors by layer, and the word's vector."""
        tensors = {
            f"{path}.{name}": tensor.detach().cpu().clone().contiguous()
            for path, layer in self._layers.items()
            for name, tensor in layer.delta.learned().items()
        }
        number = self._pipe.tokenizer.convert_tokens_to_ids(self._concept.token)
        vector = self._pipe.text_encoder.get_input_embeddings()(
            torch.tensor(number, device=self._pipe.text_encoder.device)
        )
        return {**tensors, f"token/{self._concept.token}": vector.detach().cpu().clone()}
