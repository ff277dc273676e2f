# SPDX-License-Identifier: Apache-2.0
"""The ways to put T finished adapters of every layer into its weights: `FOLDERS` names them."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import RANK
from benchmarks.rivals import (
    LOHA_FACTORS,
    OURS,
    PROJECTION_NAMES,
    RIVALS,
    UNUSABLE,
    absent,
    loha_module,
)
from stamina_kernels import CommittedAdapter, fold_, unpack_bits

Adapters = Sequence[Sequence[CommittedAdapter]]


@dataclass(frozen=True)
class Folder:
    """Weights that `fold` changes in place, and what they should become.

    delta(k) is the fp64 sum of the updates of layer k; undo prepares the next fold, not timed.
    """

    weights: list[Tensor]
    initial: list[Tensor]
    fold: Callable[[], None]
    delta: Callable[[int], Tensor]
    undo: Callable[[], None] = field(default=lambda: None)

    def reset(self) -> None:
        self.undo()
        for weight, initial in zip(self.weights, self.initial, strict=True):
            weight.copy_(initial)


def _factors(adapter: CommittedAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B with their powers of two, exact in fp32."""
    ea, eb = adapter.exponent
    return adapter.A.to(dtype) * 2.0**ea, adapter.B.to(dtype) * 2.0**eb


def _exact_delta(layer: Sequence[CommittedAdapter], *, masked: bool) -> Tensor:
    """sum_t s_t M_t (.) (A_t B_t) in fp64; M = 1 unless masked."""
    total = torch.zeros((), dtype=torch.float64)
    for adapter in layer:
        A, B = _factors(adapter, torch.float64)
        update = adapter.scale * (A @ B)
        total = total + (update * unpack_bits(adapter.bits, B.shape[1]) if masked else update)
    return total


def ours(initial: list[Tensor], adapters: Adapters, backend: str | None = None) -> Folder:
    """One `stamina_kernels.fold_` call from packed bits; on a backend, or the default."""
    weights = [tensor.clone() for tensor in initial]
    return Folder(
        weights,
        initial,
        fold=lambda: fold_(weights, initial, adapters, backend=backend),
        delta=lambda k: _exact_delta(adapters[k], masked=True),
    )


def eager_masks(initial: list[Tensor], adapters: Adapters) -> Folder:
    """W += s M (.) (A B) in PyTorch, adapter by adapter, from fp32 factors and bool masks."""
    weights = [tensor.clone() for tensor in initial]
    unpacked = [
        [
            (*_factors(adapter, torch.float32), unpack_bits(adapter.bits, weight.shape[1]))
            for adapter in layer
        ]
        for weight, layer in zip(weights, adapters, strict=True)
    ]
    scale = adapters[0][0].scale

    def fold() -> None:
        for weight, layer in zip(weights, unpacked, strict=True):
            for A, B, mask in layer:
                weight += scale * mask * (A @ B)

    return Folder(weights, initial, fold, delta=lambda k: _exact_delta(adapters[k], masked=True))


def _diffusers_model(initial: Sequence[Tensor]) -> Any:
    """A diffusers model that holds nothing but the projections."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.loaders import PeftAdapterMixin

    class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for tensor in initial:
                layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
                layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
                self.layers.append(layer)

    return Model()


def peft_fuse(initial: list[Tensor], adapters: Adapters) -> Folder:
    """diffusers' `fuse_lora` of unmasked LoRAs, one for each adapter."""
    from peft import LoraConfig

    model = _diffusers_model(initial)
    config = LoraConfig(r=RANK, lora_alpha=1, target_modules=PROJECTION_NAMES)
    names = [f"adapter{t}" for t in range(len(adapters[0]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT warns that an adapter is not the first
        for name in names:
            model.add_adapter(config, name)
    model.set_adapters(names)
    weights = []
    for layer, committed in zip(model.layers, adapters, strict=True):
        weights.append(layer.base_layer.weight.data)
        for name, adapter in zip(names, committed, strict=True):
            A, B = _factors(adapter, torch.float32)
            layer.lora_A[name].weight.data.copy_(B)
            layer.lora_B[name].weight.data.copy_(A)

    def undo() -> None:
        if model.layers[0].merged:
            model.unfuse_lora()

    return Folder(
        weights,
        initial,
        fold=model.fuse_lora,
        delta=lambda k: _exact_delta(adapters[k], masked=False),
        undo=undo,
    )


def loha_merge(initial: list[Tensor], adapters: Adapters) -> Folder:
    """LyCORIS' own merge of LoHas of the same rank, one for each adapter."""
    layers, merged = [], []
    for tensor in initial:
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
        layers.append(layer)
        merged.append([loha_module(layer, RANK, tensor.device) for _ in adapters[0]])

    def fold() -> None:
        for modules in merged:
            for module in modules:
                module.merge_to()

    def delta(k: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for module in merged[k]:
            first, second, third, fourth = (getattr(module, n).double() for n in LOHA_FACTORS)
            total = total + (first @ second) * (third @ fourth)
        return total

    return Folder([layer.weight.data for layer in layers], initial, fold, delta)


def _peft_fuse_missing(device: str) -> str | None:
    return absent("diffusers")(device) or RIVALS["peft"].missing(device)


@dataclass(frozen=True)
class FoldRival:
    """How a folder is built, and why it may be absent here."""

    build: Callable[[list[Tensor], Adapters], Folder]
    missing: Callable[[str], str | None] = lambda device: None


FOLDERS = {
    "ours": FoldRival(ours),
    **{
        name: FoldRival(functools.partial(ours, backend=backend), UNUSABLE[name])
        for name, backend in OURS.items()
    },
    "eager_masks": FoldRival(eager_masks),
    "peft_fuse": FoldRival(peft_fuse, _peft_fuse_missing),
    "loha_merge": FoldRival(loha_merge, RIVALS["loha"].missing),
}
