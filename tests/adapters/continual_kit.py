# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmark share: a method that takes no time, and a small specification."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from stamina_adapters import add_custom_token, fold_custom_token
from stamina_adapters.continual.registry import Registry
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

LAYER = "attn2.to_v"
COLOURS = ("red", "green", "blue", "orange", "purple", "white")


class FakeMethod:
    """Trains the values in full, and moves them by what it carries: a lost state shows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        unknown = settings.keys() - {
            "rate",
            "fail_at",
        }  # the last: the concept whose loss is not finite
        if unknown:
            raise ValueError(f"unknown setting {min(unknown)!r}")
        self.rate, self.fail_at = settings.get("rate", 1e-2), settings.get("fail_at")
        self.carried: dict[str, torch.Tensor] = {}
        self.learned = 0

    reads = frozenset()

    def attach(self, pipe, concept, config):
        self.pipe, self.token = pipe, concept.token
        word = add_custom_token(pipe, concept.token)
        self.layers = {
            path: layer.weight for path, layer in pipe.unet.named_modules() if path.endswith(LAYER)
        }
        with torch.no_grad():
            for path, weight in self.layers.items():
                weight.add_(self.carried.get(path, torch.zeros_like(weight)), alpha=0.1)
                weight.requires_grad_(True)
                if self.learned + 1 == self.fail_at:
                    weight.fill_(float("nan"))
        return [
            {"params": list(self.layers.values()), "lr": self.rate * (1 + self.learned)},
            {"params": list(word.parameters()), "lr": 1e-3},
        ]

    def begin_step(self, step):
        return None

    def densities(self):
        return {}

    def set_sampling(self, sampling):
        pass

    def penalty(self):
        return None

    def consolidate(self, loss):
        pass

    def finish(self):
        for path, weight in self.layers.items():
            weight.requires_grad_(False)
            self.carried[path] = weight.detach().clone()
        fold_custom_token(self.pipe, self.token)
        self.learned += 1
        return None

    def abandon(self):
        pass

    def save(self, state, file):
        pass

    def settings(self):
        return {"rate": self.rate}

    def state_dict(self):
        return {"learned": torch.tensor(self.learned), **self.carried}

    def load_state_dict(self, pipe, state):
        self.carried = dict(state)
        self.learned = int(self.carried.pop("learned"))


REGISTRY = Registry(
    {"fake": FakeMethod, "other": FakeMethod},
    {"fake": [{"rate": 1e-3}, {"rate": 1e-2}], "other": [{"rate": 1e-3}, {"rate": 2e-3}]},
)


def write_clip(folder: Path) -> Path:
    """A CLIP of random weights."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(
        **small, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=12
    )
    text = CLIPTextConfig(**small, num_attention_heads=2, vocab_size=60, projection_dim=12)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def write_concepts(folder: Path, count: int, first: int = 1) -> Path:
    """A list of concepts with two pictures each, as JSON."""
    entries = []
    for number in range(first, first + count):
        images = folder / f"data{number}"
        images.mkdir(parents=True)
        for k in range(2):
            tile = Image.new("RGB", (12, 12), COLOURS[number % len(COLOURS)])
            tile.putpixel((k, number % 12), (255, 255, 0))
            tile.save(images / f"{k}.png")
        entries.append(
            {"instance_prompt": f"a photo of <v{number}>", "instance_data_dir": str(images)}
        )
    file = folder / f"concepts{first}.json"
    file.write_text(json.dumps(entries))
    return file


def write_spec(folder: Path, model: Path, concepts: int = 3, **changes: Any) -> Path:
    """A specification on image folders, of seconds."""
    spec = {
        "name": "small",
        "model": str(model),
        "clip": str(write_clip(folder / "clip")),
        "concepts": {
            "source": "folders",
            "concepts_list": str(write_concepts(folder / "concepts", concepts)),
            "tuning_list": str(write_concepts(folder / "tuning", 2, 11)),
            "families": ["face"] * concepts,
        },
        "sampling": {"num_inference_steps": 1, "guidance_scale": 1.0, "pictures": 2},
        "training": {"max_train_steps": 2, "train_batch_size": 2},
        "checkpoints": [1, concepts],
        "pairs": 1,
        "shown": [1, concepts],
        "shown_pictures": 1,
        "methods": {"fake": {}, "other": {"settings": {"rate": 1e-3}}},
        **changes,
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    return file


def comparable(file: Path) -> list[dict[str, Any]]:
    """The rows of a file without the figures that no two runs share."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        for key in ("seconds", "peak_mib"):
            row.pop(key, None)
    return rows
