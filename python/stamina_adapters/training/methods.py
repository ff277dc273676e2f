# SPDX-License-Identifier: Apache-2.0
"""How a concept is put into a model: the part of training that differs between methods."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stamina_adapters import (
    StaminaConfig,
    TokenConfig,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    fold_stamina,
    save_stamina_weights,
    set_stamina_attn_processor,
    set_stamina_mask_mode,
    set_stamina_penalties,
    set_stamina_step,
    stamina_parameters,
    stamina_statistics,
)
from stamina_adapters.files import concept_from_bytes, concept_to_bytes
from stamina_adapters.fold import restore_concepts
from stamina_adapters.linear import WEIGHT_INIT, changes_together
from stamina_adapters.models import FoldedConcept, adapted_model, find_state, layer_at
from stamina_adapters.training.config import METHOD_FIELDS, ConceptSpec, TrainingConfig
from stamina_adapters.training.penalties import DensityHinge
from stamina_adapters.training.preservation import Preservation
from stamina_adapters.vocabularies import check_new_token

INITIAL = "initial/"
_CONCEPT = "concept/"
_Share = Annotated[float, Field(ge=0, le=1)]
_Rate = Annotated[float, Field(gt=0)]
_Weight = Annotated[float, Field(ge=0)]


class Method(Protocol):
    """One way of learning concept after concept.

    The trainer calls `attach` once for a concept; `begin_step` before every optimiser step and
    `penalty` in it; after the last one `consolidate` and then `finish`; and `save` with what
    `finish` returned. Where any of them raises, or the run is interrupted, `abandon` ends the
    concept. Between two concepts the model is a stock one, and `state_dict` holds
    all that learning the next one needs besides the model's weights and vocabulary: a new object
    that is given it by `load_state_dict` goes on with the same bits.

    reads    fields of `TrainingConfig` that change what it does, besides the trainer's
    """

    reads: ClassVar[frozenset[str]]

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        """Make the concept learnable; returns AdamW's parameter groups, each with its `lr`."""
        ...

    def begin_step(self, step: int) -> float | None:
        """Set whatever depends on the step, counted from 0.

        Returns the committed density over all adapted weights as last measured, None without masks.
        """
        ...

    def densities(self) -> dict[str, float]:
        """Committed mask density of every adapted layer by module path; empty without masks."""
        ...

    def set_sampling(self, sampling: bool) -> None:
        """Sample masks (True) or use the masks that would be committed now (False)."""
        ...

    def penalty(self) -> Tensor | None:
        """A differentiable 0-dim term of this step's loss, None where there is none to add."""
        ...

    def consolidate(self, loss: Callable[[], Tensor]) -> None:
        """Look at the concept once more, before it is folded, with its parameters still live.

        `loss` returns the denoising loss of a single noisy latent, a new one at every call.
        """
        ...

    def finish(self) -> Any:
        """Fold the concept into the model's own weights and return what its file must hold."""
        ...

    def abandon(self) -> None:
        """Take off what `attach` has put on, in whole or in part; nothing where nothing is on.

        The model, its vocabulary and what is carried are then those of before.
        """
        ...

    def save(self, state: Any, file: Path) -> None:
        """Write one concept's file."""
        ...

    def settings(self) -> dict[str, Any]:
        """The method's own settings, as plain JSON types."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the method carries from the concepts so far to the next, on the CPU."""
        ...

    def load_state_dict(self, pipe: Any, state: dict[str, Tensor]) -> None:
        """Go on after the concepts that `state` and the pipeline hold.

        Raises ValueError where the state is another method's or another pipeline's.
        """
        ...


class StaminaTraining(BaseModel):
    """Fields of `TrainingConfig` that are STAMINA's own; None leaves the run's value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: _Rate | None = None
    mask_learning_rate: _Rate | None = None
    token_learning_rate: _Rate | None = None
    hard_fraction: _Share | None = None
    forget_weight: _Weight | None = None
    preserve_weight: _Weight | None = None
    precondition: _Weight | None = None
    sparse_weight: _Weight | None = None
    target_density: _Share | None = None
    min_density: _Share | None = None
    sparse_start: _Share | None = None
    sparse_end: _Share | None = None

    def over(self, config: TrainingConfig) -> TrainingConfig:
        """The run's configuration with these values in it."""
        own = self.model_dump(exclude_none=True)
        return TrainingConfig.model_validate({**config.model_dump(), **own})


class StaminaSettings(BaseModel):
    """All of `StaminaMethod`'s settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: StaminaConfig = StaminaConfig()
    token: TokenConfig = TokenConfig()
    training: StaminaTraining = StaminaTraining()


class StaminaMethod:
    """Masked low-rank adapters on cross-attention keys and values, and an MLP token.

    The seeds of `adapter` and `token` are replaced by the concept's own, and `training` goes
    before the run's configuration. The state to go on with is W_init of every adapted layer, which
    the forgetting term and the fold need, and every concept's file, which has its prompt too.
    """

    reads: ClassVar[frozenset[str]] = METHOD_FIELDS

    def __init__(
        self,
        adapter: StaminaConfig,
        token: TokenConfig | None = None,
        training: StaminaTraining | None = None,
    ) -> None:
        self.adapter, self.token = adapter, token or TokenConfig()
        self.training = training or StaminaTraining()
        self._pipe: Any = None
        self._live: str | None = None

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        config = self.training.over(config)
        self._pipe, self._config, self._prompt = pipe, config, concept.instance_prompt
        seed = {"seed": concept.seed(config.seed)}
        check_new_token(pipe, "text_encoder", concept.token)
        adapter = self.adapter.model_copy(update=seed)
        paths = apply_stamina(pipe, adapter, adapter_name=concept.name)
        self._live = concept.name
        add_custom_token(pipe, concept.token, self.token.model_copy(update=seed))
        if AttnProcessor2_0 in map(type, pipe.unet.attn_processors.values()):
            set_stamina_attn_processor(pipe)
        self._layers = {path: pipe.unet.get_submodule(path) for path in paths}
        self._total = sum(layer.weight.numel() for layer in self._layers.values())
        self._hinges = {path: DensityHinge(config, self._total) for path in paths}
        own = self._own_prompts()
        self._preservation = Preservation(pipe, concept, self._layers, config, own)
        self._measured: dict[str, float] = {}
        rates = {
            "factors": config.learning_rate,
            "mask": config.mask_learning_rate,
            "token": config.token_learning_rate,
        }
        groups = stamina_parameters(pipe)
        return [{"params": groups[name], "lr": rate} for name, rate in rates.items()]

    def _folded(self) -> list[FoldedConcept]:
        """The concepts in the pipeline's weights, the newest last."""
        state = None if self._pipe is None else find_state(adapted_model(self._pipe))
        return [] if state is None else state.folded

    def _own_prompts(self) -> dict[str, str]:
        """Learned word -> the prompt it was learned with, where the concept knows it."""
        return {
            token: folded.state.prompt
            for folded in self._folded()
            if folded.state.prompt is not None
            for token in folded.state.tokens.get("text_encoder", {})
        }

    def begin_step(self, step: int) -> float | None:
        config = self._config
        set_stamina_step(self._pipe, step)
        self.set_sampling(step < config.first_hard_step)
        if config.measures_density(step):
            self._measured = self.densities()
        for path, layer in self._layers.items():
            set_stamina_penalties(
                layer,
                forget=config.forget_weight / self._total,
                sparse=self._hinges[path].weight(step, self._measured[path]),
            )
        adapted = sum(
            self._measured[path] * layer.weight.numel() for path, layer in self._layers.items()
        )
        return adapted / self._total

    def densities(self) -> dict[str, float]:
        sampling = self._sampling
        self.set_sampling(False)
        statistics = stamina_statistics(self._pipe)
        self.set_sampling(sampling)
        return {path: float(values["density"]) for path, values in statistics.items()}

    def set_sampling(self, sampling: bool) -> None:
        self._sampling = sampling
        set_stamina_mask_mode(self._pipe, "sample" if sampling else "hard")

    def penalty(self) -> Tensor | None:
        # the layers feed the two regularisers into their own backward
        return self._preservation.term(
            lambda paths, H: changes_together([self._layers[path] for path in paths], H)
        )

    def consolidate(self, loss: Callable[[], Tensor]) -> None:
        pass

    def finish(self) -> Any:
        state = replace(fold_stamina(self._pipe), prompt=self._prompt)
        self._folded()[-1].state = state
        self._live = None
        return state

    def abandon(self) -> None:
        if self._live is not None:
            delete_stamina(self._pipe, self._live)
            self._live = None

    def save(self, state: Any, file: Path) -> None:
        save_stamina_weights(file, state)

    def settings(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter.model_dump(mode="json", exclude={"seed"}),
            "token": self.token.model_dump(mode="json", exclude={"seed"}),
            "training": self.training.model_dump(mode="json", exclude_none=True),
        }

    def state_dict(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, folded in enumerate(self._folded()):
            data = bytearray(concept_to_bytes(folded.state))
            tensors[f"{_CONCEPT}{number:06d}"] = torch.frombuffer(data, dtype=torch.uint8)
            for path in folded.state.layers:
                initial: Any = layer_at(adapted_model(self._pipe), path)._buffers[WEIGHT_INIT]
                tensors[INITIAL + path] = initial.detach().cpu().clone()
        return tensors

    def load_state_dict(self, pipe: Any, state: dict[str, Tensor]) -> None:
        concepts = [
            concept_from_bytes(tensor.cpu().numpy().tobytes(), key)
            for key, tensor in sorted(state.items())
            if key.startswith(_CONCEPT)
        ]
        initial = {
            key.removeprefix(INITIAL): tensor
            for key, tensor in state.items()
            if key.startswith(INITIAL)
        }
        if len(concepts) + len(initial) != len(state):
            raise ValueError("the state is not one of StaminaMethod: it holds other keys")
        restore_concepts(pipe, concepts, initial)
        self._pipe = pipe
