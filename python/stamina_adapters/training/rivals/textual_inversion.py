# SPDX-License-Identifier: Apache-2.0
"""Textual inversion, as a word made by an MLP (TI++): no weight of the denoiser changes.

    min_v  L_diff(x, v)

Source: Gal et al., "An Image is Worth One Word" (arXiv 2208.01618), eq. 2. The vector is made by
the token MLP that STAMINA uses. Every concept has a word of its own, so nothing can be forgotten.
"""

from typing import Any

from stamina_adapters.training.rivals.base import RivalMethod, RivalSettings


class TextualInversionSettings(RivalSettings):
    """Only the token's settings matter."""

    target_modules: tuple[()] = ()


class TextualInversion(RivalMethod):
    """Trains the token's generator only."""

    kind = "textual-inversion"
    settings_type = TextualInversionSettings

    def _target_modules(self) -> tuple[Any, ...]:
        return ()
