# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as it is printed."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

README = Path(__file__).parents[2] / "README.md"


def _blocks():
    pipeline, kernels = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return pipeline, kernels


def test_the_pipeline_example_trains_folds_and_saves(pipe, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)

    def denoising_loss(pipe, prompt):
        tokens = pipe.tokenizer(prompt, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(tokens)[0]
        noisy = torch.randn(1, 4, 8, 8)
        return pipe.unet(noisy, torch.tensor([500]), hidden).sample.square().mean()

    before = pipe.unet.state_dict()[
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ]
    before = before.clone()
    exec(_blocks()[0], {"pipe": pipe, "steps": 2, "denoising_loss": denoising_loss})
    assert (tmp_path / "concepts" / "v1.safetensors").is_file()
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "with-v1")
    assert "<v1>" in stock.tokenizer.get_vocab()
    after = stock.unet.state_dict()[
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ]
    assert not torch.equal(after, before)


def test_the_kernel_example_has_gradients():
    names = {}
    exec(_blocks()[1], names)
    assert names["k"].shape == names["v"].shape == (2, 77, 320)
    key = names["key"]
    assert all(torch.isfinite(getattr(key, f).grad).all() for f in "ABUVb")
    assert key.A.grad.abs().sum() > 0
