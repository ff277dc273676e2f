# SPDX-License-Identifier: Apache-2.0
"""Where kernels are launched."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
