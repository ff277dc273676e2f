# SPDX-License-Identifier: Apache-2.0
"""What finished concepts must be to be folded into a model; checked before anything is changed."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from stamina_adapters.concept import ConceptState, weight_digest
from stamina_adapters.guards import check_not_shared, check_weight, check_weights_in_use
from stamina_adapters.models import base_weight, layer_at
from stamina_adapters.vocabularies import check_new_token, check_vector


class WrongBaseError(ValueError):
    """A concept meets a weight that is not the one that it was learned on."""


def check_concepts(concepts: Any) -> None:
    """Raise TypeError unless `concepts` is a sequence of `ConceptState`."""
    wanted = "concepts must be a sequence of ConceptState"
    if not isinstance(concepts, Collection):
        raise TypeError(f"{wanted}, got a {type(concepts).__name__}")
    for concept in concepts:
        if not isinstance(concept, ConceptState):
            raise TypeError(f"{wanted}, got one with a {type(concept).__name__}")


def finite_weights(weights: Any, count: int) -> list[float]:
    """`weights` as floats. Raises unless they are `count` finite numbers."""
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"weights must be a sequence of numbers, got {weights!r}") from None
    if len(numbers) != count:
        raise ValueError(f"weights must have one entry per concept ({count}), got {len(numbers)}")
    for number in numbers:
        if not torch.isfinite(torch.tensor(number)):
            raise ValueError(f"weights must be finite, got {number}")
    return numbers


def check_layers(model: nn.Module, concept: ConceptState, verify_base: bool) -> None:
    """Raise where the layers of `concept` are missing or different, or its values not finite."""
    for path, adapter in concept.layers.items():
        try:
            layer = layer_at(model, path)
        except KeyError as error:
            raise ValueError(f"concept {concept.name!r}: {error.args[0]}") from None
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"concept {concept.name!r}: {path!r} is {type(layer).__name__}")
        check_weight(f"concept {concept.name!r}: {path!r}", layer)
        shape = (adapter.A.shape[0], adapter.B.shape[1])
        if layer.weight.shape != shape:
            raise ValueError(
                f"concept {concept.name!r}: {path!r} has a weight of shape "
                f"{list(layer.weight.shape)}, the concept is for {list(shape)}"
            )
        for name in ("A", "B"):
            if not torch.isfinite(getattr(adapter, name)).all():
                raise ValueError(f"concept {concept.name!r}: {path}.{name} is not finite")
    check_weights_in_use(model, concept.layers)
    check_not_shared(model, concept.layers)
    for path in concept.layers if verify_base else ():
        if weight_digest(base_weight(layer_at(model, path))) != concept.digests[path]:
            raise WrongBaseError(
                f"concept {concept.name!r}: the weight of {path!r} is not the one that it was "
                "learned on (wrong base digest)"
            )


def check_tokens(pipe_or_module: Any, concepts: Sequence[ConceptState]) -> None:
    """Raise where the words of `concepts` cannot be added to the pipeline's vocabularies."""
    seen: set[tuple[str, str]] = set()
    for concept in concepts:
        for component, tokens in concept.tokens.items():
            if isinstance(pipe_or_module, nn.Module):
                raise TypeError(
                    f"concept {concept.name!r} brings the tokens {', '.join(tokens)}: "
                    "pass the pipeline, not a module"
                )
            for token, vector in tokens.items():
                check_new_token(pipe_or_module, component, token)
                try:
                    check_vector(pipe_or_module, component, token, vector)
                except ValueError as error:
                    raise ValueError(f"concept {concept.name!r}: {error}") from None
                if (component, token) in seen:
                    raise ValueError(f"two concepts bring the token {token!r}")
                seen.add((component, token))
