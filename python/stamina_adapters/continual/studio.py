# SPDX-License-Identifier: Apache-2.0
"""Pictures of many prompts in few calls, always from the same noise."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from stamina_adapters.continual.spec import SamplingSpec
from stamina_adapters.evaluation.sampling import generate_images

_SCHEDULERS = {"ddim": DDIMScheduler, "dpmsolver": DPMSolverMultistepScheduler}

Counter = Callable[[str, int], Callable[[int], None]]
"""Given a title and a total, opens a progress bar; the result is called with how many are done."""


def silent(title: str, total: int) -> Callable[[int], None]:
    """A `Counter` that shows nothing."""
    return lambda count: None


class Studio:
    """Draws prompts with a specification's sampler; the pipeline's own is put back after."""

    def __init__(self, sampling: SamplingSpec, counter: Counter = silent) -> None:
        self.sampling, self._counter = sampling, counter

    def draw(self, pipe: Any, prompts: Sequence[str], title: str) -> list[list[Image.Image]]:
        """For each prompt, `sampling.pictures` pictures; batches go over prompts."""
        each = self.sampling.pictures
        seeds = range(self.sampling.noise_seed, self.sampling.noise_seed + each)
        own = pipe.scheduler
        if self.sampling.scheduler != "model":
            pipe.scheduler = _SCHEDULERS[self.sampling.scheduler].from_config(own.config)
        try:
            images = generate_images(
                pipe,
                [prompt for prompt in prompts for _ in seeds],
                [seed for _ in prompts for seed in seeds],
                num_inference_steps=self.sampling.num_inference_steps,
                guidance_scale=self.sampling.guidance_scale,
                batch_size=self.sampling.batch_size,
                on_batch=self._counter(title, each * len(prompts)),
            )
        finally:
            pipe.scheduler = own
        return [images[start : start + each] for start in range(0, len(images), each)]
