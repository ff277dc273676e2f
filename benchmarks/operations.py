# SPDX-License-Identifier: Apache-2.0
"""Single calls that are timed alone: `OPERATIONS` names them, by the pass that their rows have.

Peers in the same run say what the machine can do: `copy` moves the bytes of W to W_eff and nothing
else, `frozen` is the vendor's product of the same shape.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPES, LinearCase, Work
from benchmarks.folders import Folder
from benchmarks.measure import worst
from benchmarks.noise import philox_draws
from benchmarks.problem import Problem, random_bits
from benchmarks.rivals import OURS, UNUSABLE
from stamina_kernels import MaskedProjection, compose, masked_linear, sample_mask, unpack_bits

Pairs = Iterable[tuple[Tensor, Tensor]]
"""(result, what it should be in fp64)."""

# An fp32 chain of 16 products of order one is off by less; there a bit says nothing of accuracy.
_THRESHOLD_ROUNDING = 1e-5


@dataclass(frozen=True)
class Operation:
    """One call.

    run      returns its outputs
    pairs    what they are and should be
    work     what the call must at least do; for `copy`, what it does
    prepare  undoes what a call changed; not timed
    """

    run: Callable[[], list[Tensor]]
    pairs: Callable[[Sequence[Tensor]], Pairs]
    work: Work
    prepare: Callable[[], None] = lambda: None

    def error(self) -> float:
        """Relative RMS error of the worst output."""
        self.prepare()
        return worst(self.pairs(self.run()))


def _rows(problem: Problem, tensor: Tensor) -> list[Tensor]:
    """A tensor stacked along the rows of all weights, projection by projection."""
    return list(tensor.split([len(p.weight) for p in problem.group]))


def _exact_weight(p: MaskedProjection, scale: Tensor, mask: Tensor) -> Tensor:
    """W + s M (.) (A B) in fp64."""
    delta = scale.double() * mask * (p.A.double() @ p.B.double())
    return (p.weight.double() + delta).detach()


def _weights_moved(case: LinearCase, matrices: int, flops_per_weight: float) -> Work:
    """W, W_init or W_eff, so many of them, and the bits."""
    size = DTYPES[case.dtype].itemsize
    return Work(case.weights * flops_per_weight, case.weights * (matrices * size + 1 / 8))


def _random_bits(problem: Problem) -> Tensor:
    rows = sum(len(p.weight) for p in problem.group)
    return random_bits(problem.x.shape[1], rows, problem.x.device)


def _composed(problem: Problem, bits: Tensor) -> list[Tensor]:
    inner = problem.x.shape[1]
    masks = [unpack_bits(part, inner) for part in _rows(problem, bits)]
    return [_exact_weight(p, problem.scale, m) for p, m in zip(problem.group, masks, strict=True)]


def compose_bits(case: LinearCase, problem: Problem, backend: str) -> Operation:
    """W_eff of the group from its bits."""
    bits = _random_bits(problem)

    def pairs(outputs: Sequence[Tensor]) -> Pairs:
        return zip(_rows(problem, outputs[0]), _composed(problem, bits), strict=True)

    return Operation(
        lambda: [compose(problem.group, bits, scale=problem.scale, backend=backend)],
        pairs,
        _weights_moved(case, 2, 2.0 * case.rank),
    )


def compose_eager(case: LinearCase, problem: Problem) -> Operation:
    """The same in PyTorch, op by op from bool masks."""
    bits = _random_bits(problem)
    masks = [unpack_bits(part, case.inner) for part in _rows(problem, bits)]

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [
                (p.weight + problem.scale * mask * (p.A @ p.B)).to(p.weight.dtype)
                for p, mask in zip(problem.group, masks, strict=True)
            ]

    return Operation(
        run,
        lambda outputs: zip(outputs, _composed(problem, bits), strict=True),
        _weights_moved(case, 2, 2.0 * case.rank),
    )


def copy_of(source: Tensor) -> Operation:
    """A copy: each byte read and written."""
    target = torch.empty_like(source)
    return Operation(
        lambda: [target.copy_(source)],
        lambda outputs: [(outputs[0], source.double())],
        Work(0.0, 2.0 * source.nbytes),
    )


def copy(case: LinearCase, problem: Problem) -> Operation:
    """As many bytes as reading W and writing W_eff take."""
    return copy_of(torch.cat([p.weight for p in problem.group]))


def _decided(problem: Problem, backend: str, bits: Tensor) -> Pairs:
    """Bits and [u < sigmoid(L)], of all weights that rounding leaves no choice."""
    draws = philox_draws(problem.group, problem.seed, problem.step, backend)
    for p, draw, part in zip(problem.group, draws, _rows(problem, bits), strict=True):
        logits = (p.U.double() @ p.V.double() + p.b.double()).detach()
        far = (logits - draw.threshold).abs() > _THRESHOLD_ROUNDING
        got = unpack_bits(part, p.weight.shape[1])
        yield got[far], (logits > draw.threshold)[far].double()


def sample(case: LinearCase, problem: Problem, backend: str) -> Operation:
    """The bits alone."""
    return Operation(
        lambda: [sample_mask(problem.group, seed=problem.seed, step=problem.step, backend=backend)],
        lambda outputs: _decided(problem, backend, outputs[0]),
        _weights_moved(case, 0, 2.0 * case.rank),
    )


def _masked(problem: Problem, x: Tensor, backend: str) -> list[Tensor]:
    with torch.no_grad():
        out = masked_linear(
            x, problem.group, scale=problem.scale, tau=problem.tau, seed=problem.seed,
            step=problem.step, backend=backend,
        )  # fmt: skip
    return [out.y, out.forget, out.sparse, out.bits]


@contextmanager
def _composing() -> Iterator[None]:
    """Have W_eff written: without tokens a cost model would find that nobody needs it."""
    previous = os.environ.get("STAMINA_STRATEGY")
    os.environ["STAMINA_STRATEGY"] = "compose"
    try:
        yield
    finally:
        del os.environ["STAMINA_STRATEGY"]
        if previous is not None:
            os.environ["STAMINA_STRATEGY"] = previous


def sample_compose(case: LinearCase, problem: Problem, backend: str) -> Operation:
    """What a forward does before its product, W_eff, bits and both scalars: one without tokens."""
    nothing = problem.x.detach()[:0]

    def run() -> list[Tensor]:
        with _composing():
            return _masked(problem, nothing, backend)

    def pairs(outputs: Sequence[Tensor]) -> Pairs:
        _, forget, sparse, bits = outputs
        yield from _decided(problem, backend, bits)
        for k, (p, weight) in enumerate(zip(problem.group, _composed(problem, bits), strict=True)):
            assert p.weight_init is not None
            change = p.weight.double() - p.weight_init.double()
            yield forget[k], (change * (weight - p.weight.double())).square().sum()
            logits = (p.U.double() @ p.V.double() + p.b.double()).detach()
            yield sparse[k], logits.sigmoid().sum()

    return Operation(run, pairs, _weights_moved(case, 3, 4.0 * case.rank))


def _products(problem: Problem, weights: Sequence[Tensor]) -> Tensor:
    return problem.x.detach().double() @ torch.cat(list(weights)).t()


def linear_bits(case: LinearCase, problem: Problem, backend: str) -> Operation:
    """Y = X W_eff^T from bits that are there."""
    bits, x = _random_bits(problem), problem.x.detach()

    def run() -> list[Tensor]:
        weight = compose(problem.group, bits, scale=problem.scale, dtype=x.dtype, backend=backend)
        return [F.linear(x, weight)]

    return Operation(
        run,
        lambda outputs: [(outputs[0], _products(problem, _composed(problem, bits)))],
        case.forward_work(),
    )


def linear_sampled(case: LinearCase, problem: Problem, backend: str) -> Operation:
    """Y = X W_eff^T with a new mask: the forward of a training step, scalars included."""

    def pairs(outputs: Sequence[Tensor]) -> Pairs:
        yield outputs[0], _products(problem, _composed(problem, outputs[3]))
        yield from _decided(problem, backend, outputs[3])

    return Operation(
        lambda: _masked(problem, problem.x.detach(), backend), pairs, case.forward_work()
    )


def frozen(case: LinearCase, problem: Problem) -> Operation:
    """Y = X W^T, the vendor's product."""
    x, weight = problem.x.detach(), torch.cat([p.weight for p in problem.group])
    return Operation(
        lambda: [F.linear(x, weight)],
        lambda outputs: [(outputs[0], _products(problem, [weight.double()]))],
        Work(2.0 * case.tokens * case.weights, case.forward_work().bytes),
    )


def fold(folder: Folder, work: Work, checked: Sequence[int]) -> Operation:
    """A folder as an operation; fp64 is formed for some layers only, one after the other."""

    def run() -> list[Tensor]:
        folder.fold()
        return [folder.weights[k] for k in checked]

    def pairs(outputs: Sequence[Tensor]) -> Pairs:
        for k, weight in zip(checked, outputs, strict=True):
            yield weight, folder.initial[k].double() + folder.delta(k)

    return Operation(run, pairs, work, folder.reset)


Build = Callable[[LinearCase, Problem], Operation]


@dataclass(frozen=True)
class Entry:
    """How an operation is built, and why it may be absent on a device."""

    build: Build
    missing: Callable[[str], str | None] = lambda device: None


def _on_backends(build: Callable[[LinearCase, Problem, str], Operation]) -> dict[str, Entry]:
    def on(backend: str) -> Build:
        return lambda case, problem: build(case, problem, backend)

    return {name: Entry(on(backend), UNUSABLE[name]) for name, backend in OURS.items()}


OPERATIONS: dict[str, dict[str, Entry]] = {
    "compose": {
        **_on_backends(compose_bits),
        "eager": Entry(compose_eager),
        "copy": Entry(copy),
    },
    "sample": _on_backends(sample),
    "sample_compose": {**_on_backends(sample_compose), "copy": Entry(copy)},
    "linear_bits": {**_on_backends(linear_bits), "frozen": Entry(frozen)},
    "linear_sampled": {**_on_backends(linear_sampled), "frozen": Entry(frozen)},
}
