# SPDX-License-Identifier: Apache-2.0
"""Every method that can be compared, by name; what it is; what a tuning run tries.

    METHODS[name](overrides)   the method, with some of its own settings changed; pydantic's
                               ValidationError for a setting that it does not have
    describe(name)             one sentence and the source
    SEARCH[name]               overrides to try, equally many for every method

Ablations take STAMINA's settings. Steps, batch, schedule, data and seeds are the run's
(`TrainingConfig`) and the same for all.
"""

from collections.abc import Callable
from typing import Any

from stamina_adapters.training.ablations import ABLATIONS, merged
from stamina_adapters.training.methods import Method, StaminaMethod, StaminaSettings
from stamina_adapters.training.rivals.base import RivalMethod
from stamina_adapters.training.rivals.c_lora import CLoRA
from stamina_adapters.training.rivals.custom_diffusion import CustomDiffusion
from stamina_adapters.training.rivals.ewc import EWC
from stamina_adapters.training.rivals.lora import LoRA, MergedLoRA
from stamina_adapters.training.rivals.masked import MaskedMethod
from stamina_adapters.training.rivals.orthogonal import OrthogonalAdaptation
from stamina_adapters.training.rivals.sd_lora import SDLoRA
from stamina_adapters.training.rivals.textual_inversion import TextualInversion

Overrides = dict[str, Any]

_RIVALS: tuple[type[RivalMethod], ...] = (
    TextualInversion,
    LoRA,
    MergedLoRA,
    CustomDiffusion,
    EWC,
    CLoRA,
    OrthogonalAdaptation,
    SDLoRA,
)


def _stamina(overrides: Overrides) -> StaminaMethod:
    settings = StaminaSettings.model_validate(overrides)
    return StaminaMethod(settings.adapter, settings.token, settings.training)


def _ablation(name: str) -> Callable[[Overrides], Method]:
    ablation = ABLATIONS[name]

    def build(overrides: Overrides) -> Method:
        changed = merged(overrides, ablation.changes)
        if ablation.replaced:
            return MaskedMethod.build({"stamina": changed, **ablation.replaced})
        return _stamina(changed)

    return build


METHODS: dict[str, Callable[[Overrides], Method]] = {
    "stamina": _stamina,
    **{rival.kind: rival.build for rival in _RIVALS},
    **{name: _ablation(name) for name in ABLATIONS},
}

_DESCRIPTIONS = {
    "stamina": "Low-rank deltas under hard masks that a sparsity and a forgetting term shape, and "
    "an MLP token. Source: Smith et al., arXiv 2311.18763; formulas in stamina_kernels.reference",
    "textual-inversion": "Only the word is trained, by an MLP (TI++). "
    "Source: Gal et al., arXiv 2208.01618, eq. 2",
    "lora": "One LoRA after the other, each learned on the last and folded. "
    "Source: Hu et al., arXiv 2106.09685, eq. 3",
    "lora-merge": "Every LoRA learned on the initial weights, all of them summed. "
    "Source: Hu et al., arXiv 2106.09685, eq. 3",
    "custom-diffusion": "Full key and value weights, trained in sequence. "
    "Source: Kumari et al., arXiv 2212.04488, section 3.2",
    "ewc": "Full key and value weights under a diagonal Fisher penalty for each earlier concept. "
    "Source: Kirkpatrick et al., arXiv 1612.00796, eq. 3",
    "c-lora": "LoRA that is penalised where earlier ones changed the weights, and a vector token. "
    "Source: Smith et al., arXiv 2304.06027, eqs. 1 to 3",
    "orthogonal": "LoRA whose input factors are fixed and orthogonal across concepts, learned on "
    "the initial weights and summed. Source: Po et al., arXiv 2312.02432",
    "sd-lora": "LoRA on top of all earlier ones, of which only the magnitudes are trained on. "
    "Source: Wu et al., arXiv 2501.13198",
}


def describe(name: str) -> str:
    """What a method is in one sentence, and where it comes from. KeyError for an unknown name."""
    if name in ABLATIONS:
        return f"STAMINA, but: {ABLATIONS[name].sentence}. Source: this library"
    return _DESCRIPTIONS[name]


def _trials(names: str, *values: tuple[Any, ...]) -> list[Overrides]:
    """Overrides row by row: the names' values, where a row has one."""
    return [dict(zip(names.split(), row, strict=False)) for row in values]


# A second round. The first entry of a rival's list is the best of a first round of six (A_mmd +
# F_mmd), which varied the same settings but for the token's rate; textual inversion showed there
# that this rate matters to every method. C-LoRA's, whose token is a vector, was the last of its
# range in the second and has a third. Ranges, and STAMINA's densities and mask rate, are of runs on
# identities that are never evaluated.
_KEEPING = "learning_rate preserve_weight precondition token_learning_rate"
_STAMINA = {"mask_learning_rate": 2e-2, "target_density": 0.25, "min_density": 0.15}
_STAMINA_SEARCH = [
    {"training": {**_STAMINA, **trial}}
    for trial in _trials(
        _KEEPING,
        (2e-2, 1.0, 10.0, 0.1),
        (2e-2, 2.0, 10.0, 0.1),
        (2e-2, 1.0, 30.0, 0.1),
        (2e-2, 2.0, 30.0, 0.1),
        (1e-2, 1.0, 10.0, 0.1),
        (2e-2, 2.0, 10.0, 0.05),
    )
]
# without a mask all weights move: the same size of change takes a smaller rate
_UNMASKED_SEARCH = [
    {"training": trial}
    for trial in _trials(
        _KEEPING,
        (1e-2, 1.0, 10.0, 0.1),
        (1e-2, 2.0, 10.0, 0.1),
        (6e-3, 1.0, 10.0, 0.1),
        (1e-2, 2.0, 30.0, 0.1),
        (2e-2, 2.0, 30.0, 0.1),
        (1e-2, 2.0, 10.0, 0.05),
    )
]

SEARCH: dict[str, list[Overrides]] = {
    "stamina": _STAMINA_SEARCH,
    "textual-inversion": _trials("token_learning_rate", (0.1,), (0.05,), (0.07,), (0.15,), (0.2,))
    + [{"token_learning_rate": 0.1, "token": {"hidden": 256}}],
    "lora": _trials(
        "learning_rate r token_learning_rate",
        (1e-3, 4),
        (1e-3, 4, 0.02),
        (1e-3, 4, 0.1),
        (3e-3, 4, 0.02),
        (3e-3, 4, 0.1),
        (1e-3, 16, 0.1),
    ),
    "lora-merge": _trials(
        "learning_rate r token_learning_rate",
        (3e-3, 4),
        (3e-3, 4, 0.02),
        (3e-3, 4, 0.1),
        (1e-3, 16, 0.02),
        (1e-3, 16, 0.1),
        (2e-3, 8, 0.02),
    ),
    "custom-diffusion": _trials(
        "learning_rate token_learning_rate",
        (6e-4,),
        (6e-4, 0.02),
        (6e-4, 0.1),
        (3e-4, 0.02),
        (3e-4, 0.1),
        (1e-3, 0.02),
    ),
    "ewc": _trials(
        "learning_rate fisher_weight token_learning_rate",
        (1e-3, 1e2),
        (1e-3, 1e4),
        (1e-3, 1e4, 0.02),
        (1e-3, 1e4, 0.1),
        (1e-3, 1e5, 0.1),
        (6e-4, 1e3, 0.02),
    ),
    "c-lora": _trials(
        "learning_rate forget_weight token_learning_rate",
        (2e-3, 1.0, 0.06),
        (2e-3, 1.0, 0.15),
        (2e-3, 1.0, 0.3),
        (2e-3, 10.0, 0.15),
        (3e-3, 1.0, 0.15),
        (2e-3, 0.3, 0.15),
    ),
    "orthogonal": _trials(
        "learning_rate r token_learning_rate",
        (1e-2, 4),
        (1e-2, 4, 0.02),
        (1e-2, 4, 0.1),
        (1e-2, 8, 0.02),
        (1e-2, 8, 0.1),
        (2e-2, 8, 0.02),
    ),
    "sd-lora": _trials(
        "learning_rate magnitude_learning_rate token_learning_rate",
        (3e-3, 1e-3),
        (3e-3, 1e-3, 0.02),
        (3e-3, 1e-3, 0.1),
        (1e-3, 1e-3, 0.02),
        (1e-3, 1e-3, 0.1),
        (3e-3, 3e-4, 0.02),
    ),
    **dict.fromkeys(ABLATIONS, _STAMINA_SEARCH),
    "ablation-no-mask": _UNMASKED_SEARCH,
}
