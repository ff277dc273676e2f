# SPDX-License-Identifier: Apache-2.0
"""Attention processors that compute the projections which share an input in one launch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from stamina_adapters.linear import project_together
from stamina_adapters.models import ModelState, adapted_model, find_state, keep_state
from stamina_adapters.sharing import SharedProjections


class StaminaAttnProcessor2_0:
    """`AttnProcessor2_0` of diffusers, with K and V (self-attention: Q, K and V) in one launch.

    Holds no weights: losing it loses speed, never an adapter. Layers that are not `StaminaLinear`
    are called as they are. For the `Attention` class of diffusers' UNets. Processors of one model
    with a common `shared` have K and V of all their cross-attention layers computed together.
    """

    def __init__(self, shared: SharedProjections | None = None) -> None:
        self.shared = shared

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        spatial = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if spatial is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)

        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = source.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        hidden_states = self._attend(attn, query, key, value, attention_mask)
        hidden_states = hidden_states.flatten(2).to(query.dtype)

        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if spatial is not None:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, spatial)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _project(self, attn: Any, hidden_states: Tensor, encoded: Tensor | None) -> list[Tensor]:
        if encoded is None:
            return project_together([attn.to_q, attn.to_k, attn.to_v], hidden_states)
        if attn.norm_cross:
            encoded = attn.norm_encoder_hidden_states(encoded)
        query = attn.to_q(hidden_states)
        together = project_together if self.shared is None else self.shared.project
        return [query, *together([attn.to_k, attn.to_v], encoded)]

    def _attend(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of [batch, length, heads, width]; the mask is added, [batch, heads, ...]."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class StaminaXFormersAttnProcessor(StaminaAttnProcessor2_0):
    """`StaminaAttnProcessor2_0` with the attention itself computed by xformers.

    attention_op is xformers' operator, None lets it choose. Raises ImportError without xformers.
    """

    def __init__(self, attention_op: Any = None, shared: SharedProjections | None = None) -> None:
        import xformers.ops

        super().__init__(shared)
        self.attention_op = attention_op
        self._attention: Callable[..., Tensor] = xformers.ops.memory_efficient_attention

    def _attend(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        if mask is not None:
            # xformers does not broadcast over the queries
            mask = mask.expand(-1, -1, query.shape[1], -1)
        query, key, value = (t.contiguous() for t in (query, key, value))
        return self._attention(
            query, key, value, attn_bias=mask, op=self.attention_op, scale=attn.scale
        )


def _stamina_processor(processor: Any) -> Any:
    """Our processor in the place of one of diffusers', or None where there is none."""
    from diffusers.models import attention_processor as stock

    if type(processor) is stock.AttnProcessor2_0:
        return StaminaAttnProcessor2_0()
    if type(processor) is stock.XFormersAttnProcessor:
        return StaminaXFormersAttnProcessor(processor.attention_op)
    return None


def set_stamina_attn_processor(pipe_or_unet: Any, *, share: bool = True) -> list[str]:
    """Put our processors where diffusers' default or xFormers processor is; returns those names.

    share: K and V of all cross-attention layers are computed together by the first of them. Turn it
    off where something other than diffusers' gradient checkpointing, which is looked for, runs
    parts of the model again for the backward. A second call changes it.

    Other processors (IP-Adapter, slicing) stay: adapters work under them, one launch per layer.
    `unload_stamina` puts the replaced ones back. Raises TypeError for a model without processors,
    ValueError where none of them is ours or can be replaced.
    """
    model: Any = adapted_model(pipe_or_unet)
    if not hasattr(model, "attn_processors"):
        raise TypeError(f"{type(model).__name__} has no attention processors")
    processors = model.attn_processors
    ours = {name: _stamina_processor(processor) for name, processor in processors.items()}
    replaced = {name: p for name, p in processors.items() if ours[name] is not None}
    there = any(isinstance(p, StaminaAttnProcessor2_0) for p in processors.values())
    if not replaced and not there:
        kinds = sorted({type(p).__name__ for p in processors.values()})
        raise ValueError(
            "no processor is AttnProcessor2_0 or XFormersAttnProcessor, there are only "
            f"{', '.join(kinds)}"
        )
    model.set_attn_processor({name: ours[name] or p for name, p in processors.items()})
    state = find_state(model) or ModelState()
    state.replaced_processors.update(replaced)
    _stop_sharing(state)
    if share:
        _share(model, state)
    keep_state(model, state)
    return list(replaced)


def _share(model: Any, state: ModelState) -> None:
    attentions = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "processor", None), StaminaAttnProcessor2_0)
    ]
    shared = SharedProjections(model, attentions)
    for attention in attentions:
        attention.processor.shared = shared
    state.sharing_hooks = shared.hook(model)


def _stop_sharing(state: ModelState) -> None:
    for handle in state.sharing_hooks:
        handle.remove()
    state.sharing_hooks = []


def restore_processors(model: Any, state: ModelState) -> None:
    """Undo `set_stamina_attn_processor` where its processors are still in place."""
    _stop_sharing(state)
    if state.replaced_processors:
        processors = {
            name: state.replaced_processors.get(name, processor)
            if isinstance(processor, StaminaAttnProcessor2_0)
            else processor
            for name, processor in model.attn_processors.items()
        }
        model.set_attn_processor(processors)
        state.replaced_processors.clear()
