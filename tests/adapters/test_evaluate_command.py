# SPDX-License-Identifier: Apache-2.0
"""`stamina evaluate` on a tiny pipeline, and the CLIP that it may judge by."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from cli_kit import MODEL, refused, run, tree
from continual_kit import write_clip, write_concepts
from PIL import Image
from stamina_adapters.evaluation.clip import ClipEmbedder
from transformers import CLIPModel, CLIPVisionModelWithProjection


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    return write_concepts(tmp_path_factory.mktemp("concepts"), 2)


@pytest.fixture(scope="module")
def trained(model, concepts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    steps = ("--max_train_steps", 1, "--train_batch_size", 1, "--rank", 2, "--mask_rank", 2)
    where = ("--pretrained_model_name_or_path", model, "--concepts_list", concepts)
    outcome = run("train", *where, "--output_dir", folder, *steps)
    assert outcome.exit_code == 0, outcome.output
    return folder


@pytest.fixture
def evaluate(concepts):
    """A function from a model's folder and further options to the command's outcome."""

    def call(folder, *more):
        where = ("--pretrained_model_name_or_path", folder, "--concepts_list", concepts)
        few = ("--num_images_per_prompt", 3, "--num_inference_steps", 1)
        return run("evaluate", *where, *few, *more)

    return call


def test_evaluate_measures_what_a_folder_has_learned(trained, evaluate, tmp_path):
    clip, figures = write_clip(tmp_path / "clip"), tmp_path / "figures.json"
    outcome = evaluate(trained, "--clip", clip, "--output", figures)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(figures.read_text())
    assert found["judged_by"] == str(clip) and found["pictures"] == 3
    assert [row["token"] for row in found["concepts"]] == ["<v1>", "<v2>"]
    assert found["a_mmd"] == pytest.approx(sum(r["mmd"] for r in found["concepts"]) / 2)
    # 4 real and 6 drawn pictures are too few
    assert found["kid"] is None and 0 <= found["accuracy"] <= 1
    assert "told as itself, chance 0.50" in outcome.stdout
    assert re.search(r"KID x 1000 [^-\n]* - ", outcome.stdout)
    shipped = evaluate(trained)
    assert shipped.exit_code == 0 and "shipped encoder" in shipped.stdout.replace("\n", " ")


def test_kid_has_a_row_of_its_own_from_ten_pictures_on(trained, tmp_path):
    concepts, figures = write_concepts(tmp_path, 2), tmp_path / "figures.json"
    for number in (1, 2):
        for k in (2, 3, 4):
            Image.new("RGB", (12, 12), (80 * number, 50 * k, 0)).save(
                tmp_path / f"data{number}" / f"{k}.png"
            )
    few = ("--num_images_per_prompt", 5, "--num_inference_steps", 1, "--output", figures)
    outcome = run("evaluate", MODEL, trained, "--concepts_list", concepts, *few)
    assert outcome.exit_code == 0, outcome.output
    shown = f"{1e3 * json.loads(figures.read_text())['kid']:.3f}"
    assert re.search(rf"KID x 1000 .* {re.escape(shown)} ", outcome.stdout)


def test_evaluate_refuses_a_model_that_has_not_learned_the_concepts(model, evaluate):
    refused(evaluate(model), "has not learned <v1>, <v2>; give the folder")


def test_evaluate_refuses_a_prompt_that_the_model_would_cut(trained, concepts, tmp_path):
    entries = json.loads(concepts.read_text())
    entries[1]["instance_prompt"] = "a " * 90 + "<v2>"
    longer = tmp_path / "longer.json"
    longer.write_text(json.dumps(entries))
    outcome = run("evaluate", "--pretrained_model_name_or_path", trained, "--concepts_list", longer)
    refused(outcome, "--concepts_list: instance_prompt of '<v2>' has 93 tokens; shorten it to 77")


def test_evaluate_refuses_a_file_that_it_could_not_write(trained, evaluate, tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("mine")
    outcome = evaluate(trained, "--output", tmp_path / "old.json")
    refused(outcome, "--output", "exists; choose another file")
    outcome = evaluate(trained, "--output", tmp_path / "absent" / "new.json")
    refused(outcome, "--output", "its folder does not exist; make it")
    # root may write and read anywhere
    access = os.access
    monkeypatch.setattr("os.access", lambda at, mode: at != tmp_path and access(at, mode))
    outcome = evaluate(trained, "--output", tmp_path / "new.json")
    refused(outcome, "--output", "its folder is not writable; choose another")

    exists = Path.exists

    def denied(path):
        if path == tmp_path / "new.json":
            raise PermissionError(13, "Permission denied")
        return exists(path)

    monkeypatch.setattr("pathlib.Path.exists", denied)
    outcome = evaluate(trained, "--output", tmp_path / "new.json")
    refused(outcome, "--output", "its folder cannot be read; choose another")
    assert tree(tmp_path) == {Path("old.json"): b"mine"}


def test_figures_are_shown_although_the_disk_is_full(trained, evaluate, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    outcome = evaluate(trained, "--output", tmp_path / "new.json")
    assert outcome.exit_code == 2
    assert "--output" in outcome.stderr and "the disk is full" in outcome.stderr
    assert "told as itself" in outcome.stdout
    assert tree(tmp_path) == {}


def test_clip_embeds_as_transformers_does(tmp_path):
    folder = write_clip(tmp_path / "clip")
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    found = ClipEmbedder.from_folder(folder).embed(images)
    assert found.shape == (2, 12)
    whole = CLIPModel.from_pretrained(folder)
    half = CLIPVisionModelWithProjection(whole.config.vision_config)
    half.vision_model.load_state_dict(whole.vision_model.state_dict())
    half.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    half.save_pretrained(tmp_path / "half")
    torch.testing.assert_close(ClipEmbedder.from_folder(tmp_path / "half").embed(images), found)
    # a picture of one colour, normalised by the checkpoints' means and deviations
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    with torch.no_grad():
        expected = half.eval()(pixel_values=(red - mean) / std).image_embeds
    torch.testing.assert_close(found[:1], expected)
