# SPDX-License-Identifier: Apache-2.0
"""Masked low-rank adapters on models: attach, train, fold, file.

- `apply_stamina(pipe, StaminaConfig(r=16))` puts a live adapter on cross-attention K and V,
- `add_custom_token(pipe, "<v1>")` makes a word to learn the concept by,
- `stamina_parameters(pipe)` is what to optimise; `set_stamina_step(pipe, step)` every step,
- `concept = fold_stamina(pipe)` turns the pipeline into a stock one with the concept in it,
- `save_stamina_weights("concepts", concept)` files it.
"""

from stamina_adapters.adapters import (
    AdapterInfo,
    delete_stamina,
    disable_stamina,
    enable_stamina,
    get_list_stamina,
    set_stamina_adapters,
    unfold_stamina,
    unload_stamina,
)
from stamina_adapters.concept import ConceptState
from stamina_adapters.config import StaminaConfig, TokenConfig
from stamina_adapters.files import (
    load_stamina_weights,
    read_stamina_weights,
    save_stamina_weights,
)
from stamina_adapters.fold import fold_concepts, fold_stamina, fuse_stamina, unfuse_stamina
from stamina_adapters.inject import (
    apply_stamina,
    set_stamina_mask_mode,
    set_stamina_penalties,
    set_stamina_step,
    stamina_eval,
    stamina_parameters,
    stamina_statistics,
)
from stamina_adapters.linear import StaminaLinear
from stamina_adapters.processors import (
    StaminaAttnProcessor2_0,
    StaminaXFormersAttnProcessor,
    set_stamina_attn_processor,
)
from stamina_adapters.tokens import add_custom_token, fold_custom_token, remove_custom_token

__all__ = [
    "AdapterInfo",
    "ConceptState",
    "StaminaAttnProcessor2_0",
    "StaminaXFormersAttnProcessor",
    "StaminaConfig",
    "StaminaLinear",
    "TokenConfig",
    "add_custom_token",
    "apply_stamina",
    "delete_stamina",
    "disable_stamina",
    "enable_stamina",
    "fold_concepts",
    "fold_custom_token",
    "fold_stamina",
    "fuse_stamina",
    "get_list_stamina",
    "load_stamina_weights",
    "read_stamina_weights",
    "remove_custom_token",
    "save_stamina_weights",
    "set_stamina_adapters",
    "set_stamina_attn_processor",
    "set_stamina_mask_mode",
    "set_stamina_penalties",
    "set_stamina_step",
    "stamina_eval",
    "stamina_parameters",
    "stamina_statistics",
    "unfold_stamina",
    "unfuse_stamina",
    "unload_stamina",
]
