# SPDX-License-Identifier: Apache-2.0
"""Finding things in models: the adapted component, its linears, and the state kept on it."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stamina_adapters.concept import ConceptState
from stamina_adapters.config import StaminaConfig
from stamina_adapters.linear import WEIGHT_INIT, StaminaLinear

_STATE = "_stamina_state"
# as in diffusers' pipelines: transformer_2, image_unet; text_encoder_4, prior_text_encoder
_DENOISER = re.compile(r"([a-z]\w*_)?(unet|transformer)(_\d+)?")
_TEXT_ENCODER = re.compile(r"([a-z]\w*_)?text_encoder(_\w+)?")


@dataclass
class LiveAdapter:
    """The adapter in training; `weight` multiplies its scale, `fused` holds its committed values
    while they are in the model's weights, `hooks` goes with it."""

    name: str
    config: StaminaConfig
    layers: dict[str, StaminaLinear]
    weight: float = 1.0
    fused: ConceptState | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)


@dataclass
class FoldedConcept:
    """A concept of the stack; `weight` multiplies its scale, 0 leaves it out."""

    state: ConceptState
    weight: float = 1.0


@dataclass
class ModelState:
    """All that is kept on an adapted model, besides the layers' own tensors."""

    live: LiveAdapter | None = None
    folded: list[FoldedConcept] = field(default_factory=list)
    enabled: bool = True
    scale_hook: RemovableHandle | None = None
    replaced_processors: dict[str, Any] = field(default_factory=dict)
    sharing_hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Concepts in ascending order, the live one last."""
        live = [] if self.live is None else [self.live.name]
        return [concept.state.name for concept in self.folded] + live


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, data-parallel and PEFT's whole-model wrappers."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod  # type: ignore[assignment]
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif hasattr(type(module), "get_base_model"):  # a PeftModel
            module = module.get_base_model()  # type: ignore[operator]
        else:
            return module


def _components(pipe: Any, names: re.Pattern[str]) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in dir(pipe) if names.fullmatch(name)}
    return {name: unwrap(m) for name, m in found.items() if isinstance(m, nn.Module)}


def adapted_model(pipe_or_module: Any) -> nn.Module:
    """The model that adapters live in: the module itself, or a pipeline's denoiser.

    Raises TypeError for anything else, a pipeline with several denoisers included.
    """
    if isinstance(pipe_or_module, nn.Module):
        return unwrap(pipe_or_module)
    denoisers = _components(pipe_or_module, _DENOISER)
    if len(set(denoisers.values())) > 1:  # one's own, such as an average, lie beside the pipeline's
        registered = getattr(pipe_or_module, "config", denoisers)
        denoisers = {name: model for name, model in denoisers.items() if name in registered}
    if len(set(denoisers.values())) == 1:
        return next(iter(denoisers.values()))
    given = type(pipe_or_module).__name__
    if denoisers:
        raise TypeError(
            f"pipe_or_module: {given} has several denoisers, {', '.join(denoisers)}: pass the "
            "module that is meant"
        )
    raise TypeError(
        "pipe_or_module must be an nn.Module or a pipeline with a unet or a transformer, "
        f"got {given}"
    )


def text_encoders(pipe_or_module: Any) -> dict[str, nn.Module]:
    """Component name -> text encoder of a pipeline; none for a plain module."""
    if isinstance(pipe_or_module, nn.Module):
        return {}
    return _components(pipe_or_module, _TEXT_ENCODER)


def pipeline_models(pipe: Any) -> list[nn.Module]:
    """The models of a pipeline that this library changes: denoiser and text encoders."""
    return [*_components(pipe, _DENOISER).values(), *_components(pipe, _TEXT_ENCODER).values()]


def find_state(model: nn.Module) -> ModelState | None:
    """The state kept on `model`, None where it was never adapted."""
    return model.__dict__.get(_STATE)


def keep_state(model: nn.Module, state: ModelState) -> None:
    """Keep `state` on `model`."""
    model.__dict__[_STATE] = state


def drop_state(model: nn.Module) -> None:
    """Forget the state kept on `model`."""
    model.__dict__.pop(_STATE, None)


def require_live(model: nn.Module, action: str) -> tuple[ModelState, LiveAdapter]:
    """The model's state and live adapter; raises RuntimeError where there is none."""
    state = find_state(model)
    if state is None or state.live is None:
        folded = [] if state is None else state.names
        hint = f" (already folded: {', '.join(folded)})" if folded else ""
        raise RuntimeError(f"{action} needs a live adapter: call apply_stamina first{hint}")
    return state, state.live


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under PEFT's wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer at a stock module path, whatever PEFT wrapped around it. KeyError if absent."""
    try:
        return base_layer(model.get_submodule(path))
    except AttributeError:
        raise KeyError(f"the model has no module {path!r}") from None


def base_weight(layer: nn.Module) -> Tensor:
    """The layer's weight before any concept."""
    weight = layer._buffers.get(WEIGHT_INIT)
    return layer.weight if weight is None else weight  # type: ignore[return-value]


def stamina_layers(pipe_or_module: Any) -> dict[str, StaminaLinear]:
    """Layers with a live adapter: by stock path for the adapted model, by own path for a part."""
    model = adapted_model(pipe_or_module)
    state = find_state(model)
    if state is not None and state.live is not None:
        return state.live.layers
    return {p: m for p, m in model.named_modules() if isinstance(m, StaminaLinear)}
