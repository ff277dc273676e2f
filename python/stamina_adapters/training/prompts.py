# SPDX-License-Identifier: Apache-2.0
"""Prompts as the pipeline itself gives them to its text encoder."""

from typing import Any

from torch import Tensor


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Token numbers [n, positions], padded or cut to the model's length, on its device."""
    encoded = pipe.tokenizer(
        prompts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    numbers: Tensor = encoded.input_ids.to(pipe.text_encoder.device)
    return numbers
