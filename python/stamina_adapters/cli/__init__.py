# SPDX-License-Identifier: Apache-2.0
"""The command `stamina`. Options are spelt as in diffusers' training scripts."""

import os

# read when the libraries are imported; they warn of optional packages that nothing here needs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from stamina_adapters.cli.app import app  # noqa: E402

__all__ = ["app"]
