# SPDX-License-Identifier: Apache-2.0
"""Concept after concept: attach, train, fold, save."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel
from torch.optim.lr_scheduler import LinearLR

from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset, LatentCache
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.methods import Method
from stamina_adapters.training.objective import DenoisingObjective, NoisyBatch
from stamina_adapters.training.prompts import tokenize

_PROBES = 2


class StepReport(BaseModel):
    """What a step did: `loss` without penalties, `density` the adapted share of weights.

    `penalty` is the term that the method added to the loss, None where it added none.
    """

    step: int
    loss: float
    density: float | None
    penalty: float | None = None


class ProbeReport(BaseModel):
    """Denoising loss on one fixed set of noisy latents, with sampled and with committed masks."""

    step: int
    sampled: float
    committed: float


class ConceptLog(BaseModel):
    """The record of one learned concept; `densities` are of the committed masks, by module path."""

    token: str
    instance_prompt: str
    images: int
    steps: list[StepReport]
    probes: list[ProbeReport]
    densities: dict[str, float]
    seconds: float


class ContinualTrainer:
    """Teaches one pipeline any number of concepts, each with the same method and settings.

    The pipeline is frozen and put in evaluation mode when the trainer is made; after each
    `learn` it is a stock pipeline again, with the concept in its weights and vocabulary.
    All random numbers come from the configuration's seed and the concept's token.
    """

    def __init__(self, pipe: Any, method: Method, config: TrainingConfig) -> None:
        self.pipe, self.method, self.config = pipe, method, config
        self.objective = DenoisingObjective(pipe.scheduler, config.snr_gamma)
        if self.resolution % pipe.vae_scale_factor:
            raise InputError(
                f"--resolution {self.resolution}: must be a multiple of {pipe.vae_scale_factor} "
                "for this model"
            )
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()

    @property
    def resolution(self) -> int:
        """Side of the training pictures in pixels."""
        native = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return self.config.resolution or native

    def learn(
        self,
        concept: ConceptSpec,
        dataset: ConceptDataset,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> tuple[Any, ConceptLog]:
        """Learn one concept and fold it; returns the method's state for its file, and the record.

        Raises `InputError` when the loss stops being finite, or a weight leaves its dtype's range.
        Then, and where it is interrupted, the pipeline and the method are as before.
        """
        try:
            return self._learn(concept, dataset, on_step)
        except BaseException:
            self.method.abandon()
            raise

    def _learn(
        self,
        concept: ConceptSpec,
        dataset: ConceptDataset,
        on_step: Callable[[StepReport], None] | None,
    ) -> tuple[Any, ConceptLog]:
        started = time.perf_counter()
        config = self.config
        generator = torch.Generator().manual_seed(concept.seed(config.seed))
        latents = LatentCache(self.pipe.vae, dataset.pixels(self.resolution, config.hflip))
        probes = [self._draw(latents, generator) for _ in range(_PROBES)]
        groups = self.method.attach(self.pipe, concept, config)
        tokens = tokenize(self.pipe, [concept.instance_prompt])
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,  # hundreds of small parameters: 2 ms a step instead of 8
        )
        final_rate = 1.0 if config.lr_scheduler == "constant" else 0.0
        rates = LinearLR(optimizer, 1.0, final_rate, config.max_train_steps)
        steps: list[StepReport] = []
        probed: list[ProbeReport] = []
        for step in range(config.max_train_steps):
            if step == config.first_hard_step:
                probed.append(self._probe(step, tokens, probes))
            density = self.method.begin_step(step)
            loss = self._loss(tokens, self._draw(latents, generator))
            penalty = self.method.penalty()
            total = loss if penalty is None else loss + penalty
            if not torch.isfinite(total):
                raise InputError(
                    f"the loss of {concept.token} became {total.item()} at step {step}; "
                    "lower its method's rates"
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
            optimizer.step()
            rates.step()
            added = None if penalty is None else penalty.item()
            report = StepReport(step=step, loss=loss.item(), density=density, penalty=added)
            steps.append(report)
            if on_step is not None:
                on_step(report)
        final = self._probe(config.max_train_steps, tokens, probes)
        if not math.isfinite(final.committed):
            raise InputError(
                f"the loss of {concept.token} became {final.committed} in the last step; lower its "
                "method's rates"
            )
        probed.append(final)
        densities = self.method.densities()
        optimizer.zero_grad(set_to_none=True)
        self.method.consolidate(lambda: self._loss(tokens, self._draw(latents, generator, 1)))
        try:
            state = self.method.finish()
        except (ValueError, OverflowError) as error:
            raise InputError(f"{concept.token}: {error}; lower its method's rates") from error
        log = ConceptLog(
            token=concept.token,
            instance_prompt=concept.instance_prompt,
            images=len(dataset.images),
            steps=steps,
            probes=probed,
            densities=densities,
            seconds=time.perf_counter() - started,
        )
        return state, log

    def _draw(
        self, latents: LatentCache, generator: torch.Generator, count: int | None = None
    ) -> NoisyBatch:
        batch = latents.sample(count or self.config.train_batch_size, generator)
        return self.objective.corrupt(batch, generator)

    def _loss(self, tokens: torch.Tensor, batch: NoisyBatch) -> torch.Tensor:
        unet = self.pipe.unet
        hidden = self.pipe.text_encoder(tokens)[0].expand(len(batch.latents), -1, -1)
        noisy = batch.latents.to(unet.dtype)
        prediction = unet(noisy, batch.timesteps, hidden.to(unet.dtype), return_dict=False)[0]
        return self.objective.loss(prediction, batch)

    @torch.no_grad()
    def _probe(self, step: int, tokens: torch.Tensor, probes: list[NoisyBatch]) -> ProbeReport:
        losses = []
        for sampling in (True, False):
            self.method.set_sampling(sampling)
            losses.append(sum(self._loss(tokens, batch).item() for batch in probes) / len(probes))
        return ProbeReport(step=step, sampled=losses[0], committed=losses[1])
