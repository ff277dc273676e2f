# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures, checked before anything is trained, and their latents, encoded once."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from stamina_adapters.training.errors import InputError

_SUFFIXES = {".png", ".jpg", ".jpeg"}


def list_images(folder: Path, argument: str) -> list[Path]:
    """The PNG and JPEG files of a folder, sorted by name; names that start with a dot are ignored.

    Raises `InputError`, which begins with `argument`, when the folder is missing or unreadable,
    holds no picture, or holds anything else.
    """
    where = f"{argument} {str(folder)!r}"
    try:
        if not folder.exists():
            raise InputError(f"{where}: no such folder; give a folder of PNG or JPEG images")
        if not folder.is_dir():
            raise InputError(f"{where}: is not a folder; give a folder of PNG or JPEG images")
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        # a folder may be listed whose entries cannot be looked at
        wrong = [e for e in entries if not e.is_file() or e.suffix.lower() not in _SUFFIXES]
    except OSError as error:
        raise InputError(
            f"{where}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if wrong:
        raise InputError(f"{where}: {wrong[0].name!r} is not a PNG or JPEG file; move it elsewhere")
    if not entries:
        raise InputError(f"{where}: is empty; put at least one PNG or JPEG image in it")
    return entries


def _decoded(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # convert() would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:  # convert() would bring out the colours below
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")


def read_image(path: Path, argument: str) -> Image.Image:
    """Decode one PNG or JPEG completely, upright, as RGB; what is transparent is laid on white.

    Raises `InputError` when it cannot.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's, of damaged EXIF: no orientation is known, the picture is taken as it lies
            warnings.simplefilter("ignore", UserWarning)
            return _decoded(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{argument}: image {str(path)!r} cannot be decoded ({reason}); replace or remove it"
        ) from error


class ConceptDataset:
    """All pictures of one concept, RGB and upright."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = list(images)

    @classmethod
    def from_folder(cls, folder: Path, argument: str = "instance_data_dir") -> "ConceptDataset":
        """Decode every picture of a folder, in the order of the file names.

        Raises `InputError`, beginning with `argument`, as `list_images` and `read_image` do.
        """
        return cls([read_image(path, argument) for path in list_images(folder, argument)])

    def pixels(self, resolution: int, hflip: bool = False) -> torch.Tensor:
        """Pictures as [n, 3, resolution, resolution] fp32 in [-1, 1]; 2n with `hflip`.

        The shorter side is scaled to `resolution` (Lanczos) and the centre is cut out.
        """
        square = [
            ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
            for image in self.images
        ]
        if hflip:
            square += [ImageOps.mirror(image) for image in square]
        return torch.stack([to_tensor(image) for image in square])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as [3, height, width] fp32 in [-1, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, 3).permute(2, 0, 1)
    return pixels.float().div_(127.5).sub_(1.0)


class LatentCache:
    """The latents of one concept's pictures, in the scale the denoiser works in.

    A variational autoencoder (`AutoencoderKL`) gives a Gaussian: its mean and standard deviation
    are kept and `sample` draws from it. A deterministic one (`AutoencoderTiny`) gives the latents.
    """

    def __init__(self, vae: Any, pixels: torch.Tensor) -> None:
        parameter = next(vae.parameters())
        means, deviations = [], []
        with torch.no_grad():
            for image in pixels.split(1):
                encoded = vae.encode(image.to(parameter.device, parameter.dtype))
                if hasattr(encoded, "latent_dist"):
                    means.append(encoded.latent_dist.mean)
                    deviations.append(encoded.latent_dist.std)
                else:
                    means.append(encoded.latents)
        scale = vae.config.scaling_factor
        self._mean = torch.cat(means).float() * scale
        self._std = torch.cat(deviations).float() * scale if deviations else None

    def __len__(self) -> int:
        return len(self._mean)

    def sample(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """`batch` latents, fp32, drawn with replacement only when there are fewer than `batch`.

        The generator lives on the CPU, so that every device draws the same numbers.
        """
        rounds = -(-batch // len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])
        index = order[:batch].to(self._mean.device)
        latents = self._mean[index]
        if self._std is not None:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            latents = latents + self._std[index] * noise
        return latents
