# SPDX-License-Identifier: Apache-2.0
"""A pipeline between two concepts: what differs from how it was loaded, taken and put back."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from stamina_adapters.concept import weight_digest
from stamina_adapters.models import pipeline_models

_COMPONENTS = ("unet", "text_encoder")


def _models(pipe: Any) -> list[nn.Module]:
    return [*pipeline_models(pipe), pipe.vae]


def pipeline_bytes(pipe: Any) -> int:
    """Size of a pipeline's parameters."""
    return sum(p.numel() * p.element_size() for m in _models(pipe) for p in m.parameters())


class PipelineSnapshot:
    """Made on a pipeline as loaded; `take` is the change since then, `put` repeats it on another.

    Weights are compared by digest, so that the untouched ones are neither kept twice nor written.
    A pipeline put back is a stock one: its tokens are plain words of its vocabulary, their rows
    part of the table. What a method keeps besides is its own to carry.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._digests = {name: weight_digest(tensor) for name, tensor in self._tensors().items()}
        self._words = set(pipe.tokenizer.get_vocab())
        self.parameters = self._count()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{component}/{name}": tensor.detach()
            for component in _COMPONENTS
            for name, tensor in getattr(self._pipe, component).state_dict().items()
        }

    def _count(self) -> int:
        return sum(p.numel() for model in _models(self._pipe) for p in model.parameters())

    @property
    def bytes(self) -> int:
        """Size of the pipeline's parameters as they are now."""
        return pipeline_bytes(self._pipe)

    def grown(self) -> int:
        """How many more parameters the pipeline has than it had when loaded."""
        return self._count() - self.parameters

    def digest(self) -> str:
        """SHA-256 over the pipeline as it was loaded: names and digests of its weights."""
        lines = "\n".join(f"{name} {value}" for name, value in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def take(self) -> tuple[dict[str, Tensor], list[str]]:
        """The changed tensors, and the words added to the vocabulary in the order of their ids."""
        changed = {
            name: tensor.cpu().clone()
            for name, tensor in self._tensors().items()
            if weight_digest(tensor) != self._digests.get(name)
        }
        vocabulary = self._pipe.tokenizer.get_vocab()
        added = sorted(vocabulary.keys() - self._words, key=lambda word: vocabulary[word])
        return changed, added

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor], words: list[str]) -> None:
        """Bring a pipeline as loaded to where `take` was called.

        Raises `ValueError` for a tensor that the pipeline does not have.
        """
        pipe = self._pipe
        if words:
            pipe.tokenizer.add_tokens(words)
        present = self._tensors()
        for name, tensor in tensors.items():
            component, key = name.split("/", 1)
            if name not in present:
                raise ValueError(f"the pipeline has no tensor {name!r}")
            model = getattr(pipe, component)
            table = model.get_input_embeddings() if component == "text_encoder" else None
            if tensor.shape == present[name].shape:
                present[name].copy_(tensor)
            elif table is not None and present[name].data_ptr() == table.weight.data_ptr():
                table.weight.data = tensor.to(table.weight.device, table.weight.dtype)
                table.num_embeddings = len(tensor)
                model.config.get_text_config().vocab_size = len(tensor)
            else:
                raise ValueError(
                    f"{name!r} has the shape {list(present[name].shape)}, not {list(tensor.shape)}"
                )
