# SPDX-License-Identifier: Apache-2.0
"""Settings of an adapter and of a custom token.

The sizes are this library's own: the paper's are not published with its sources.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

_FP32 = torch.finfo(torch.float32)  # that of the operator's scalars
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class StaminaConfig(BaseModel):
    """One concept's masked low-rank adapter, W + (alpha / r) M (.) (A B) per adapted projection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, le=256, description="rank of A B")
    alpha: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="numerator of the scale s = alpha / rank; None: the rank, so that s = 1",
    )
    mask_rank: int = Field(
        default=16, ge=1, le=256, description="rank of U V in the mask logits L = U V + b"
    )
    target_modules: tuple[str, ...] = Field(
        default=("attn2.to_k", "attn2.to_v"),
        min_length=1,
        description="a layer is adapted when its path in the model is one of these or ends in "
        '"." + one of these',
    )
    mask_generator: Literal["embedding_mlp", "constant_mlp", "free"] = Field(
        default="embedding_mlp",
        description="where U and V come from: embedding_mlp (MLPs over learned row and column "
        "embeddings), constant_mlp (MLPs on a constant input), free (parameters)",
    )
    density_init: float = Field(
        default=0.7,
        gt=0,
        lt=1,
        description="b starts at its logit, so the mean chance to keep a weight is near it",
    )
    logit_std: float = Field(
        default=1.0,
        ge=_FP32.tiny,
        le=_FP32.max,
        description="standard deviation of U V at the start",
    )
    tau: float = Field(
        default=1.0,
        ge=_FP32.tiny,
        le=_FP32.max,
        description="temperature of the straight-through gradient; the mask does not depend on it",
    )
    sparse_kind: Literal["sigmoid", "relu"] = Field(
        default="sigmoid", description="sparsity scalar: sum sigmoid(L) or sum relu(L)"
    )
    seed: Seed = Field(
        default=0, description="seeds the initial factors and, with the adapter's name, the masks"
    )

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if not _FP32.tiny <= self.scale <= _FP32.max:
            raise ValueError(
                f"alpha / r must be between {_FP32.tiny} and {_FP32.max}, got {self.scale}"
            )
        return self

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class TokenConfig(BaseModel):
    """How a custom token's vector is made.

    generator  "mlp" (an MLP on a constant input) or "direct" (the vector itself is the parameter)
    hidden     hidden width of the MLP
    seed       seeds the initial vector, whose norm is the mean norm of the table's rows
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    generator: Literal["mlp", "direct"] = "mlp"
    hidden: int = Field(default=64, ge=1)
    seed: Seed = 0
