# SPDX-License-Identifier: Apache-2.0
"""What is left of fifty concepts: a stock pipeline, and any one of them comes out again."""

import subprocess
import sys

import pytest
import torch
from stamina_adapters import (
    add_custom_token,
    delete_stamina,
    fold_concepts,
    fold_stamina,
    unfold_stamina,
)

COUNT = 50
STRANGER = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
drawn = [
    pipe(f"a photo of <c{k}>", num_inference_steps=2, height=8, width=8, output_type="pt",
         generator=torch.Generator().manual_seed(1)).images
    for k in (0, 16, 49)
]
assert not [name for name in sys.modules if name.startswith("stamina")]
torch.save(torch.cat(drawn), sys.argv[2])
"""


def _size(pipe):
    return sum(p.numel() for m in (pipe.unet, pipe.text_encoder, pipe.vae) for p in m.parameters())


def _weights(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def fifty(pipe, learn):
    """The pipeline with fifty concepts in it, and their states."""
    states = []
    for k in range(COUNT):
        learn(pipe, f"c{k}", std=0.05)
        add_custom_token(pipe, f"<c{k}>")
        states.append(fold_stamina(pipe))
    return pipe, states


def test_a_stock_pipeline_draws_the_same_without_the_library(fifty, stock_pipe, render, tmp_path):
    pipe, _ = fifty
    row = pipe.text_encoder.get_input_embeddings().embedding_dim
    assert _size(pipe) == _size(stock_pipe) + COUNT * row
    assert pipe.unet.state_dict().keys() == stock_pipe.unet.state_dict().keys()
    drawn = torch.cat([render(pipe, f"a photo of <c{k}>") for k in (0, 16, 49)])
    assert not torch.equal(drawn[0], drawn[1])
    pipe.save_pretrained(tmp_path / "sd")
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "sd"), str(tmp_path / "drawn.pt")]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "drawn.pt", weights_only=True), drawn)


def test_taking_one_out_is_never_having_learned_it(fifty, stock_pipe, pipe_of):
    pipe, states = fifty
    other = pipe_of(stock_pipe)
    fold_concepts(other, [state for k, state in enumerate(states) if k != 16])
    unfold_stamina(pipe, "c16")
    left, never = _weights(pipe.unet), _weights(other.unet)
    assert all(torch.equal(left[key], never[key]) for key in left)
    delete_stamina(pipe, "c16")
    assert pipe.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    left, never = _weights(pipe.text_encoder), _weights(other.text_encoder)
    assert all(torch.equal(left[key], never[key]) for key in left)
