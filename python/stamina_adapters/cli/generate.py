# SPDX-License-Identifier: Apache-2.0
"""`stamina generate`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stamina_adapters.cli.embedded import model_path
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.workspace import (
    check_guidance,
    check_inference_steps,
    check_output_dir,
    check_prompts,
    counted,
    full_disk_is_told,
    load_pipeline,
    write_png,
)
from stamina_adapters.evaluation.sampling import generate_images


def generate(
    model: Path | None,
    prompts: Sequence[str],
    output_dir: Path,
    *,
    num_images_per_prompt: int,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    console: Console,
) -> None:
    """Check everything, then sample; see `stamina generate --help`."""
    check_output_dir(output_dir)
    check_guidance(guidance_scale)
    pipe = load_pipeline(model or model_path())
    check_prompts(pipe, prompts)
    check_inference_steps(pipe, num_inference_steps, "--num_inference_steps")
    jobs = [(p, k) for p in range(len(prompts)) for k in range(num_images_per_prompt)]
    with RunProgress(console) as progress:
        images = generate_images(
            pipe,
            [prompts[p] for p, _ in jobs],
            [seed + k for _, k in jobs],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            on_batch=progress.counting(f"draw {counted(len(jobs), 'picture')}", len(jobs)),
        )
    with full_disk_is_told(output_dir, "--output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        for (p, k), image in zip(jobs, images, strict=True):
            write_png(output_dir / f"{p:02d}-{k:03d}.png", image)
    console.print(
        f"{counted(len(images), 'picture')} in {output_dir}", soft_wrap=True, markup=False
    )
