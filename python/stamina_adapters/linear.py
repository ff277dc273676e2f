# SPDX-License-Identifier: Apache-2.0
"""`StaminaLinear`: a linear layer with a live adapter, y = x (W + s M (.) (A B))^T + bias."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from stamina_adapters.config import StaminaConfig
from stamina_adapters.hooks import has_foreign_forward, has_hooks
from stamina_adapters.masks import FP32, Factors, make_mask_generator, mask_factors
from stamina_kernels import CommittedAdapter, MaskedProjection, commit, masked_linear

WEIGHT_INIT = "stamina_weight_init"
_SCALARS = ("seed", "step", "scale", "tau", "forget_weight", "sparse_weight")
_PLAIN = ("adapter", "active", "hard")
_MOST_WEIGHTS = 1 << 26  # of one launch of many layers: their W_eff is held while it lasts


@dataclass(frozen=True)
class LayerAdapter:
    """What a layer knows of its adapter: `layer_id` is its 32-bit identity in the random stream."""

    name: str
    config: StaminaConfig
    layer_id: int
    weight_required_grad: bool
    bias_required_grad: bool


def keep_dtype(
    fn: Callable[[Tensor], Tensor], cast_too: Callable[[Tensor], bool]
) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply`, moving all tensors but casting only those that `cast_too` names.

    Adapters train in fp32 under a 16-bit model: `model.to(torch.float16)` must not cast them.
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype == tensor.dtype or cast_too(tensor):
            return moved
        return tensor.to(moved.device)

    return apply


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` a `cls` in place: same object, same Parameters, same hooks."""
    if has_foreign_forward(module):
        raise RuntimeError(f"the forward of this {type(module).__name__} was taken over")
    # a removed hook leaves the bound method of the old class behind
    vars(module).pop("forward", None)
    module.__class__ = cls


class _AttachPenalties(torch.autograd.Function):
    """Identity on the outputs of a group's layers, whose backward sends the weights of the two
    scalars of each layer whose output has a gradient into their graph."""

    @staticmethod
    def forward(
        ctx: Any,
        forget: Tensor,
        sparse: Tensor,
        forget_weight: Tensor,
        sparse_weight: Tensor,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(forget_weight, sparse_weight)
        ctx.set_materialize_grads(False)
        # not a view: callers may change y in place, as they may the output of nn.Linear
        return tuple(y.detach() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forget_weight, sparse_weight = ctx.saved_tensors
        used = [g is not None for g in grads]
        if all(used):
            return forget_weight.clone(), sparse_weight.clone(), None, None, *grads
        chosen = forget_weight.new_tensor(used)
        return forget_weight * chosen, sparse_weight * chosen, None, None, *grads


class StaminaLinear(nn.Linear):
    """A linear layer with one live adapter.

    `StaminaLinear.attach` turns an existing `nn.Linear` into one in place and `detach` turns it
    back: the object, its Parameters, state-dict keys and hooks stay what they were.

    Trainable, fp32: A [O, r] (zero at the start, so the layer computes what it did before),
    B [r, I] and the parameters of `mask`, the generator of the mask logits; where there is a buffer
    `preconditioner` C [I, I], B C takes the place of B in all formulas. 0-dim buffers, not in
    the state dict: seed, step (int64), scale, tau, forget_weight, sparse_weight (fp32). The two
    weights multiply the scalars sum (S (.) D)^2 and the sparsity sum in the gradient of every
    backward through the layer. `hard` selects M = [L > 0] instead of sampling; `active` False
    computes the plain layer. Neither follows `train()` and `eval()`.
    """

    A: nn.Parameter
    B: nn.Parameter
    preconditioner: Tensor | None
    mask: nn.Module
    seed: Tensor
    step: Tensor
    scale: Tensor
    tau: Tensor
    forget_weight: Tensor
    sparse_weight: Tensor
    adapter: LayerAdapter
    active: bool
    hard: bool

    @classmethod
    @torch.inference_mode(False)  # or nothing made here could be trained afterwards
    def attach(
        cls,
        linear: nn.Linear,
        config: StaminaConfig,
        *,
        adapter_name: str,
        layer_id: int,
        mask_seed: int,
        init_seed: int,
    ) -> "StaminaLinear":
        """Give `linear` an adapter; freezes its weight and bias.

        mask_seed (64 bits, signed) keys the random masks, init_seed the initial factors. Raises
        TypeError where `linear` is not exactly an `nn.Linear`.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be exactly nn.Linear, got {type(linear).__name__}")
        rows, columns = linear.weight.shape
        device = linear.weight.device
        generator = torch.Generator().manual_seed(init_seed)
        mask = make_mask_generator(rows, columns, config, generator)
        B = torch.rand(config.r, columns, generator=generator, **FP32) * 2 - 1
        B /= math.sqrt(columns)
        scalars = {
            "seed": torch.tensor(mask_seed, device=device),
            "step": torch.tensor(0, device=device),
            "scale": torch.tensor(config.scale, dtype=torch.float32, device=device),
            "tau": torch.tensor(config.tau, dtype=torch.float32, device=device),
            "forget_weight": torch.tensor(0.0, dtype=torch.float32, device=device),
            "sparse_weight": torch.tensor(0.0, dtype=torch.float32, device=device),
        }
        change_class(linear, cls)
        layer = cast(StaminaLinear, linear)
        layer.adapter = LayerAdapter(
            name=adapter_name,
            config=config,
            layer_id=layer_id,
            weight_required_grad=linear.weight.requires_grad,
            bias_required_grad=linear.bias is not None and linear.bias.requires_grad,
        )
        layer.active, layer.hard = True, False
        layer.A = nn.Parameter(torch.zeros(rows, config.r, dtype=torch.float32, device=device))
        layer.B = nn.Parameter(B.to(device))
        layer.mask = mask.to(device)
        layer.register_buffer("preconditioner", None, persistent=False)
        for name, value in scalars.items():
            layer.register_buffer(name, value, persistent=False)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer

    def detach(self) -> nn.Linear:
        """Drop the adapter and become a plain `nn.Linear` again.

        Weight and bias get their `requires_grad` back, unless the adapter was frozen since: what
        froze it meant them too.
        """
        if self.A.requires_grad:
            self.weight.requires_grad_(self.adapter.weight_required_grad)
            if self.bias is not None:
                self.bias.requires_grad_(self.adapter.bias_required_grad)
        for name in ("A", "B", "preconditioner", "mask", *_SCALARS, *_PLAIN):
            delattr(self, name)
        change_class(self, nn.Linear)
        return self

    @property
    def weight_init(self) -> Tensor | None:
        """The weight before any concept, [O, I], or None where none was folded yet."""
        return self._buffers.get(WEIGHT_INIT)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]. TypeError for a nested tensor."""
        if not self.active:
            return super().forward(x)
        if x.is_nested:
            raise TypeError(
                "x must not be a nested tensor while the adapter is live: pass "
                "enable_nested_tensor=False to nn.TransformerEncoder"
            )
        return project_group([self], x)[0]

    def set_preconditioner(self, C: Tensor) -> None:
        """Train B' of B = B' C from here on, C [I, I] in fp32, which is not copied.

        Raises ValueError for another shape or dtype.
        """
        wanted = (self.in_features, self.in_features)
        if C.shape != wanted or C.dtype != torch.float32:
            raise ValueError(f"C must be {wanted} in float32, got {tuple(C.shape)} in {C.dtype}")
        self.preconditioner = C

    @property
    def right_factor(self) -> Tensor:
        """B [r, I] as it enters the product A B."""
        return self.B if self.preconditioner is None else self.B @ self.preconditioner

    def projection(
        self, factors: Factors | None = None, base: Tensor | None = None
    ) -> MaskedProjection:
        """The layer as the operator takes it; `factors`: U, V and b of its mask, where they are
        made already; `base` in the place of the weight, without bias and W_init."""
        U, V, b = factors or self.mask()
        layer = (self.A, self.right_factor, U, V, b, self.adapter.layer_id)
        if base is not None:
            return MaskedProjection(base, *layer)
        return MaskedProjection(self.weight, *layer, self.bias, self.weight_init)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """density = mean M, overlap = share of M = 1 that earlier concepts changed (0 for an empty
        mask), forget = sum (S (.) D)^2, sparse = the sparsity sum; in the mask mode as set."""
        nothing = self.weight.new_empty(0, self.in_features)
        output = _operator([self], nothing)
        kept, shared = output.counts[0].tolist()
        return {
            "density": kept / self.weight.numel(),
            "overlap": shared / max(kept, 1),
            "forget": output.forget.item(),
            "sparse": output.sparse.item(),
        }

    @torch.no_grad()
    def commit(self) -> CommittedAdapter:
        """The adapter at s = alpha / r: fp16 factors, bits of [L > 0]. ValueError if not finite."""
        U, V, b = self.mask()
        return commit(self.A, self.right_factor, U, V, b, scale=self.adapter.config.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        stock = (self.weight, self.bias, self.weight_init)
        return super()._apply(keep_dtype(fn, lambda t: any(t is s for s in stock)), recurse)

    def extra_repr(self) -> str:
        config = self.adapter.config
        return f"{super().extra_repr()}, adapter={self.adapter.name!r}, r={config.r}"


def _operator(
    layers: Sequence[StaminaLinear], x: Tensor, bases: Sequence[Tensor] | None = None
) -> Any:
    first = layers[0]
    factors = mask_factors([layer.mask for layer in layers])
    return masked_linear(
        x,
        [
            layer.projection(own, None if bases is None else bases[k])
            for k, (layer, own) in enumerate(zip(layers, factors, strict=True))
        ],
        scale=first.scale,
        tau=first.tau,
        seed=first.seed,
        step=first.step,
        hard=first.hard,
        sparse_kind=first.adapter.config.sparse_kind,
    )


def project_group(layers: Sequence[StaminaLinear], x: Tensor) -> tuple[Tensor, ...]:
    """[layer(x) for layer in layers] of layers that fit into one group, in one launch."""
    output = _operator(layers, x)
    outputs: tuple[Tensor, ...] = _AttachPenalties.apply(
        output.forget,
        output.sparse,
        torch.stack([layer.forget_weight for layer in layers]),
        torch.stack([layer.sparse_weight for layer in layers]),
        *output.y.split([layer.out_features for layer in layers], dim=-1),
    )
    return outputs


def shares_launch(layer: nn.Module) -> TypeGuard[StaminaLinear]:
    """Whether `layer` may be computed in a group: layers that something else wraps, hooks or
    offloads are called as they are."""
    return isinstance(layer, StaminaLinear) and layer.active and not has_hooks(layer)


def _fits_group(layer: StaminaLinear, first: StaminaLinear) -> bool:
    """Whether the operator takes both in one group."""
    return (
        layer.adapter.name == first.adapter.name
        and layer.hard == first.hard
        and layer.in_features == first.in_features
        and (layer.bias is None) == (first.bias is None)
        and (layer.weight_init is None) == (first.weight_init is None)
    )


def launch_groups(layers: Sequence[StaminaLinear]) -> list[list[StaminaLinear]]:
    """`layers` in order, neighbours that the operator takes in one group together."""
    groups: list[list[StaminaLinear]] = []
    held = 0  # weights of the last group
    for layer in layers:
        held += layer.weight.numel()
        if groups and held <= _MOST_WEIGHTS and _fits_group(layer, groups[-1][0]):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            held = layer.weight.numel()
    return groups


def project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], the adapted ones among them in one launch.

    Layers that something else wraps, hooks or offloads are called as they are.
    """
    first = next((layer for layer in layers if isinstance(layer, StaminaLinear)), None)
    together = [
        layer
        for layer in layers
        if first is not None and shares_launch(layer) and _fits_group(layer, first)
    ]
    if len(together) < 2:
        return [layer(x) for layer in layers]
    outputs: dict[nn.Module, Tensor] = dict(zip(together, project_group(together, x), strict=True))
    return [outputs[layer] if layer in outputs else layer(x) for layer in layers]


def changes_together(layers: Sequence[StaminaLinear], x: Tensor) -> list[Tensor]:
    """x D^T [..., O] of every layer, what its adapter adds to the output.

    Neighbours that fit into a group share a launch. The backward adds no penalty.
    """
    changes: list[Tensor] = []
    for group in launch_groups(layers):
        heights = [layer.out_features for layer in group]
        # y - x W^T would be a difference of two roundings, in 16 bits larger than what is asked for
        nothing = group[0].weight.new_zeros(max(heights), group[0].in_features)
        bases = [nothing[:height] for height in heights]
        changes += _operator(group, x, bases).y.split(heights, dim=-1)
    return changes
