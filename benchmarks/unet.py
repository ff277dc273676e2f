# SPDX-License-Identifier: Apache-2.0
"""A whole training step of a UNet of SDXL's shape, with our adapters on it or with PEFT LoRA.

Random weights: only shapes matter to time and memory. Both models share them. Ours has one folded
concept already, so that W_init is kept and the forgetting term is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import Call
from benchmarks.measure import worst
from benchmarks.unet_check import (
    Pairs,
    Passage,
    Passages,
    lora_pairs,
    lora_passages,
    stamina_pairs,
    stamina_passages,
)
from stamina_kernels import use_backend

RANK = 16
TARGETS = ("attn2.to_k", "attn2.to_v")
PENALTIES = {"forget": 1e4, "sparse": 1e-6}  # large enough for the check to see either
_TIME = {"addition_embed_type": "text_time", "use_linear_projection": True}
SDXL: dict[str, Any] = {
    "sample_size": 96,  # pictures of 768 x 768: without checkpointing they fit into 80 GB
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    **_TIME,
}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    **_TIME,
}
BATCH, TOKENS, TIME_IDS = 2, 77, 6


@dataclass(frozen=True)
class Batch:
    """Noisy latents, the noise to find, and the prompts; they need gradients as new words do."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    prompts: Tensor
    conditions: dict[str, Tensor]


def make_batch(config: dict[str, Any], device: str, dtype: torch.dtype) -> Batch:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    size = config["sample_size"]
    pooled = config["projection_class_embeddings_input_dim"]
    pooled -= TIME_IDS * config["addition_time_embed_dim"]
    return Batch(
        latents=normal(BATCH, 4, size, size),
        noise=normal(BATCH, 4, size, size),
        times=torch.tensor([301, 702], device=device),
        prompts=normal(BATCH, TOKENS, config["cross_attention_dim"]).requires_grad_(),
        conditions={
            "text_embeds": normal(BATCH, pooled),
            "time_ids": torch.full((BATCH, TIME_IDS), 8.0 * size, device=device, dtype=dtype),
        },
    )


def make_unets(config: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Two frozen UNets that share their weights."""
    from diffusers import UNet2DConditionModel

    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or 2.6 G parameters would be drawn in fp32 first
    try:
        with torch.device(device):
            first = UNet2DConditionModel(**config)
    finally:
        torch.set_default_dtype(previous)
    with torch.device("meta"):
        second = UNet2DConditionModel(**config)
    second.load_state_dict(first.state_dict(), assign=True)
    return first.requires_grad_(False), second.requires_grad_(False)


@dataclass(frozen=True)
class Trained:
    """A model in training.

    passages  notes what goes through the first and the last adapted layer
    pairs     of one of them: the output and the gradients, each with the exact one
    around    what a forward runs in
    new_step  what is set before every step; part of its update
    settings  one after another, those that are held against fp64; the last is timed
    """

    model: Any
    parameters: list[nn.Parameter]
    passages: Callable[[], AbstractContextManager[Passages]]
    pairs: Callable[[Any, Passage], Pairs]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    new_step: Callable[[], None] = lambda: None
    settings: Callable[[], Iterator[None]] = lambda: iter([None])

    def _forward(self, batch: Batch) -> Tensor:
        with self.around():
            found = self.model(
                batch.latents, batch.times, encoder_hidden_states=batch.prompts,
                added_cond_kwargs=batch.conditions,
            ).sample  # fmt: skip
        return F.mse_loss(found.float(), batch.noise.float())

    def call(self, batch: Batch) -> Call:
        """Forward with its loss, backward, and AdamW's update."""
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

        def update(_: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()
            batch.prompts.grad = None
            self.new_step()

        return Call(
            {
                "forward": lambda _: self._forward(batch),
                "backward": lambda loss: loss.backward(),
                "update": update,
            }
        )

    def error(self, batch: Batch) -> float:
        """Of outputs and gradients of the first and the last adapted layer, in a whole step."""
        return max(self._error(batch) for _ in self.settings())

    def _error(self, batch: Batch) -> float:
        with self.passages() as passages:
            self._forward(batch).backward()  # type: ignore[no-untyped-call]
        with self.around():
            found = worst(pair for it in passages.items() for pair in self.pairs(*it))
        for leaf in (*self.parameters, batch.prompts):
            leaf.grad = None
        return found


def _adapted(model: nn.Module) -> list[Any]:
    return [layer for path, layer in model.named_modules() if path.endswith(TARGETS)]


def _ends(model: nn.Module) -> list[Any]:
    """The first and the last adapted layer."""
    layers = _adapted(model)
    return [layers[0], layers[-1]]


def _fill(parameters: list[nn.Parameter]) -> None:
    """Factors that are zero at the start would hide a wrong update."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def with_lora(model: Any) -> Trained:
    """PEFT LoRA in the model's dtype, PEFT's own choice."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    inject_adapter_in_model(config, model, "c0")
    parameters = [p for p in model.parameters() if p.requires_grad]
    _fill(parameters)
    return Trained(model, parameters, partial(lora_passages, _ends(model)), lora_pairs)


def with_stamina(model: Any) -> Callable[[str], Trained]:
    """Our second concept on the model; the result gives it on a backend."""
    from stamina_adapters import (
        StaminaConfig,
        apply_stamina,
        fold_stamina,
        set_stamina_attn_processor,
        set_stamina_penalties,
        set_stamina_step,
        stamina_parameters,
    )

    config = StaminaConfig(r=RANK, mask_rank=RANK, target_modules=TARGETS)
    for name in ("c0", "c1"):
        if name == "c1":
            fold_stamina(model)
        apply_stamina(model, config, adapter_name=name)
        _fill([layer.A for layer in _adapted(model)])
    set_stamina_attn_processor(model)
    parameters = sum(stamina_parameters(model).values(), [])
    steps = count(1)

    def with_and_without_penalties() -> Iterator[None]:
        # of the mask's gradients the loss's own share may be too small to be seen beside them
        for share in (0.0, 1.0):
            set_stamina_penalties(model, **{name: share * w for name, w in PENALTIES.items()})
            yield

    return lambda backend: Trained(
        model,
        parameters,
        partial(stamina_passages, model, _ends(model)),
        stamina_pairs,
        partial(use_backend, backend),
        lambda: set_stamina_step(model, next(steps)),
        with_and_without_penalties,
    )
