# SPDX-License-Identifier: Apache-2.0
"""Refusals: what would silently lose or double an adapter raises instead."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

from stamina_adapters.hooks import has_foreign_forward, is_on_disk
from stamina_adapters.linear import WEIGHT_INIT, StaminaLinear
from stamina_adapters.models import (
    FoldedConcept,
    LiveAdapter,
    ModelState,
    base_layer,
    find_state,
    layer_at,
    pipeline_models,
)
from stamina_adapters.wrappers import WrapperGuard, has_peft_layers
from stamina_kernels.checks import FLOATS

_FUSED_NAME = re.compile(r"(^|_)q?kv(_|$)|^query_key_value$")
_PIPELINE_METHODS = ("save_pretrained", "fuse_qkv_projections")
_SCALE_CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Refusal:
    """Stands in for a method of an object and raises RuntimeError when it is called.

    `messages` say why, by what refuses: an adapter and several tokens may do so at once.
    """

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("; ".join(self.messages.values()))


class PipelineRefusal:
    """Stands in for a pipeline's method: raises while a component refuses it, else calls it."""

    def __init__(self, pipe: Any, method: str) -> None:
        self.pipe, self.method = pipe, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for component in pipeline_models(self.pipe):
            refusal = component.__dict__.get(self.method)
            if isinstance(refusal, Refusal):
                refusal()
        return getattr(type(self.pipe), self.method)(self.pipe, *args, **kwargs)


def refuse(owner: Any, method: str, reason: str, message: str) -> None:
    """Make `owner.method(...)` raise until `allow` drops the reason; nothing where it has none."""
    if callable(getattr(owner, method, None)):
        refusal = owner.__dict__.get(method)
        if not isinstance(refusal, Refusal):
            refusal = owner.__dict__[method] = Refusal()
        refusal.messages[reason] = message


def allow(owner: Any, method: str, reason: str) -> None:
    """Undo `refuse` for this reason; the method is back once no other is left."""
    refusal = owner.__dict__.get(method)
    if isinstance(refusal, Refusal):
        refusal.messages.pop(reason, None)
        if not refusal.messages:
            del owner.__dict__[method]


def guard_pipeline(pipe: Any) -> None:
    """Ask the components before the pipeline's methods do half of their work.

    Only this pipeline is guarded: another one that shares the components, or the pipeline of a
    module that was adapted alone, writes its other parts before the adapted one refuses.
    """
    if isinstance(pipe, nn.Module):
        return
    for method in _PIPELINE_METHODS:
        if hasattr(type(pipe), method):
            pipe.__dict__[method] = PipelineRefusal(pipe, method)


def release_pipeline(pipe: Any) -> None:
    """Undo `guard_pipeline` once no component refuses anything."""
    if isinstance(pipe, nn.Module):
        return
    if not any(isinstance(v, Refusal) for m in pipeline_models(pipe) for v in vars(m).values()):
        for method in _PIPELINE_METHODS:
            if isinstance(pipe.__dict__.get(method), PipelineRefusal):
                del pipe.__dict__[method]


def _parents(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    names = {path.rpartition(".")[0] for path in paths}
    return {name: model.get_submodule(name) for name in sorted(names)}


def _leave_output(*_: Any) -> None:
    pass


def _hook_encoder_layers(model: nn.Module, paths: Iterable[str]) -> list[RemovableHandle]:
    """Have PyTorch's encoder layers call their linears at `paths`.

    Their fast path in eval mode reads the weights instead, and is not taken where there are hooks.
    """
    return [
        parent.register_forward_hook(_leave_output)
        for parent in _parents(model, paths).values()
        if isinstance(parent, nn.TransformerEncoderLayer)
    ]


def guard_live(model: nn.Module, live: LiveAdapter) -> None:
    """Refuse what would lose the live adapter, saving and fusing its projections, and turn off what
    would pass it by."""
    refuse(
        model,
        "save_pretrained",
        "adapter",
        f"save_pretrained would lose the unfolded adapter {live.name!r}: call fold_stamina (or "
        "unload_stamina) first",
    )
    message = (
        f"fusing projections would drop the adapter {live.name!r}, which lives on them: call "
        "fold_stamina (or unload_stamina) first"
    )
    refuse(model, "fuse_qkv_projections", "adapter", message)
    for parent in _parents(model, live.layers).values():
        refuse(parent, "fuse_projections", "adapter", message)
    live.hooks = _hook_encoder_layers(model, live.layers)
    live.hooks.append(model.register_forward_pre_hook(WrapperGuard(model, live.layers)))


def release_live(model: nn.Module, live: LiveAdapter) -> None:
    """Undo `guard_live`."""
    for hook in live.hooks:
        hook.remove()
    for method in ("save_pretrained", "fuse_qkv_projections"):
        allow(model, method, "adapter")
    for parent in _parents(model, live.layers).values():
        allow(parent, "fuse_projections", "adapter")


def _projections_are_fused(attention: nn.Module) -> bool:
    if not getattr(attention, "fused_projections", False):
        return False
    # the older attention class leaves the flag set after unfusing: there the processor tells
    return (
        hasattr(attention, "unfuse_projections")
        or "Fused" in type(getattr(attention, "processor", None)).__name__
    )


def check_reachable(layer: Any, name: str) -> None:
    """Raise where the layer's weight is elsewhere, or its forward has been taken over."""
    if layer.weight.is_meta or has_foreign_forward(layer):
        _fail_unreachable(name)


def _fail_unreachable(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name!r} is offloaded or cast layer by layer: undo that first (remove_all_hooks), "
        "and turn it on again afterwards"
    )


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold the one at `path`, from the model down."""
    module = model
    for name in path.split("."):
        yield module
        module = module.get_submodule(name)


def check_weights_in_use(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise where the weights at `paths` are not what the model computes with, or not here."""
    paths = list(paths)
    for name, parent in _parents(model, paths).items():
        if _projections_are_fused(parent):
            raise RuntimeError(
                f"{name!r} computes with fused projections, so its to_q, to_k, to_v are not used: "
                "call unfuse_qkv_projections first"
            )
    for path in paths:
        module = model.get_submodule(path)
        while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
            if getattr(module, "merged", False):
                raise RuntimeError(
                    f"a LoRA is fused into the weight of {path!r}: call unfuse_lora first"
                )
            module = inner
        check_reachable(module, path)
        if any(map(is_on_disk, _above(model, path))):  # whose files replace what is written here
            _fail_unreachable(path)


def check_listed(
    model: nn.Module,
    state: ModelState,
    folded: Iterable[FoldedConcept],
    layers: dict[str, nn.Module],
) -> None:
    """Raise where one of `layers` is adapted and neither `folded` nor the live adapter lists it:
    another state does, and what it knows of would be folded over."""
    with_init = {layer_at(model, path) for concept in folded for path in concept.state.layers}
    live = set() if state.live is None else set(state.live.layers.values())
    for path, layer in layers.items():
        if (WEIGHT_INIT in layer._buffers and layer not in with_init) or (
            isinstance(layer, StaminaLinear) and layer not in live
        ):
            raise RuntimeError(
                f"{path!r} of the {type(model).__name__} was adapted through another module (a "
                "part of it, what it is a part of, or a wrapper): use that one, or call "
                "unload_stamina on it first"
            )


def check_weight(name: str, layer: nn.Linear) -> None:
    """Raise TypeError where no fold can write the weight of `layer`; `name` says which it is."""
    if "weight" not in layer._parameters:
        raise TypeError(
            f"{name} has a weight that is no Parameter (pruned, or under weight_norm or another "
            "parametrization): it is made anew from others, make it permanent first"
        )
    if layer.weight.dtype not in FLOATS or not layer.weight.is_contiguous():
        raise TypeError(
            f"{name} must have a contiguous fp32, bf16 or fp16 weight, got "
            f"{layer.weight.dtype} with strides {layer.weight.stride()}"
        )


def check_target(path: str, layer: nn.Module) -> None:
    """Raise where `layer` cannot take an adapter, saying which and why."""
    leaf = path.rpartition(".")[2]
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.conv._ConvNd):
        raise TypeError(f"target {path!r} is a {kind}: convolutions cannot be adapted")
    if _FUSED_NAME.search(leaf):
        raise TypeError(
            f"target {path!r} is an always-fused projection ({kind}): its parts cannot be adapted"
        )
    if type(layer) is not nn.Linear:
        detail = "a subclass of nn.Linear" if isinstance(layer, nn.Linear) else "not an nn.Linear"
        raise TypeError(
            f"target {path!r} is {kind}, {detail}: only plain nn.Linear layers can be adapted"
        )
    check_weight(f"target {path!r}", layer)


def check_not_shared(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise where a weight at `paths` is used elsewhere too: two updates would overwrite it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for path in paths:
        others = owners[id(base_layer(model.get_submodule(path)).weight)]
        if len(others) > 1:
            raise TypeError(f"target {path!r} shares its weight: {', '.join(others)}")


class ScaleGuard:
    """Forward pre-hook of an adapted model: raises on an attention scale nobody would apply."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = find_state(model)
        for carrier in _SCALE_CARRIERS:
            scale = (kwargs.get(carrier) or {}).get("scale", 1.0)
            if scale == 1.0 or state is None or not state.enabled or not state.names:
                continue
            # with PEFT layers and folded concepts only, the scale is meant for PEFT and applied
            if state.live is None and has_peft_layers(model):
                continue
            raise ValueError(
                f"{carrier}={{'scale': {scale}}} does not reach STAMINA adapters "
                f"({', '.join(state.names)}): call set_stamina_adapters(pipe, names, weights)"
            )


def hook_scale(model: nn.Module, state: ModelState) -> None:
    """Install the scale guard on `model`, once."""
    if state.scale_hook is None:
        state.scale_hook = model.register_forward_pre_hook(ScaleGuard(), with_kwargs=True)
