# SPDX-License-Identifier: Apache-2.0
"""The denoising loss of latent diffusion models."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from stamina_adapters.training.errors import InputError


@dataclass(frozen=True)
class NoisyBatch:
    """Latents x_t at integer times t, and what the denoiser should predict for them."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


class DenoisingObjective:
    """Mean over latents of w(t) (prediction - target)^2, as the model's scheduler declares it.

    epsilon:       target = noise,                              w = min(SNR, gamma) / SNR
    v_prediction:  target = sqrt(a) noise - sqrt(1 - a) x_0,    w = min(SNR, gamma) / (SNR + 1)

    with a = alphas_cumprod[t] and SNR = a / (1 - a) (Hang et al., 2023, arXiv 2303.09556);
    w = 1 when gamma is None. Other prediction types raise `InputError`.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.snr_gamma = snr_gamma
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise InputError(
                f"prediction_type {kind!r} of the model's scheduler: cannot be trained here; "
                "use a model that predicts 'epsilon' or 'v_prediction'"
            )
        self._velocity = kind == "v_prediction"

    def corrupt(self, latents: torch.Tensor, generator: torch.Generator) -> NoisyBatch:
        """Noise [n, ...] `latents` at random times.

        Each time is uniform, one from each n-th of the range: spread over the batch, they make
        the loss vary less. Drawn on the CPU, so that every device gets the same numbers.
        """
        count, steps = len(latents), self.scheduler.config.num_train_timesteps
        spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        # rounding can lift the last one to 1
        times = (spread * steps).long().clamp(max=steps - 1).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        target = self.scheduler.get_velocity(latents, noise, times) if self._velocity else noise
        return NoisyBatch(self.scheduler.add_noise(latents, noise, times), times, target)

    def loss(self, prediction: torch.Tensor, batch: NoisyBatch) -> torch.Tensor:
        """0-dim fp32 loss of a prediction."""
        error = (prediction.float() - batch.target).square().flatten(1).mean(1)
        if self.snr_gamma is not None:
            snr = compute_snr(self.scheduler, batch.timesteps)
            error = error * snr.clamp(max=self.snr_gamma) / (snr + 1 if self._velocity else snr)
        return error.mean()
