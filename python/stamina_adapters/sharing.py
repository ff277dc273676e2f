# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all cross-attention layers of a model at once.

They depend on the encoder's states alone, which a denoiser hands to every layer as they are. So
they can be computed together where the model is entered: a few launches instead of one a layer.
"""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stamina_adapters.linear import launch_groups, project_group, project_together, shares_launch

_log = logging.getLogger(__name__)
_SOURCE = "encoder_hidden_states"


class SharedProjections:
    """What the attention processors of one model compute together.

    At the model's entry the encoder's states are projected by every adapted K and V of
    `attentions` whose processor has this object as `shared`; `project` hands the results out.
    Layers whose results a whole forward did not use are left out from then on. Nothing is shared
    while gradient checkpointing is on, which runs parts of the forward again, while the model is
    compiled, and in replicas of `nn.DataParallel`.
    """

    def __init__(self, model: nn.Module, attentions: Sequence[Any]) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self._position = parameters.index(_SOURCE) if _SOURCE in parameters else None
        self._attentions = [a for a in attentions if a.is_cross_attention and not a.norm_cross]
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._source: Tensor | None = None
        self._outputs: dict[nn.Module, Tensor] = {}

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Install it at the entry and the exit of `model`."""
        return [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def project(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """[layer(x) for layer in layers], from what was computed at the entry where that is it."""
        if x is not self._source or self._outputs.keys().isdisjoint(layers):
            return project_together(layers, x)
        return [
            self._outputs.pop(layer) if layer in self._outputs else layer(x) for layer in layers
        ]

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or getattr(model, "_is_replica", False):
            return
        self._forget()  # what a forward that raised has left
        x = kwargs.get(_SOURCE)
        if x is None and self._position is not None and self._position < len(args):
            x = args[self._position]
        if not isinstance(x, Tensor) or self._runs_again():
            return
        layers = self._layers(x.device)
        if len(layers) < 2:
            return
        self._source = x
        for group in launch_groups(layers):
            self._outputs.update(zip(group, project_group(group, x), strict=True))

    def _leave(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if unused := self._outputs.keys():
            _log.info("%d projections do not get the encoder's states as they are", len(unused))
            self._attentions = [a for a in self._attentions if unused.isdisjoint((a.to_k, a.to_v))]
        self._forget()

    def _forget(self) -> None:
        self._source = None
        self._outputs.clear()

    def _runs_again(self) -> bool:
        return torch.is_grad_enabled() and any(
            m.gradient_checkpointing for m in self._checkpointing
        )

    def _layers(self, device: torch.device) -> list[Any]:
        """The projections that can be launched together now; offloading brings others later."""
        layers = [
            layer
            for attn in self._attentions
            if getattr(attn.processor, "shared", None) is self
            for layer in (attn.to_k, attn.to_v)
        ]
        return [layer for layer in layers if shares_launch(layer) and layer.weight.device == device]
