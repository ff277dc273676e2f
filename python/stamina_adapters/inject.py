# SPDX-License-Identifier: Apache-2.0
"""Attaching an adapter to a model, and setting what changes while it trains."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stamina_adapters.concept import check_name
from stamina_adapters.config import StaminaConfig
from stamina_adapters.fold import check_untouched, stacked
from stamina_adapters.guards import (
    check_listed,
    check_not_shared,
    check_target,
    check_weights_in_use,
    guard_live,
    guard_pipeline,
    hook_scale,
)
from stamina_adapters.linear import StaminaLinear
from stamina_adapters.models import (
    LiveAdapter,
    ModelState,
    adapted_model,
    base_layer,
    find_state,
    keep_state,
    stamina_layers,
)
from stamina_adapters.tokens import live_tokens
from stamina_adapters.wrappers import check_layers_are_called

_PEFT = ".base_layer"
_LARGEST = torch.finfo(torch.float32).max


def _hash(text: str, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[: bits // 8], "big")


def layer_id(adapter_name: str, path: str) -> int:
    """First 32 bits of SHA-256(adapter name + "/" + module path)."""
    return _hash(f"{adapter_name}/{path}", 32)


def mask_seed(config: StaminaConfig, adapter_name: str) -> int:
    """The 64 bits, signed, that key an adapter's random masks."""
    seed = _hash(f"{config.seed}/{adapter_name}", 64)
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def init_seed(config: StaminaConfig, layer_id: int) -> int:
    """The seed, in [0, 2^63), of a layer's initial factors."""
    return _hash(f"{config.seed}/{layer_id}", 64) >> 1


def find_targets(model: nn.Module, target_modules: tuple[str, ...]) -> dict[str, nn.Module]:
    """Path -> layer of all that `target_modules` names; ValueError where one names nothing."""
    unmatched = set(target_modules)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        names = [t for t in target_modules if path == t or path.endswith("." + t)]
        if names and not path.endswith(_PEFT):
            unmatched.difference_update(names)
            found[path] = base_layer(module)
    if unmatched:
        raise ValueError(
            f"target_modules: no module of {type(model).__name__} is named or ends in "
            f"{', '.join(map(repr, sorted(unmatched)))}"
        )
    return found


def _check_name(name: str, state: ModelState) -> None:
    check_name(name)
    if state.live is not None:
        raise RuntimeError(
            f"the adapter {state.live.name!r} is live: call fold_stamina or unload_stamina before "
            f"applying {name!r}"
        )
    if name in state.names:
        raise ValueError(f"adapter_name {name!r} is taken by a folded concept")


def _layer_ids(name: str, paths: list[str]) -> dict[str, int]:
    ids: dict[int, str] = {}
    for path in paths:
        other = ids.setdefault(layer_id(name, path), path)
        if other != path:
            raise ValueError(
                f"layers {other!r} and {path!r} share a layer id under the adapter name {name!r}: "
                "choose another adapter_name"
            )
    return {path: number for number, path in ids.items()}


def apply_stamina(
    pipe_or_module: Any, config: StaminaConfig | None = None, adapter_name: str = "c0"
) -> list[str]:
    """Attach a live adapter to a module, or to a pipeline's denoiser; returns the adapted paths.

    The outputs do not change: A B starts at zero. The adapted weights are frozen, everything else
    keeps its `requires_grad`. The masks are sampled until `set_stamina_mask_mode` or
    `stamina_eval` says otherwise. One adapter is live at a time; earlier ones are folded.

    Raises ValueError where a target matches nothing or the name is taken, TypeError naming a
    layer that is not a plain linear or whose wrapper does not call it, RuntimeError where an
    adapter is live already, a layer was adapted through another module, or the weights are fused,
    offloaded or merged. Then nothing has been changed.

    Only what is given knows of the adapter. One on a part (`pipe.unet.mid_block`) is folded and
    unloaded through that part: until then `save_pretrained` of the whole writes a model without it.
    The attention scale of a pipeline's call is the denoiser's: for adapters on a part or on a text
    encoder it is neither honoured nor refused, `set_stamina_adapters` sets their weight.
    """
    config = StaminaConfig() if config is None else config
    model = adapted_model(pipe_or_module)
    state = find_state(model) or ModelState()
    _check_name(adapter_name, state)
    if not state.enabled:
        raise RuntimeError("the folded concepts are disabled: call enable_stamina first")
    targets = find_targets(model, config.target_modules)
    check_listed(model, state, stacked(state), targets)
    check_layers_are_called(model, targets)
    for path, layer in targets.items():
        check_target(path, layer)
    check_weights_in_use(model, targets)
    check_not_shared(model, targets)
    check_untouched(model, stacked(state))
    ids = _layer_ids(adapter_name, list(targets))

    layers = {
        path: StaminaLinear.attach(
            layer,  # type: ignore[arg-type]
            config,
            adapter_name=adapter_name,
            layer_id=ids[path],
            mask_seed=mask_seed(config, adapter_name),
            init_seed=init_seed(config, ids[path]),
        )
        for path, layer in targets.items()
    }
    keep_state(model, state)
    state.live = LiveAdapter(adapter_name, config, layers)
    hook_scale(model, state)
    guard_live(model, state.live)
    guard_pipeline(pipe_or_module)
    return list(layers)


def _require_layers(pipe_or_module: Any, action: str) -> dict[str, StaminaLinear]:
    layers = stamina_layers(pipe_or_module)
    if not layers:
        raise RuntimeError(f"{action} needs a live adapter: call apply_stamina first")
    return layers


def _check_trainable(owner: str, parameters: Iterable[nn.Parameter]) -> None:
    if not any(parameter.requires_grad for parameter in parameters):
        raise RuntimeError(
            f"{owner}: one of its live parameters at least must have requires_grad=True, got False "
            "for all: something froze them after they were attached, as requires_grad_(False) on "
            "the whole model or adding a LoRA to it does. Do that before apply_stamina and "
            "add_custom_token, or call requires_grad_(True) on A, B and mask of every layer and on "
            "the tokens' modules; what is not to be trained is left out of the optimiser"
        )


def _require_trainable_tokens(pipe_or_module: Any) -> list[nn.Module]:
    tokens = live_tokens(pipe_or_module)
    for token, module in tokens:
        _check_trainable(f"token {token!r}", module.parameters())
    return [module for _, module in tokens]


def stamina_parameters(pipe_or_module: Any) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters: "factors" (A, B), "mask" (mask generators), "token" (custom tokens).

    Raises RuntimeError where something froze all of a layer or of a token since it was attached, or
    replaced the token table that a live token's module is in.
    """
    layers = stamina_layers(pipe_or_module)
    for path, layer in layers.items():
        _check_trainable(f"layer {path!r}", (layer.A, layer.B, *layer.mask.parameters()))
    return {
        "factors": [p for layer in layers.values() for p in (layer.A, layer.B)],
        "mask": [p for layer in layers.values() for p in layer.mask.parameters()],
        "token": [p for m in _require_trainable_tokens(pipe_or_module) for p in m.parameters()],
    }


def _fill(layers: dict[str, StaminaLinear], name: str, value: float) -> None:
    buffers: list[Tensor] = [getattr(layer, name) for layer in layers.values()]
    with torch.no_grad():  # two launches, however many layers
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, value)


def set_stamina_step(pipe_or_module: Any, step: int) -> None:
    """Set the optimiser step, which selects the random masks: equal steps draw equal masks.

    Raises RuntimeError where something froze all of a layer or of a token: no step would train it.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if not 0 <= step < 1 << 63:
        raise ValueError(f"step must be in [0, 2^63), got {step}")
    layers = _require_layers(pipe_or_module, "set_stamina_step")
    for path, layer in layers.items():
        if not layer.A.requires_grad:  # in every step: what freezes a model freezes A too
            _check_trainable(f"layer {path!r}", (layer.B, *layer.mask.parameters()))
    _require_trainable_tokens(pipe_or_module)
    _fill(layers, "step", step)


def set_stamina_penalties(
    pipe_or_module: Any, forget: float | None = None, sparse: float | None = None
) -> None:
    """Set the weights of sum (S (.) D)^2 and of the sparsity sum in each layer's gradient.

    Each backward through a layer adds forget * d(sum (S (.) D)^2) + sparse * d(sparsity sum) to the
    gradients of its adapter. Normalisation, loss scale and accumulation are the caller's: divide
    by the number of backwards per optimiser step. None leaves a weight as it is; both start at 0.
    """
    weights = {"forget": forget, "sparse": sparse}
    for name, value in weights.items():
        if value is not None and not abs(value) <= _LARGEST:
            raise ValueError(f"{name} must be finite in torch.float32, got {value}")
    layers = _require_layers(pipe_or_module, "set_stamina_penalties")
    for name, value in weights.items():
        if value is not None:
            _fill(layers, f"{name}_weight", value)


def set_stamina_mask_mode(pipe_or_module: Any, mode: Literal["sample", "hard"]) -> None:
    """Draw the masks ("sample"), or take M = [L > 0] as committing will ("hard").

    `train()` and `eval()` change neither.
    """
    if mode not in ("sample", "hard"):
        raise ValueError(f"mode must be 'sample' or 'hard', got {mode!r}")
    for layer in _require_layers(pipe_or_module, "set_stamina_mask_mode").values():
        layer.hard = mode == "hard"


@contextmanager
def stamina_eval(pipe_or_module: Any) -> Iterator[None]:
    """Hard masks inside the block, the earlier mode of every layer after it."""
    modes = [(layer, layer.hard) for layer in stamina_layers(pipe_or_module).values()]
    for layer, _ in modes:
        layer.hard = True
    try:
        yield
    finally:
        for layer, hard in modes:
            if isinstance(layer, StaminaLinear):  # not folded inside the block
                layer.hard = hard


def stamina_statistics(pipe_or_module: Any) -> dict[str, dict[str, float]]:
    """{path: {density, overlap, forget, sparse}} of the live adapter, in the mask mode as set.

    See `StaminaLinear.statistics`; computed on demand, and waits for the device.
    """
    layers = _require_layers(pipe_or_module, "stamina_statistics")
    state = find_state(adapted_model(pipe_or_module))
    if state is not None and state.live is not None and state.live.fused is not None:
        raise RuntimeError("stamina_statistics: the adapter is fused, call unfuse_stamina first")
    return {path: layer.statistics() for path, layer in layers.items()}
