# SPDX-License-Identifier: Apache-2.0
from benchmarks.cli import app

app(prog_name="python -m benchmarks")
