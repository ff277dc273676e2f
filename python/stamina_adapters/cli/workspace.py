# SPDX-License-Identifier: Apache-2.0
"""What the commands share: pipelines in, folders out, and the checks on both."""

import errno
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from stamina_adapters.files import write_beside
from stamina_adapters.training.config import ConceptSpec, placeholders
from stamina_adapters.training.errors import InputError
from stamina_adapters.vocabularies import check_new_token
from stamina_kernels.dispatch import resolve

MODEL = "--pretrained_model_name_or_path"
_INDEX = "model_index.json"


def _disable_bars() -> None:
    # the libraries' own bars, for files of a few megabytes, would break up the command's
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def counted(number: int, noun: str) -> str:
    """Such as "1 picture" and "2 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check_backend(device_type: str) -> None:
    try:
        resolve(None, device_type)
    except (ValueError, RuntimeError) as error:
        raise InputError(" ".join(str(error).split())) from error


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a Stable Diffusion folder from disk in fp32, on the GPU when there is one.

    Raises `InputError` when it is no complete folder of that kind, or when STAMINA_BACKEND names
    a backend that cannot serve that device; nothing is downloaded.
    """
    argument = f"{MODEL} {str(folder)!r}"
    if not folder.is_dir():
        raise InputError(f"{argument}: no such folder; give a local Stable Diffusion folder")
    index = folder / _INDEX
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        raise InputError(
            f"{argument}: holds no {_INDEX}; give a folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{argument}: model_index.json is damaged; restore the folder") from error
    if kind != "StableDiffusionPipeline":
        raise InputError(f"{argument}: is a {kind}; give a StableDiffusionPipeline folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_backend(device)
    _disable_bars()
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"{argument}: cannot be loaded ({reason}); restore the folder") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_length(pipe: Any, prompt: str, argument: str) -> None:
    """Raise `InputError` for a prompt that the model would cut short."""
    longest = pipe.tokenizer.model_max_length
    length = len(pipe.tokenizer(prompt).input_ids)
    if length > longest:
        raise InputError(f"{argument} has {length} tokens; shorten it to {longest}")


def check_new_tokens(pipe: Any, concepts: Sequence[ConceptSpec], argument: str) -> None:
    """Raise `InputError` when a token is a word already, or a prompt is longer than the model's."""
    for concept in concepts:
        try:
            check_new_token(pipe, "text_encoder", concept.token)
        except ValueError as error:
            raise InputError(f"{argument}: {error}; choose another") from error
        prompt = concept.instance_prompt.replace(concept.token, "a")
        check_length(pipe, prompt, f"{argument}: instance_prompt of {concept.token!r}")


def check_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Raise `InputError` for a prompt that the model cannot draw as it is written.

    It is blank, names a `<...>` word that the model never learned, or would be cut short.
    """
    vocabulary = pipe.tokenizer.get_vocab()
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"PROMPT {prompt!r}: is blank; describe the picture")
        for word in placeholders(prompt):
            if word not in vocabulary:
                special = set(pipe.tokenizer.all_special_tokens)
                added = pipe.tokenizer.get_added_vocab().keys() - special
                learned = ", ".join(sorted(added)) or "none"
                raise InputError(
                    f"PROMPT {prompt!r}: the model knows no {word}; it has learned {learned}"
                )
        check_length(pipe, prompt, f"PROMPT {prompt!r}")


def check_inference_steps(pipe: Any, steps: int, argument: str) -> None:
    """Raise `InputError` for more denoising steps than the model's scheduler has times."""
    most = pipe.scheduler.config.num_train_timesteps
    if steps > most:
        raise InputError(f"{argument} {steps}: the model's scheduler has {most} steps at most")


def _way_on(folder: Path) -> str:
    """What a refusal adds where `stamina train` ended in `folder` before it wrote its pipeline."""
    concepts = folder / "concepts"
    if (folder / _INDEX).exists() or not any(concepts.glob("*.safetensors")):
        return ""
    return f"; stamina fold makes a pipeline of the files in {str(concepts)!r}"


def check_guidance(scale: float) -> None:
    """Raise `InputError` for a scale that is not finite, which makes no picture."""
    if not math.isfinite(scale):
        raise InputError(f"--guidance_scale {scale}: must be a finite number")


def check_output_dir(folder: Path, argument: str = "--output_dir") -> None:
    """Raise `InputError` unless `folder` is empty or can be made; makes nothing."""
    where = f"{argument} {str(folder)!r}"
    try:
        if folder.is_dir():
            if any(folder.iterdir()):
                raise InputError(
                    f"{where}: is in use (not empty); choose an empty or new folder"
                    f"{_way_on(folder)}"
                )
        elif folder.exists():
            raise InputError(f"{where}: is a file; choose an empty or new folder")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{where}: {str(parent)!r} is not writable; choose another folder")
    except PermissionError as error:
        raise InputError(f"{where}: cannot be read; choose another folder") from error


def _is_full_disk(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers raise kinds of their own, with the system's number at the end
    return getattr(error, "errno", None) in numbers or any(
        str(error).endswith(f"(os error {number})") for number in numbers
    )


@contextmanager
def full_disk_is_told(place: Path, argument: str) -> Iterator[None]:
    """Raise `InputError` where the block fails because the disk of `place` is full."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise InputError(
            f"{argument} {str(place)!r}: the disk is full; free some or choose another folder, "
            "what is finished is kept"
        ) from error


def write_png(file: Path, image: Image.Image) -> None:
    """The picture, whole or not there at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_beside(file, buffer.getvalue())


def save_pipeline(pipe: Any, folder: Path) -> None:
    """`save_pretrained` into `folder`, beside what it holds already.

    Written next to its place and then moved, model_index.json last: a folder with that file holds
    a whole pipeline.
    """
    partial = folder / ".pipeline.partial"
    try:
        pipe.save_pretrained(partial, safe_serialization=True)
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == _INDEX):
            os.replace(entry, folder / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
