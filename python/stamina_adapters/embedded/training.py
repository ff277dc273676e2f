# SPDX-License-Identifier: Apache-2.0
"""The training loop that every stage of the embedded model shares.

Gradients are computed on a bfloat16 copy of the model, which CPUs with matrix units run several
times faster. One flat fp32 vector holds the master weights, and AdamW and the moving average act
on flat vectors too. A checkpoint is one safetensors file with the step in its metadata. Batches
are functions of the seed and the step alone, so a run that is killed and resumed gives the same
bits as one that is not.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    The rate rises over ``warmup`` steps, stays, and falls linearly to 0 over the last
    ``decay`` share of ``steps``. Because it is constant in between, a run may be resumed with a
    larger or smaller ``steps``.
    """

    steps: int
    rate: float
    warmup: int = 200
    decay: float = 0.25
    ema: float = 0.999
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    save_every: int = 250

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.rate * rise * fall


def _adamw(
    master: Tensor, average: Tensor, first: Tensor, second: Tensor, grad: Tensor, numbers: Tensor
) -> None:
    """One AdamW step and the moving average, in place on flat vectors.

    ``numbers``: gradient gain (used below 1), 1 - beta1, 1 - beta2, shrinking by weight decay,
    step length with both bias corrections, and the share of the new weights in the average.
    """
    gain, new1, new2, shrink, length, share = numbers.unbind()
    grad = grad * gain.clamp(max=1.0)
    first.copy_(first + new1 * (grad - first))
    second.copy_(second + new2 * (grad * grad - second))
    master.copy_(master * shrink - length * first / (second.sqrt() + 1e-8))
    average.copy_(average + share * (master - average))


class FlatTrainer:
    """AdamW with fp32 master weights and a moving average for a reduced-precision copy.

    Args:
        model: its parameters at construction are the starting point; it is not changed.
        schedule: rates and length.
        dtype: precision of the copy that computes gradients.
        fused: compile the update into one pass over memory.

    Attributes:
        work: the copy that computes; use its parameters to build the loss.
        step: number of updates done.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        dtype: torch.dtype = torch.bfloat16,
        fused: bool = False,
    ) -> None:
        self.schedule = schedule
        self._adamw = torch.compile(_adamw) if fused else _adamw
        self.work = copy.deepcopy(model).to(dtype)
        self.work.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.work.train()
        self._parameters = [p for p in self.work.parameters() if p.requires_grad]
        self._sizes = [p.numel() for p in self._parameters]
        master = [p.detach().float().reshape(-1) for p in model.parameters() if p.requires_grad]
        self.master = torch.cat(master)
        self.average = self.master.clone()
        self._first = torch.zeros_like(self.master)
        self._second = torch.zeros_like(self.master)
        self.step = 0

    def update(self) -> None:
        """One AdamW step from the copy's gradients, which are cleared."""
        plan = self.schedule
        grad = torch.cat([p.grad.float().reshape(-1) for p in self._parameters])  # type: ignore[union-attr]
        rate = plan.rate_at(self.step)
        self.step += 1
        beta1, beta2 = plan.betas
        # The average forgets its random start: its rate is limited by the steps done.
        numbers = [
            (plan.clip / (float(grad.norm()) + 1e-6)),
            1.0 - beta1,
            1.0 - beta2,
            1.0 - rate * plan.weight_decay,
            rate * (1.0 - beta2**self.step) ** 0.5 / (1.0 - beta1**self.step),
            1.0 - min(plan.ema, self.step / (self.step + 10.0)),
        ]
        self._adamw(
            self.master, self.average, self._first, self._second, grad, torch.tensor(numbers)
        )
        self._write(self.work, self.master)
        for parameter in self._parameters:
            parameter.grad = None

    @staticmethod
    def _write(model: nn.Module, flat: Tensor) -> None:
        offset = 0
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(flat[offset : offset + p.numel()].view(p.shape))
                    offset += p.numel()

    def export(self, model: nn.Module) -> nn.Module:
        """Write the averaged weights into ``model`` and return it in evaluation mode."""
        self._write(model, self.average)
        return model.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "master": self.master,
            "average": self.average,
            "first": self._first,
            "second": self._second,
        }
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"step": str(self.step)})
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is of a model of another size.
        """
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint {path}; run its stage first")
        with safe_open(path, framework="pt") as file:
            master = file.get_tensor("master")
            if master.shape != self.master.shape:
                raise ValueError(
                    f"checkpoint {path} holds {master.numel()} parameters, "
                    f"the model has {self.master.numel()}"
                )
            self.master, self.average = master, file.get_tensor("average")
            self._first, self._second = file.get_tensor("first"), file.get_tensor("second")
            self.step = int(file.metadata()["step"])
        self._write(self.work, self.master)


def generator_at(seed: int, stage: str, step: int) -> torch.Generator:
    """The generator of one step of one stage; equal arguments give equal draws."""
    mixed = (seed * 1_000_003 + sum(ord(c) * 31**k for k, c in enumerate(stage))) % 2**31
    return torch.Generator().manual_seed(mixed * 2**24 + step)


@contextmanager
def _subnormals_flushed() -> Iterator[None]:
    """Moments of unused weights decay to subnormal numbers, which CPUs handle slowly.

    The mode belongs to the thread, so it must not stay on for what runs afterwards.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def fit(
    trainer: FlatTrainer,
    loss_at: Callable[[int], Tensor],
    checkpoint: Path,
    name: str,
    resume: bool = True,
    stop_at: float | None = None,
) -> None:
    """Train to the schedule's end, saving as it goes.

    Args:
        trainer: what to train.
        loss_at: the loss of the copy at a step.
        checkpoint: file to write, and to continue from.
        name: shown in the progress bar.
        resume: continue from ``checkpoint`` if it exists.
        stop_at: leave, with a checkpoint, at this time (`time.time`); None runs to the end.
    """
    plan = trainer.schedule
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    if trainer.step >= plan.steps:
        return
    bar = tqdm(total=plan.steps, initial=trainer.step, desc=name, unit="step", mininterval=5.0)
    average = None
    with _subnormals_flushed(), bar:
        while trainer.step < plan.steps:
            loss = loss_at(trainer.step)
            loss.backward()
            trainer.update()
            value = float(loss.detach())
            average = value if average is None else average + 0.02 * (value - average)
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            late = stop_at is not None and time.time() > stop_at
            if late or trainer.step % plan.save_every == 0 or trainer.step == plan.steps:
                trainer.save(checkpoint)
            if late:
                return
