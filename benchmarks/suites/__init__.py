# SPDX-License-Identifier: Apache-2.0
"""Which cases meet which rivals: `SUITES` names them."""

from benchmarks.suites import (
    fold,
    gpu_kv,
    gpu_ops,
    gpu_step,
    gpu_unet,
    linear,
    memory,
    scale,
)
from benchmarks.suites.suite import Suite

SUITES = {
    suite.name: suite
    for suite in (
        linear.LINEAR_SUITE,
        linear.GROUP_SUITE,
        fold.SUITE,
        memory.SUITE,
        scale.SUITE,
        gpu_ops.SUITE,
        gpu_kv.SUITE,
        gpu_step.SUITE,
        gpu_unet.SUITE,
    )
}

__all__ = ["SUITES", "Suite"]
