# SPDX-License-Identifier: Apache-2.0
"""The verbs over all concepts of a model: which apply, at what weight, and taking them out."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

from torch import nn

from stamina_adapters.concept import ConceptState
from stamina_adapters.concept_checks import finite_weights
from stamina_adapters.fold import detach_live, refold, stacked, sync_live
from stamina_adapters.guards import check_listed, check_weights_in_use, release_pipeline
from stamina_adapters.models import (
    FoldedConcept,
    LiveAdapter,
    ModelState,
    adapted_model,
    drop_state,
    find_state,
)
from stamina_adapters.processors import restore_processors
from stamina_adapters.tokens import check_droppable, drop_tokens


class AdapterInfo(NamedTuple):
    """A concept on a model: being trained, its committed values in the weights for now, or folded
    for good; `weight` multiplies its scale, 0 leaves it out."""

    state: Literal["live", "fused", "folded"]
    weight: float


def get_list_stamina(pipe_or_module: Any) -> dict[str, AdapterInfo]:
    """Name -> `AdapterInfo` of every concept, in ascending order, the live one last."""
    state = find_state(adapted_model(pipe_or_module))
    if state is None:
        return {}
    infos = {c.state.name: AdapterInfo("folded", c.weight) for c in state.folded}
    if state.live is not None:
        live = state.live
        infos[live.name] = AdapterInfo("live" if live.fused is None else "fused", live.weight)
    return infos


def _require(pipe_or_module: Any, names: Sequence[str], action: str) -> ModelState:
    state = find_state(adapted_model(pipe_or_module))
    if state is None or not state.names:
        raise RuntimeError(f"{action}: the model has no concepts")
    for name in names:
        if name not in state.names:
            raise ValueError(
                f"{action}: no concept named {name!r}, there are {', '.join(state.names)}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"{action}: a name is given twice: {', '.join(names)}")
    return state


def _set_weights(pipe_or_module: Any, state: ModelState, weights: dict[str, float]) -> None:
    before = stacked(state)
    live = [] if state.live is None else [state.live]
    entries: list[FoldedConcept | LiveAdapter] = [*state.folded, *live]
    old = [entry.weight for entry in entries]
    for entry, name in zip(entries, state.names, strict=True):
        entry.weight = weights.get(name, entry.weight)
    try:
        refold(adapted_model(pipe_or_module), before, state)
    except Exception:
        for entry, weight in zip(entries, old, strict=True):
            entry.weight = weight
        raise
    sync_live(state)


def set_stamina_adapters(
    pipe_or_module: Any, names: str | Sequence[str], weights: float | Sequence[float] | None = None
) -> None:
    """Apply exactly these concepts, each at its weight (1 by default), and none of the others.

    Folded weights are computed anew from W_init. Raises ValueError for an unknown name or a weight
    that is not finite, OverflowError as `fold_stamina`.
    """
    names = [names] if isinstance(names, str) else list(names)
    state = _require(pipe_or_module, names, "set_stamina_adapters")
    if weights is None:
        weights = [1.0] * len(names)
    given = [weights] * len(names) if isinstance(weights, Real) else weights
    chosen = dict(zip(names, finite_weights(given, len(names)), strict=True))
    _set_weights(pipe_or_module, state, {name: chosen.get(name, 0.0) for name in state.names})


def unfold_stamina(pipe_or_module: Any, concepts: str | ConceptState | Sequence[Any]) -> None:
    """Take folded concepts out of the weights, in any order; `set_stamina_adapters` brings back.

    The weights get exactly the bits of folding the rest. The concepts' words stay in the
    vocabulary; `delete_stamina` removes them too. Raises ValueError for a concept that is not
    folded or not applied.
    """
    given = [concepts] if isinstance(concepts, str | ConceptState) else list(concepts)
    names = [c.name if isinstance(c, ConceptState) else c for c in given]
    state = _require(pipe_or_module, names, "unfold_stamina")
    applied = {c.state.name for c in state.folded if c.weight != 0}
    for name in names:
        if name not in applied:
            raise ValueError(f"unfold_stamina: {name!r} is not in the weights")
    _set_weights(pipe_or_module, state, dict.fromkeys(names, 0.0))


def _set_enabled(pipe_or_module: Any, enabled: bool, action: str) -> None:
    state = _require(pipe_or_module, [], action)
    before = stacked(state)
    state.enabled = enabled
    try:
        refold(adapted_model(pipe_or_module), before, state)
    except Exception:
        state.enabled = not enabled
        raise
    sync_live(state)


def disable_stamina(pipe_or_module: Any) -> None:
    """Compute with the weights before any concept, until `enable_stamina`."""
    _set_enabled(pipe_or_module, False, "disable_stamina")


def enable_stamina(pipe_or_module: Any) -> None:
    """Undo `disable_stamina`, bit for bit."""
    _set_enabled(pipe_or_module, True, "enable_stamina")


def delete_stamina(pipe_or_module: Any, names: str | Sequence[str]) -> None:
    """Remove concepts for good: their part of the weights, their tokens, the live adapter.

    Raises RuntimeError where something else added tokens after theirs or changed the weights,
    TypeError for a module whose concepts brought tokens to the pipeline, OverflowError as
    `fold_stamina`. Then nothing has been changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    state = _require(pipe_or_module, names, "delete_stamina")
    model = adapted_model(pipe_or_module)
    live_goes = state.live is not None and state.live.name in names
    before, folded = stacked(state), state.folded
    check_weights_in_use(model, [path for c in before for path in c.state.layers])
    if state.live is not None and live_goes:
        check_weights_in_use(model, state.live.layers)
    worded = [c.state.name for c in folded if c.state.name in names and c.state.tokens]
    if worded and isinstance(pipe_or_module, nn.Module):
        raise TypeError(
            f"delete_stamina: {', '.join(worded)} brought tokens: pass the pipeline, not a module"
        )
    owners = {*names, None} if live_goes else set(names)
    check_droppable(pipe_or_module, owners)
    state.folded = [concept for concept in folded if concept.state.name not in names]
    live = state.live
    fused = None if live is None else live.fused
    if live is not None and live_goes:
        live.fused = None
    try:
        refold(model, before, state)
    except Exception:
        state.folded = folded
        if live is not None:
            live.fused = fused
        raise
    if live_goes:
        detach_live(model, state)
    drop_tokens(pipe_or_module, owners)
    if not state.names:
        state.enabled = True
    release_pipeline(pipe_or_module)


def unload_stamina(pipe_or_module: Any) -> None:
    """Take everything off: weights, module types, processors, tokenizer and table as before.

    Raises RuntimeError where something else added tokens after ours or fused the projections, or a
    layer was adapted through another module.
    """
    model = adapted_model(pipe_or_module)
    state = find_state(model)
    known = state or ModelState()
    check_listed(model, known, stacked(known), dict(model.named_modules()))
    check_droppable(pipe_or_module)
    if state is not None and state.names:
        delete_stamina(pipe_or_module, state.names)
    drop_tokens(pipe_or_module)
    if state is not None:
        restore_processors(model, state)
        if state.scale_hook is not None:
            state.scale_hook.remove()
        drop_state(model)
