# SPDX-License-Identifier: Apache-2.0
"""Whether something else works through a module's call: hooks, offloading, layerwise casting.

Such a module must be called as it is: its weights may not even be there before.
"""

from torch import nn


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether something (offloading, layerwise casting) took the module's forward over."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        hasattr(module, "_hf_hook")
        or hasattr(module, "_diffusers_hook")
        or has_foreign_forward(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps the weights below the module in files."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks = {} if registry is None else registry.hooks
    configs = [getattr(hook, "config", None) for hook in hooks.values()]
    return any(getattr(config, "offload_to_disk_path", None) for config in configs)
