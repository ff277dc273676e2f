# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles without spills, within the committed table.

For sm_90 in every run, for all architectures with --all-archs (`make aot`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.aot

SCRIPT = Path(__file__).parent / "aot.py"


ALWAYS, ON_REQUEST = ["90"], ["80", "100", "120", "gfx942"]


@pytest.mark.parametrize("arch", ALWAYS + ON_REQUEST)
def test_kernels_stay_within_budget(arch, request):
    if arch in ON_REQUEST and not request.config.getoption("--all-archs"):
        pytest.skip("needs --all-archs, as in `make aot`")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--arch", arch],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # the MLPs' two; sample and six in three dtypes; sample and six at rank 32, five at rank 64
    kernels = 2 + (1 + 6 * 3) + (1 + 6) + (1 + 5)
    assert len(run.stdout.splitlines()) == kernels
