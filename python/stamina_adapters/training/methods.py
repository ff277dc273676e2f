# SPDX-License-Identifier: Apache-2.0
"""How a concept is put into a model: the part of training that differs between methods."""

from pathlib import Path
from typing import Any, Protocol

from diffusers.models.attention_processor import AttnProcessor2_0

from stamina_adapters import (
    StaminaConfig,
    TokenConfig,
    add_custom_token,
    apply_stamina,
    fold_stamina,
    save_stamina_weights,
    set_stamina_attn_processor,
    set_stamina_mask_mode,
    set_stamina_penalties,
    set_stamina_step,
    stamina_parameters,
    stamina_statistics,
)
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.penalties import DensityHinge


class Method(Protocol):
    """One way of learning concept after concept.

    The trainer calls `attach` once for a concept, `begin_step` before every optimiser step,
    `finish` after the last one, and `save` with what `finish` returned.
    """

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

    def finish(self) -> Any:
        """Fold the concept into the model's own weights and return what its file must hold."""
        ...

    def save(self, state: Any, file: Path) -> None:
        """Write one concept's file."""
        ...

    def settings(self) -> dict[str, Any]:
        """The method's own settings, as plain JSON types."""
        ...


class StaminaMethod:
    """Masked low-rank adapters on cross-attention keys and values, and an MLP token.

    The seeds of `adapter` and `token` are replaced by the concept's own.
    """

    def __init__(self, adapter: StaminaConfig, token: TokenConfig | None = None) -> None:
        self.adapter, self.token = adapter, token or TokenConfig()

    def attach(self, pipe: Any, concept: ConceptSpec, config: TrainingConfig) -> list[dict]:
        self._pipe, self._config = pipe, config
        seed = {"seed": concept.seed(config.seed)}
        add_custom_token(pipe, concept.token, self.token.model_copy(update=seed))
        adapter = self.adapter.model_copy(update=seed)
        paths = apply_stamina(pipe, adapter, adapter_name=concept.name)
        if AttnProcessor2_0 in map(type, pipe.unet.attn_processors.values()):
            set_stamina_attn_processor(pipe)
        self._layers = {path: pipe.unet.get_submodule(path) for path in paths}
        self._total = sum(layer.weight.numel() for layer in self._layers.values())
        self._hinges = {path: DensityHinge(config, self._total) for path in paths}
        self._measured: dict[str, float] = {}
        rates = {
            "factors": config.learning_rate,
            "mask": config.mask_learning_rate,
            "token": config.token_learning_rate,
        }
        groups = stamina_parameters(pipe)
        return [{"params": groups[name], "lr": rate} for name, rate in rates.items()]

    def begin_step(self, step: int) -> float | None:
        config = self._config
        set_stamina_step(self._pipe, step)
        self.set_sampling(step < config.first_hard_step)
        if step % config.density_every == 0:
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

    def finish(self) -> Any:
        return fold_stamina(self._pipe)

    def save(self, state: Any, file: Path) -> None:
        save_stamina_weights(file, state)

    def settings(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter.model_dump(mode="json", exclude={"seed"}),
            "token": self.token.model_dump(mode="json", exclude={"seed"}),
        }
