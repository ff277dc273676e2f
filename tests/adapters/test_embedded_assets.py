# SPDX-License-Identifier: Apache-2.0
"""The shipped assets: they load with diffusers alone, sample, tell identities, hold the gate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from stamina_adapters.embedded import (
    assets_dir,
    heldout_identities,
    load_encoder,
    render,
)
from stamina_adapters.embedded.captions import vocabulary
from stamina_adapters.embedded.ceiling import load_pipeline, train_ceiling
from stamina_adapters.embedded.encoder import attribute_table, centroids, retrieval
from stamina_adapters.embedded.gate import CEILING_BOUND, RECONSTRUCTION_BOUND, check


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return load_pipeline(assets_dir())


def test_assets_are_small_and_hold_no_pickle() -> None:
    files = [path for path in assets_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_stock_pipeline_samples_pictures() -> None:
    stock = StableDiffusionPipeline.from_pretrained(assets_dir(), safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    assert stock.scheduler.config.prediction_type == "v_prediction"
    pictures = [
        stock(
            "a photo of a castle",
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        for seed in (0, 0, 1)
    ]
    assert pictures[0].shape == (1, 64, 64, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_shipped_tokenizer_has_one_token_a_word(pipe: StableDiffusionPipeline) -> None:
    for word in vocabulary():
        assert len(pipe.tokenizer(word).input_ids) == 3, word


def test_encoder_tells_heldout_identities() -> None:
    people = [i for i in heldout_identities() if i.split == "sequence"][:50]
    encoder = load_encoder()
    queries = np.concatenate([render(identity, 4, seed=77) for identity in people])
    answer = torch.arange(len(people)).repeat_interleave(4)
    assert retrieval(encoder, queries, answer, centroids(encoder, people)) >= 0.95


def test_encoder_takes_bytes_and_floats_in_both_layouts() -> None:
    encoder = load_encoder()
    pictures = torch.from_numpy(render(heldout_identities()[0], 3, seed=1))
    reference = encoder.embed(pictures)
    assert torch.allclose(reference.norm(dim=1), torch.ones(3), atol=1e-5)
    # The same numbers in another layout: only the order of sums may differ.
    for other in (pictures.permute(0, 3, 1, 2), pictures / 255.0, pictures.numpy()):
        assert torch.allclose(encoder.embed(other), reference, atol=1e-4)
    read = encoder.attributes(pictures)
    assert {name: value.shape[1] for name, value in read.items()} == {
        name: len(words) for name, words in attribute_table().items()
    }
    with pytest.raises(ValueError, match=r"images must be \[n, 3, 64, 64\]"):
        encoder.embed(pictures[:, :32])
    with pytest.raises(ValueError, match="uint8 or floating point, not torch.int64"):
        encoder.embed(pictures.long())


def test_gate_report_holds() -> None:
    report = json.loads((assets_dir() / "gate.json").read_text())
    assert report["reconstruction"]["retrieval_reconstructed"] >= RECONSTRUCTION_BOUND
    assert report["ceiling"]["mean"] >= CEILING_BOUND and len(report["ceiling"]["concepts"]) >= 10
    assert {name.split("-")[0] for name in report["ceiling"]["concepts"]} == {"face", "landmark"}
    assert report["passed"] is True


def test_ceiling_leaves_the_base_as_it_was(pipe: StableDiffusionPipeline) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    pictures = render(heldout_identities()[-1], 4, seed=1)
    taught = train_ceiling(pipe, pictures, steps=2, batch=2)
    after = taught.unet.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("attn2.to_k" in n or "attn2.to_v" in n for n in changed)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert len(taught.tokenizer) == len(pipe.tokenizer) + 1
    with pytest.raises(ValueError, match="token 'castle' is in the vocabulary already"):
        train_ceiling(pipe, pictures, token="castle")


def test_check_names_a_folder_without_a_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
        check(tmp_path)
