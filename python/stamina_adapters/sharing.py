# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all cross-attention layers of a model at once.

They depend on the encoder's states alone, which a denoiser hands to every layer as they are. So
the first layer of a forward computes them for all: a few launches instead of one a layer.
"""

import inspect
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stamina_adapters.hooks import has_hooks
from stamina_adapters.linear import launch_groups, project_group, project_together, shares_launch

_log = logging.getLogger(__name__)
_SOURCE = "encoder_hidden_states"


@dataclass
class _Forward:
    """A forward of the model: the encoder's states, whether gradients were on at its entry, and
    what the first layer that asked has computed for all, under which autocast."""

    source: Tensor
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    outputs: dict[nn.Module, Tensor] | None = None
    autocast: torch.dtype | None = None


class _PerThread(threading.local):
    """The forward that runs in this thread."""

    forward: _Forward | None = None


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class SharedProjections:
    """What the attention processors of one model compute together.

    While the model's forward runs, the first processor that projects the very tensor that the model
    was given has it projected by every adapted K and V of `attentions` whose processor has this
    object as `shared`; the others find their results in `project`. Layers whose results a whole
    forward did not use are left out from then on. Nothing is shared while gradient checkpointing is
    on, which runs parts of the forward again, while the model or a part of it is compiled, in
    replicas of `nn.DataParallel`, between threads, with blocks that something hooks or offloads,
    and with blocks that turn gradients or autocast on or off for themselves.
    """

    def __init__(self, model: nn.Module, attentions: Sequence[Any]) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self._position = parameters.index(_SOURCE) if _SOURCE in parameters else None
        self._attentions = [a for a in attentions if a.is_cross_attention and not a.norm_cross]
        self._around = _blocks_around(model, self._attentions)
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._here = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model take nothing of a forward along."""
        return {name: value for name, value in vars(self).items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _here=_PerThread())

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Install it at the entry and the exit of `model`."""
        return [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def project(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """[layer(x) for layer in layers], computed for the other processors too."""
        if torch.compiler.is_compiling():
            return project_together(layers, x)
        forward = self._here.forward
        if (
            forward is None
            or x is not forward.source
            or torch.is_grad_enabled() != forward.gradients
        ):
            return project_together(layers, x)
        if forward.outputs is None:
            # not at the entry: a model's own autocast begins after its hooks
            forward.autocast = _autocast(x)
            forward.outputs = self._compute(x)
        found = forward.outputs
        if found.keys().isdisjoint(layers) or _autocast(x) != forward.autocast:
            return project_together(layers, x)
        return [found.pop(layer) if layer in found else layer(x) for layer in layers]

    def _compute(self, x: Tensor) -> dict[nn.Module, Tensor]:
        outputs: dict[nn.Module, Tensor] = {}
        for group in launch_groups(self._layers()):
            outputs.update(zip(group, project_group(group, x), strict=True))
        return outputs

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or getattr(model, "_is_replica", False):
            return
        self._here.forward = None  # what a forward that raised has left
        x = kwargs.get(_SOURCE)
        if x is None and self._position is not None and self._position < len(args):
            x = args[self._position]
        if isinstance(x, Tensor) and not self._runs_again():
            self._here.forward = _Forward(x)

    def _leave(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        forward = self._here.forward
        if forward is not None and forward.outputs:
            unused = forward.outputs.keys()
            _log.info("%d projections were computed ahead and not used", len(unused))
            self._attentions = [a for a in self._attentions if unused.isdisjoint((a.to_k, a.to_v))]
        self._here.forward = None

    def _runs_again(self) -> bool:
        return torch.is_grad_enabled() and any(
            m.gradient_checkpointing for m in self._checkpointing
        )

    def _layers(self) -> list[Any]:
        """The projections that can be launched together now."""
        blocks = {block for around in self._around.values() for block in around}
        hooked = {block for block in blocks if has_hooks(block)}
        layers = [
            layer
            for attn in self._attentions
            if getattr(attn.processor, "shared", None) is self
            and hooked.isdisjoint(self._around[attn])
            for layer in (attn.to_k, attn.to_v)
        ]
        return [layer for layer in layers if shares_launch(layer)]


def _blocks_around(
    model: nn.Module, inner: Sequence[nn.Module]
) -> dict[nn.Module, list[nn.Module]]:
    """Every one of `inner` with the modules of `model` that hold it, itself included."""
    modules = dict(model.named_modules())
    names = {module: name.split(".") for name, module in modules.items()}
    return {m: [modules[".".join(names[m][: k + 1])] for k in range(len(names[m]))] for m in inner}
