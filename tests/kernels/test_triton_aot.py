# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every arch, without spills, within the committed table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.aot

SCRIPT = Path(__file__).parent / "aot.py"


@pytest.mark.parametrize("arch", ["80", "90", "100", "120", "gfx942"])
def test_kernels_stay_within_budget(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--arch", arch],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) == 13, "sample, and four kernels in three dtypes"
