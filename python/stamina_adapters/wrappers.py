# SPDX-License-Identifier: Apache-2.0
"""Wrappers around a layer: whether they compute through it, so that a live adapter takes part."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Packages of peft.tuners whose layers call the one below, and change what goes in or comes out.
# Others compute with a function of its weight, or are not known.
_CALL_THEIR_BASE = (
    "adalora",
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "gralora",
    "ia3",
    "lily",
    "loha",
    "lokr",
    "lora",
    "miss",
    "oft",
    "osf",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "tinylora",
    "unilora",
    "vblora",
    "vera",
    "waveft",
)


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into `model`."""
    return any(hasattr(module, "scale_layer") for module in model.modules())


def _calls_its_base(wrapper: nn.Module) -> bool:
    """Whether it is known to, or somebody's own, which is theirs to know."""
    origin = type(wrapper).__module__.split(".")
    return origin[:2] != ["peft", "tuners"] or (
        origin[2] in _CALL_THEIR_BASE
        and not getattr(wrapper, "lora_magnitude_vector", None)  # DoRA: norms of the weight's rows
        and getattr(wrapper, "miss_fn", None) != "bat"  # products with blocks of the weight
    )


def _check_called(path: str, module: nn.Module | None) -> None:
    if module is None:
        raise RuntimeError(f"{path!r} was taken out of the model while its adapter is live")
    while (inner := module._modules.get("base_layer")) is not None:
        if not _calls_its_base(module):
            raise TypeError(
                f"the wrapper of {path!r} must be known to compute by calling the layer, got "
                f"{type(module).__module__}.{type(module).__name__}: a live adapter could be left "
                "out; take it off until fold_stamina"
            )
        module = inner
    if isinstance(module, nn.Linear) and getattr(module, "weight", None) is None:
        raise TypeError(
            f"{path!r} must have its weight, something took it off to compute in its place: a live "
            "adapter would be left out; undo that until fold_stamina"
        )


def check_layers_are_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise TypeError where what wraps the layer at one of `paths` computes without calling it."""
    for path in paths:
        _check_called(path, model.get_submodule(path))


class WrapperGuard:
    """Forward pre-hook of a model with a live adapter: raises on wrappers that would leave it out,
    put on since it was attached."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        parted = {path: path.rpartition(".") for path in paths}
        # found once: to walk the paths takes longer than all else in every forward
        self._places = [(p, model.get_submodule(at), name) for p, (at, _, name) in parted.items()]

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        for path, parent, name in self._places:
            _check_called(path, parent._modules.get(name))
