# SPDX-License-Identifier: Apache-2.0
"""The ways to compute a case: `RIVALS` names them. Each is also given in fp64, to be held against.

A rival is a function from a `Problem` to a `Contestant`. Masked rivals compute the same maths as
ours, both regularisers included; PEFT LoRA and LyCORIS LoHa are other adapters on the same layer,
`dense` is the layer trained itself (forward, dX, dW) and `frozen` the layer alone.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from stamina_adapters.evaluation.cost import eager_masked_linear
from torch import Tensor, nn

from benchmarks.compiled import compiled, compiler_missing
from benchmarks.noise import Draw, Noise, Sampler, gumbels, philox_draws, two_classes, uniforms
from benchmarks.problem import FACTORS, Problem
from stamina_kernels import MaskedProjection, backends, masked_linear
from stamina_kernels.dispatch import resolve

Formula = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Contestant:
    """One way to run a case.

    run       the forward; its outputs have the upstream gradients `upstream`
    leaves    what the backward differentiates by
    formula   the outputs in fp64 from fp64 copies of the leaves, with the noise of the last restart
    known     tensors that live anyway: not counted as saved for the backward
    restart   fixes the noise of the next run
    """

    run: Callable[[], list[Tensor]]
    upstream: list[Tensor]
    leaves: list[Tensor]
    formula: Formula
    known: list[Tensor]
    restart: Callable[[], None] = lambda: None

    def backward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.leaves, self.upstream)


def member_exact(
    p: MaskedProjection, draw: Draw, scale: Tensor, tau: Tensor, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """y, forget, sparse of one projection from X, A, B, U, V, b; straight-through in the mask."""
    x, A, B, U, V, b = leaves
    logits = U @ V + b
    soft = torch.sigmoid((logits - draw.threshold) / tau.double())
    mask = draw.bits.double() + soft - soft.detach()
    delta = scale.double() * mask * (A @ B)
    weight = p.weight.double()
    assert p.weight_init is not None
    forget = ((weight - p.weight_init.double()) * delta).square().sum()
    return [x @ (weight + delta).t(), forget, logits.sigmoid().sum()]


def _group_exact(
    problem: Problem, draws: Sequence[Draw], leaves: Sequence[Tensor]
) -> list[list[Tensor]]:
    x, factors, count = leaves[0], leaves[1:], len(FACTORS)
    return [
        member_exact(
            p, draw, problem.scale, problem.tau, [x, *factors[count * k : count * (k + 1)]]
        )
        for k, (p, draw) in enumerate(zip(problem.group, draws, strict=True))
    ]


def _member_upstream(problem: Problem) -> list[Tensor]:
    """Upstream gradients of outputs in the order y, forget, sparse, per projection."""
    return [
        gradient
        for dy in problem.dy_parts()
        for gradient in (dy, problem.g_forget, problem.g_sparse)
    ]


def ours(problem: Problem, backend: str | None = None) -> Contestant:
    """`stamina_kernels.masked_linear`, all projections in one call; None: the default backend."""

    def run() -> list[Tensor]:
        out = masked_linear(
            problem.x, problem.group, scale=problem.scale, tau=problem.tau,
            seed=problem.seed, step=problem.step, backend=backend,
        )  # fmt: skip
        return [out.y, out.forget, out.sparse]

    def formula(leaves: list[Tensor]) -> list[Tensor]:
        draws = philox_draws(problem.group, problem.seed, problem.step, backend)
        y, forget, sparse = zip(*_group_exact(problem, draws, leaves), strict=True)
        return [torch.cat(y, -1), torch.stack(forget), torch.stack(sparse)]

    count = len(problem.group)
    penalties = [problem.g_forget.repeat(count), problem.g_sparse.repeat(count)]
    return Contestant(run, [problem.dy, *penalties], problem.leaves(), formula, problem.known())


def ours_separate(problem: Problem) -> Contestant:
    """`stamina_kernels.masked_linear`, one call for each projection."""

    def run() -> list[Tensor]:
        outputs: list[Tensor] = []
        for p in problem.group:
            out = masked_linear(
                problem.x, p, scale=problem.scale, tau=problem.tau,
                seed=problem.seed, step=problem.step,
            )  # fmt: skip
            outputs += [out.y, out.forget[0], out.sparse[0]]
        return outputs

    def formula(leaves: list[Tensor]) -> list[Tensor]:
        draws = philox_draws(problem.group, problem.seed, problem.step)
        return sum(_group_exact(problem, draws, leaves), [])

    return Contestant(run, _member_upstream(problem), problem.leaves(), formula, problem.known())


MaskedLinear = Callable[[Tensor, MaskedProjection, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def gumbel_masked_linear(
    x: Tensor, p: MaskedProjection, change: Tensor, scale: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The module as papers write it: a two-class hard Gumbel-softmax, dense. See `Draw`."""
    logits = p.U @ p.V + p.b
    mask = F.gumbel_softmax(two_classes(logits), tau=tau, hard=True)[..., 0]  # type: ignore[arg-type]
    delta = scale * mask * (p.A @ p.B)
    y = F.linear(x, (p.weight + delta).to(x.dtype))
    return y, (change * delta).square().sum(), torch.sigmoid(logits).sum()


def _forward(
    layer: MaskedLinear,
    x: Tensor,
    group: list[MaskedProjection],
    changes: list[Tensor],
    scale: Tensor,
    tau: Tensor,
) -> list[Tensor]:
    outputs: list[Tensor] = []
    for p, change in zip(group, changes, strict=True):
        outputs += layer(x, p, change, scale, tau)
    return outputs


@functools.cache
def _compiled_forward(layer: MaskedLinear) -> Callable[..., list[Tensor]]:
    """One for all groups of a model: those of equal shapes share what was compiled."""

    def forward(*arguments: Any) -> list[Tensor]:
        return _forward(layer, *arguments)

    return compiled(forward)


def _dense_mask(
    problem: Problem, layer: MaskedLinear, sampler: Sampler, *, fused: bool = False
) -> Contestant:
    """Masked projections in PyTorch, as written or through torch.compile."""
    changes = [
        p.weight.float() - p.weight_init.float() for p in problem.group if p.weight_init is not None
    ]
    # a compiler would make a variant for every layer's number, which the masks do not use
    group = [p._replace(layer_id=0) for p in problem.group]
    call = _compiled_forward(layer) if fused else functools.partial(_forward, layer)
    noise = Noise(problem, compiled(sampler) if fused else sampler, fused=fused)
    return Contestant(
        run=lambda: call(problem.x, group, changes, problem.scale, problem.tau),
        upstream=_member_upstream(problem),
        leaves=problem.leaves(),
        formula=lambda leaves: sum(_group_exact(problem, noise.draws, leaves), []),
        known=[*problem.known(), *changes],
        restart=noise.restart,
    )


eager = functools.partial(_dense_mask, layer=eager_masked_linear, sampler=uniforms)
gumbel = functools.partial(_dense_mask, layer=gumbel_masked_linear, sampler=gumbels)


def _linears(problem: Problem) -> list[nn.Linear]:
    layers = []
    for p in problem.group:
        out, inner = p.weight.shape
        layer = nn.Linear(inner, out, bias=False, device="meta")
        layer.weight = nn.Parameter(p.weight, requires_grad=False)
        layers.append(layer)
    return layers


class Projections(nn.Module):
    """Linear layers that share X."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


PROJECTION_NAMES = r"layers\.\d+"


def peft_lora(problem: Problem, adapters: int = 1) -> Contestant:
    """PEFT LoRA, no mask: Y = X W^T + sum_t s (X A_t^T) B_t^T; the last adapter is trained."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = problem.group[0].A.shape[1]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=PROJECTION_NAMES, init_lora_weights=False
    )
    model: Any = Projections(_linears(problem))
    names = [f"adapter{t}" for t in range(adapters)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT warns that an adapter is not the first
        for name in names:
            model = inject_adapter_in_model(config, model, name)
    leaves, known = [problem.x], problem.known()
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    for layer in model.layers:
        layer.set_adapter(names)
        pairs.append([(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names])
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        leaves += [factor.requires_grad_() for factor in pairs[-1][-1]]
    known += list(model.parameters())

    def formula(exact: list[Tensor]) -> list[Tensor]:
        x, outputs = exact[0], []
        for k, (p, earlier) in enumerate(zip(problem.group, pairs, strict=True)):
            effective = p.weight.double() + exact[2 * k + 2] @ exact[2 * k + 1]
            for A, B in earlier[:-1]:
                effective = effective + B.double() @ A.double()
            outputs.append(x @ effective.t())
        return outputs

    return Contestant(lambda: model(problem.x), problem.dy_parts(), leaves, formula, known)


LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def loha_module(layer: nn.Linear, rank: int, device: str | torch.device) -> Any:
    """A LyCORIS LoHa on a layer, dW = (w1_a w1_b) (.) (w2_a w2_b), with no factor zero."""
    from lycoris.modules.loha import LohaModule

    # bypass is its faster path: X dW^T beside the layer, without forming W + dW - W
    module = LohaModule("loha", layer, lora_dim=rank, alpha=rank, bypass_mode=True).to(device)
    nn.init.normal_(module.hada_w2_a, std=0.1)
    for name in LOHA_FACTORS:
        getattr(module, name).data.mul_(rank**-0.5)
    return module


def loha(problem: Problem) -> Contestant:
    """LyCORIS LoHa, no mask: Y = X (W + (w1_a w1_b) (.) (w2_a w2_b))^T."""
    rank = problem.group[0].A.shape[1]
    layers = _linears(problem)
    modules = [loha_module(layer, rank, problem.x.device) for layer in layers]
    for module in modules:
        module.apply_to()
    factors = [getattr(module, name) for module in modules for name in LOHA_FACTORS]

    def formula(exact: list[Tensor]) -> list[Tensor]:
        outputs = []
        for k, p in enumerate(problem.group):
            first, second, third, fourth = exact[4 * k + 1 : 4 * k + 5]
            outputs.append(exact[0] @ (p.weight.double() + (first @ second) * (third @ fourth)).t())
        return outputs

    return Contestant(
        run=lambda: [layer(problem.x) for layer in layers],
        upstream=problem.dy_parts(),
        leaves=[problem.x, *factors],
        formula=formula,
        known=[*problem.known(), *factors],
    )


def _plain(problem: Problem, *, trained: bool) -> Contestant:
    """Y = X W^T; the weights are differentiated too where they are trained."""
    weights = [p.weight.detach().clone().requires_grad_(trained) for p in problem.group]

    def formula(exact: list[Tensor]) -> list[Tensor]:
        used = exact[1:] if trained else [weight.double() for weight in weights]
        return [exact[0] @ weight.t() for weight in used]

    return Contestant(
        run=lambda: [F.linear(problem.x, weight) for weight in weights],
        upstream=problem.dy_parts(),
        leaves=[problem.x, *(weights if trained else [])],
        formula=formula,
        known=[problem.x, *weights],
    )


def absent(package: str) -> Callable[[str], str | None]:
    """What says, of any device, that the package is missing."""
    return lambda device: None if find_spec(package) else f"the package {package} is not installed"


def _present(device: str) -> None:
    return None


def _unusable(backend: str, device: str) -> str | None:
    try:
        resolve(backend, torch.device(device).type)
    except RuntimeError as error:
        return str(error)
    return None


def on_backend(backend: str) -> str:
    """The provider that is ours on this backend, whatever the device's default is."""
    return f"ours.{backend}"


OURS = {on_backend(backend): backend for backend in backends()}
UNUSABLE = {name: functools.partial(_unusable, backend) for name, backend in OURS.items()}


@dataclass(frozen=True)
class Rival:
    """How a contestant is built, why it may be absent on a device, and whether it is masked:
    then it must do all of `LinearCase.work`."""

    build: Callable[[Problem], Contestant]
    missing: Callable[[str], str | None] = _present
    masked: bool = False


RIVALS = {
    "ours": Rival(ours, masked=True),
    "ours.separate": Rival(ours_separate, masked=True),
    **{
        name: Rival(functools.partial(ours, backend=backend), UNUSABLE[name], masked=True)
        for name, backend in OURS.items()
    },
    "gumbel": Rival(gumbel, masked=True),
    "eager": Rival(eager, masked=True),
    "gumbel.compile": Rival(functools.partial(gumbel, fused=True), compiler_missing, masked=True),
    "eager.compile": Rival(functools.partial(eager, fused=True), compiler_missing, masked=True),
    "peft": Rival(peft_lora, absent("peft")),
    "loha": Rival(loha, absent("lycoris")),
    "dense": Rival(functools.partial(_plain, trained=True)),
    "frozen": Rival(functools.partial(_plain, trained=False)),
}
