# SPDX-License-Identifier: Apache-2.0
"""Folding: W = round(W_init + sum of the concepts' updates), always from W_init, always exact.

W_init, the weight before any concept, is kept beside each folded weight as a buffer that is not in
the state dict; the first fold makes it. Because every change of the set of folded concepts starts
from it and rounds once, unfolding any of them gives the bits of folding the rest.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stamina_adapters.concept import ConceptState, Tokens, weight_digest
from stamina_adapters.concept_checks import (
    check_concepts,
    check_layers,
    check_tokens,
    finite_weights,
)
from stamina_adapters.guards import (
    check_listed,
    check_weights_in_use,
    hook_scale,
    release_live,
    release_pipeline,
)
from stamina_adapters.linear import WEIGHT_INIT
from stamina_adapters.models import (
    FoldedConcept,
    LiveAdapter,
    ModelState,
    adapted_model,
    base_weight,
    find_state,
    keep_state,
    layer_at,
    require_live,
)
from stamina_adapters.tokens import enter_folded_tokens, fold_vectors, live_vectors
from stamina_adapters.wrappers import check_layers_are_called, has_peft_layers
from stamina_kernels import CommittedAdapter, fold_


def _paths(concepts: Iterable[FoldedConcept]) -> list[str]:
    return list(dict.fromkeys(path for concept in concepts for path in concept.state.layers))


def _at(adapter: CommittedAdapter, weight: float, device: torch.device) -> CommittedAdapter:
    A, B, bits = (t.to(device) for t in (adapter.A, adapter.B, adapter.bits))
    return CommittedAdapter(A, B, adapter.exponent, bits, adapter.scale * weight)


def _applied(
    concepts: Sequence[FoldedConcept], path: str, device: torch.device
) -> list[CommittedAdapter]:
    """What the concepts that have a weight add to the layer at `path`, on `device`."""
    return [
        _at(concept.state.layers[path], concept.weight, device)
        for concept in concepts
        if concept.weight != 0 and path in concept.state.layers
    ]


def _write(layers: dict[str, nn.Module], concepts: Sequence[FoldedConcept]) -> None:
    """W of every layer from its W_init and the concepts with a weight, one launch per device."""
    by_device: dict[torch.device, list[str]] = {}
    for path, layer in layers.items():
        by_device.setdefault(layer.weight.device, []).append(path)  # type: ignore[union-attr, arg-type]
    for device, paths in by_device.items():
        fold_(
            [layers[path].weight.detach() for path in paths],  # type: ignore[union-attr, operator]
            [layers[path]._buffers[WEIGHT_INIT] for path in paths],  # type: ignore[misc]
            [_applied(concepts, path, device) for path in paths],
        )


def _agree(expected: Tensor, weight: Tensor, initial: Tensor) -> bool:
    """Whether two folds onto W_init are the same but for rounding.

    A cast of the model since the fold rounds W and W_init apart, by half a unit in the last place
    of each; another device may sum in another order, in fp32.
    """
    unit = torch.finfo(weight.dtype)
    size = expected.float().abs() + initial.float().abs()
    allowed = unit.eps * size + unit.smallest_normal * unit.eps + 2.0**-20 * size.amax()
    return bool(((expected.float() - weight.float()).abs() <= allowed).all())


def check_untouched(model: nn.Module, concepts: Sequence[FoldedConcept]) -> None:
    """Raise where a folded weight is no longer W_init plus its concepts: the next fold starts from
    W_init and would drop what something else (a fused LoRA, a loaded checkpoint) did to it."""
    for path in _paths(concepts):
        layer = layer_at(model, path)
        initial = layer._buffers.get(WEIGHT_INIT)
        if initial is None or initial.is_meta:
            continue
        weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
        expected = torch.empty_like(initial)
        fold_([expected], [initial], [_applied(concepts, path, weight.device)])
        if not _agree(expected, weight, initial):
            raise RuntimeError(
                f"the weight of {path!r} was changed since its concepts were folded (a fused "
                "LoRA, a loaded checkpoint): the next fold would drop that; undo it, or load the "
                "concepts into a fresh model"
            )


def stacked(state: ModelState) -> list[FoldedConcept]:
    """What the weights hold besides W_init: the folded concepts, and the live one while fused.

    A copy, with weight 0 for what is left out, so that it tells how to get back.
    """
    live = state.live
    fused = [] if live is None or live.fused is None else [FoldedConcept(live.fused, live.weight)]
    on = 1.0 if state.enabled else 0.0
    return [FoldedConcept(c.state, c.weight * on) for c in [*state.folded, *fused]]


def refold(model: nn.Module, before: Sequence[FoldedConcept], state: ModelState) -> None:
    """Bring the weights from the stack `before` to what `state` now says.

    Layers that no concept uses any more lose their W_init. Raises RuntimeError where the weights
    are not what `before` made them, or a layer was adapted through another module. When a result
    overflows the weights' dtype they are that again and OverflowError is raised.
    """
    after = stacked(state)
    wanted = _paths(after)
    paths = _paths([*before, *after])
    check_weights_in_use(model, paths)
    layers = {path: layer_at(model, path) for path in paths}
    check_listed(model, state, before, layers)
    check_untouched(model, before)
    fresh = [path for path, layer in layers.items() if WEIGHT_INIT not in layer._buffers]
    for path in fresh:
        weight: Tensor = layers[path].weight  # type: ignore[assignment]
        # under inference_mode too W_init must be fit for training, where W is
        with torch.inference_mode(weight.is_inference()):
            initial = weight.detach().clone()
        layers[path].register_buffer(WEIGHT_INIT, initial, persistent=False)
    try:
        _write(layers, after)
    except Exception:
        try:
            _write(layers, before)
        finally:
            for path in fresh:
                del layers[path]._buffers[WEIGHT_INIT]
        raise
    for path in paths:
        if path not in wanted:
            del layers[path]._buffers[WEIGHT_INIT]


def _committed(
    model: nn.Module, state: ModelState, live: LiveAdapter, tokens: Tokens
) -> ConceptState:
    check_layers_are_called(model, live.layers)
    check_weights_in_use(model, live.layers)
    layers = {}
    for path, layer in live.layers.items():
        try:
            layers[path] = layer.commit()
        except ValueError as error:
            raise ValueError(f"adapter {live.name!r}, layer {path!r}: {error}") from error
    index = max((concept.state.index for concept in state.folded), default=-1) + 1
    digests = {path: weight_digest(base_weight(layer)) for path, layer in live.layers.items()}
    return ConceptState(live.name, index, live.config, layers, digests, tokens)


def sync_live(state: ModelState) -> None:
    """Let the live layers compute their adapter or not, at its weight, as `state` says."""
    live = state.live
    if live is None:
        return
    for layer in live.layers.values():
        layer.active = state.enabled and live.fused is None and live.weight != 0
        layer.scale.fill_(live.config.scale * live.weight)


def detach_live(model: nn.Module, state: ModelState) -> None:
    """Give the live layers their plain type back and drop their adapter."""
    if state.live is not None:
        release_live(model, state.live)
        frozen = has_peft_layers(model)  # by PEFT, before us or since: all but its own
        for layer in state.live.layers.values():
            layer.detach()
            if frozen:
                layer.requires_grad_(False)
        state.live = None


def _require_enabled(state: ModelState, action: str) -> None:
    if not state.enabled:
        raise RuntimeError(f"{action}: adapters are disabled, call enable_stamina first")


def fold_stamina(pipe_or_module: Any) -> ConceptState:
    """Finish the live adapter: commit it, fold it into the weights and turn the layers back.

    On a pipeline its live tokens are folded too and belong to the concept. Returns what
    `save_stamina_weights` files. Raises RuntimeError where no adapter is live (so folding twice
    does) or a live token's table or tokenizer was replaced, TypeError where a wrapper left the
    adapter out, ValueError for a value that is not finite, OverflowError where a weight leaves its
    dtype's range. Then nothing has been changed.
    """
    model = adapted_model(pipe_or_module)
    state, live = require_live(model, "fold_stamina")
    _require_enabled(state, "fold_stamina")
    vectors = live_vectors(pipe_or_module)
    concept = _committed(model, state, live, vectors)

    before, fused = stacked(state), live.fused
    state.folded.append(FoldedConcept(concept, live.weight))
    live.fused = None
    try:
        refold(model, before, state)
    except Exception:
        state.folded.pop()
        live.fused = fused
        raise
    detach_live(model, state)
    fold_vectors(pipe_or_module, vectors, concept.name)
    release_pipeline(pipe_or_module)
    return concept


def fuse_stamina(pipe_or_module: Any) -> None:
    """Put the live adapter's committed values into the weights; `unfuse_stamina` takes them out.

    The layers then cost what plain ones do, and nothing trains. Raises RuntimeError where it is
    fused already; otherwise as `fold_stamina`.
    """
    model = adapted_model(pipe_or_module)
    state, live = require_live(model, "fuse_stamina")
    _require_enabled(state, "fuse_stamina")
    if live.fused is not None:
        raise RuntimeError(f"the adapter {live.name!r} is fused already")
    before = stacked(state)
    live.fused = _committed(model, state, live, {})
    try:
        refold(model, before, state)
    except Exception:
        live.fused = None
        raise
    sync_live(state)


def unfuse_stamina(pipe_or_module: Any) -> None:
    """Undo `fuse_stamina`: the weights have the bits they had. RuntimeError if nothing is fused."""
    model = adapted_model(pipe_or_module)
    state, live = require_live(model, "unfuse_stamina")
    if live.fused is None:
        raise RuntimeError(f"the adapter {live.name!r} is not fused")
    before = stacked(state)
    live.fused = None
    refold(model, before, state)
    sync_live(state)


def fold_concepts(
    pipe_or_module: Any,
    concepts: Sequence[ConceptState],
    weights: Sequence[float] | None = None,
    *,
    verify_base: bool = True,
) -> None:
    """Fold finished concepts into a model, and their tokens into a pipeline's vocabulary.

    The order given does not matter: concepts are always summed in ascending `index`. `weights`
    multiply their scales, 1 by default. verify_base=False folds into a base whose weights differ
    from those the concept was learned on, such as a copy in another dtype.

    Raises ValueError or TypeError for a name in use, a missing or different layer, a wrong base
    digest, a token in the vocabulary, a value that is not finite; RuntimeError where a layer was
    adapted through another module; OverflowError where a weight leaves its dtype's range. Then
    nothing has been changed.
    """
    model = adapted_model(pipe_or_module)
    state = find_state(model) or ModelState()
    _require_enabled(state, "fold_concepts")
    check_concepts(concepts)
    weights = finite_weights([1.0] * len(concepts) if weights is None else weights, len(concepts))
    names = state.names
    for concept in concepts:
        if concept.name in names:
            raise ValueError(f"a concept named {concept.name!r} is folded or live already")
        names.append(concept.name)
        check_layers(model, concept, verify_base)
    check_tokens(pipe_or_module, concepts)

    before, folded = stacked(state), state.folded
    added = [FoldedConcept(c, w) for c, w in zip(concepts, weights, strict=True)]
    state.folded = sorted([*folded, *added], key=lambda c: (c.state.index, c.state.name))
    try:
        refold(model, before, state)
    except Exception:
        state.folded = folded
        raise
    for concept in concepts:
        for component, tokens in concept.tokens.items():
            enter_folded_tokens(pipe_or_module, component, tokens, concept.name)
    keep_state(model, state)
    hook_scale(model, state)


def restore_concepts(
    pipe_or_module: Any, concepts: Sequence[ConceptState], initial: dict[str, Tensor]
) -> None:
    """Take up the concepts that a reloaded model's weights hold already, to learn further.

    `initial` is W_init by module path. The weights stay as they are. Raises RuntimeError where the
    model knows concepts already or a layer was adapted through another module, ValueError where
    W_init is not the one the concepts were learned on or the weights are not the fold of exactly
    these concepts. Then nothing has been changed.
    """
    model = adapted_model(pipe_or_module)
    known = find_state(model)
    if known is not None and known.names:
        raise RuntimeError(f"the model has the concepts {', '.join(known.names)} already")
    state = known or ModelState()
    folded = [FoldedConcept(c) for c in sorted(concepts, key=lambda c: (c.index, c.name))]
    layers = {path: layer_at(model, path) for path in _paths(folded)}
    check_listed(model, state, [], layers)
    found: dict[nn.Module, Tensor] = {}
    for path, layer in layers.items():
        weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
        if path not in initial:
            raise ValueError(f"initial has no weight for {path!r}")
        before = initial[path].to(weight.device).contiguous()
        digest = weight_digest(before)
        for concept in concepts:
            if concept.digests.get(path, digest) != digest:
                raise ValueError(f"concept {concept.name!r} was learned on another {path!r}")
        expected = torch.empty_like(before)
        fold_([expected], [before], [_applied(folded, path, weight.device)])
        if weight.dtype != before.dtype or not torch.equal(expected, weight):
            raise ValueError(f"the weight of {path!r} is not the fold of the concepts given")
        found[layer] = before
    for layer, before in found.items():
        layer.register_buffer(WEIGHT_INIT, before, persistent=False)
    state.folded = folded
    keep_state(model, state)
    hook_scale(model, state)
