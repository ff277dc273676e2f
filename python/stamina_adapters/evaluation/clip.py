# SPDX-License-Identifier: Apache-2.0
"""CLIP from a local folder as the metrics' image encoder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPVisionModelWithProjection

from stamina_adapters.training.data import to_tensor
from stamina_adapters.training.errors import InputError

# of OpenAI's checkpoints, for a folder without preprocessor_config.json
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


class ClipEmbedder:
    """Projected CLIP image embeddings; pictures are scaled and normalised as the model expects."""

    def __init__(
        self,
        model: Any,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        """`model`: a `CLIPModel` or `CLIPVisionModelWithProjection`."""
        self.model = model.eval().requires_grad_(False)
        vision = getattr(model.config, "vision_config", model.config)
        self.side = int(vision.image_size)
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    @classmethod
    def from_folder(cls, folder: Path, argument: str = "--clip") -> "ClipEmbedder":
        """Load what `save_pretrained` wrote; nothing is downloaded.

        Raises `InputError`, which begins with `argument`, when the folder holds no CLIP.
        """
        where = f"{argument} {str(folder)!r}"
        if not folder.is_dir():
            raise InputError(f"{where}: no such folder; give a local CLIP folder")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = config["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}: holds no readable config.json; give a folder that save_pretrained wrote"
            ) from error
        if kind not in ("clip", "clip_vision_model"):
            raise InputError(f"{where}: is a {kind}; give a clip or clip_vision_model folder")
        # the two configurations declare the projection's width in different places
        loader = CLIPModel if kind == "clip" else CLIPVisionModelWithProjection
        try:
            model = loader.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{where}: cannot be loaded ({reason}); restore it") from error
        return cls(model, **_normalisation(folder, where))

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See `Embedder`; rows have the length that CLIP gives them."""
        device = next(self.model.parameters()).device
        rows = []
        for start in range(0, len(images), _BATCH):
            pixels = torch.stack([self._pixels(image) for image in images[start : start + _BATCH]])
            pooled = self.model.vision_model(pixel_values=pixels.to(device)).pooler_output
            rows.append(self.model.visual_projection(pooled).float().cpu())
        return torch.cat(rows)

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        side = (self.side, self.side)
        fitted = ImageOps.fit(image.convert("RGB"), side, Image.Resampling.BICUBIC)
        return ((to_tensor(fitted) + 1) / 2 - self._mean) / self._std


def _normalisation(folder: Path, where: str) -> dict[str, Sequence[float]]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"mean": found["image_mean"], "std": found["image_std"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: preprocessor_config.json is damaged; restore it") from error
