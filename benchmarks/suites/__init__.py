# SPDX-License-Identifier: Apache-2.0
"""Which cases meet which rivals: `SUITES` names them."""

from benchmarks.suites import fold, linear, memory, scale
from benchmarks.suites.suite import Suite

SUITES = {
    suite.name: suite
    for suite in (linear.LINEAR_SUITE, linear.GROUP_SUITE, fold.SUITE, memory.SUITE, scale.SUITE)
}

__all__ = ["SUITES", "Suite"]
