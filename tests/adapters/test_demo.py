# SPDX-License-Identifier: Apache-2.0
"""`stamina demo` on an embedded model of random weights: what it writes, and what it claims."""

import json
import re

import pytest
import torch
from PIL import Image
from stamina_adapters.cli import app
from stamina_adapters.cli import demo as demo_module
from stamina_adapters.cli.report import ConceptReport, DemoReport, layer_groups
from stamina_adapters.embedded import autoencoder, diffusion
from stamina_adapters.embedded.captions import save_tokenizer
from stamina_adapters.embedded.encoder import Encoder
from stamina_adapters.evaluation.cost import KeyValueShape
from transformers import CLIPTokenizer
from typer.testing import CliRunner

KEYS = {
    "concepts",
    "accuracy_base",
    "accuracy_ceiling",
    "accuracy_after_learning",
    "accuracy_final",
    "a_mmd",
    "f_mmd",
    "mask_density",
    "saved_mib_ours",
    "saved_mib_eager",
    "step_ms_ours",
    "step_ms_eager",
    "step_ms_ours_sd15",
    "step_ms_eager_sd15",
    "stock_pipeline_bit_identical",
    "seconds",
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Everything that the package ships, untrained."""
    folder = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(0)
    save_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = diffusion.new_model(tokenizer, 0)
    vae = autoencoder.new_autoencoder(0)
    diffusion.save_pipeline(folder / "assets", model, vae, folder / "tokenizer", 1.0)
    Encoder().save(folder / "assets" / "encoder")
    return folder / "assets"


@pytest.fixture(scope="module")
def output(assets, tmp_path_factory):
    """What a very short demo wrote."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("stamina_adapters.embedded", "stamina_adapters.cli.embedded"):
            patch.setattr(f"{module}.assets_dir", lambda: assets)
        patch.setattr(demo_module, "SAMPLES", 3)
        patch.setattr(demo_module, "DISTRACTORS", 3)
        small = {"num_inference_steps": 1, "guidance_scale": 1.0, "pictures": 3}
        patch.setattr(demo_module, "SAMPLING", demo_module.SAMPLING.model_copy(update=small))
        patch.setattr(demo_module, "SD15_SHAPES", (KeyValueShape(32, 16, 4),))
        patch.setattr(demo_module, "CEILING", {"steps": 1})
        arguments = ["--max_train_steps", "2", "--train_batch_size", "2"]
        outcome = CliRunner().invoke(app, ["demo", "--output", str(folder), *arguments])
    assert outcome.exit_code == 0, outcome.output
    assert "Told as itself among 8 identities" in outcome.stdout
    assert "report.html" in outcome.stdout.replace("\n", "")
    return folder


def test_the_report_has_its_keys(output):
    report = json.loads((output / "report.json").read_text())
    assert report.keys() >= KEYS
    DemoReport.model_validate(report)
    assert [c["identity"] for c in report["concepts"]] == [
        "face-000",
        "landmark-000",
        "face-001",
        "landmark-001",
        "face-002",
    ]
    assert report["stock_pipeline_bit_identical"] is True
    assert report["identities"] == 8
    for key in (k for k in KEYS if k.startswith("accuracy_")):
        mean = sum(concept[key] for concept in report["concepts"]) / 5
        assert report[key] == pytest.approx(mean)
        assert 0 <= report[key] <= 1
    assert 0 < report["saved_mib_ours"] < report["saved_mib_eager"]
    assert all(0 <= density <= 1 for density in report["mask_density"].values())


def test_the_page_needs_nothing_else(output):
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "http" not in page
    assert "url(" not in page


def test_the_grid_shows_five_concepts(output):
    grid = Image.open(output / "grid.png")
    assert grid.width > grid.height > 5 * 100


def test_the_run_leaves_pipeline_and_concept_files(output):
    assert (output / "run" / "model_index.json").is_file()
    assert len(list((output / "run" / "concepts").iterdir())) == 5


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    outcome = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: --output ")
    assert "is in use (not empty); choose an empty or new folder" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_densities_are_grouped_by_block_and_projection_and_weighted():
    paths = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (0.5, 10),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (0.2, 30),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (0.1, 5),
    }
    groups = layer_groups(
        {path: density for path, (density, _) in paths.items()},
        {path: count for path, (_, count) in paths.items()},
    )
    assert groups == pytest.approx({"down_blocks.0 to_k": 0.275, "mid_block to_v": 0.1})


def _report(**changes):
    concept = ConceptReport(
        token="<v1>",
        identity="face-000",
        family="face",
        accuracy_base=0.0,
        accuracy_ceiling=1.0,
        accuracy_after_learning=0.9,
        accuracy_final=0.85,
        mask_density={"mid_block to_k": 0.3},
        loss_sampled_masks=0.1,
        loss_committed_masks=0.1,
        seconds=1.0,
    )
    sound = {
        "concepts": [concept],
        "identities": 50,
        "pictures": 16,
        "accuracy_base": 0.0,
        "accuracy_ceiling": 1.0,
        "accuracy_after_learning": 0.9,
        "accuracy_final": 0.85,
        "a_mmd": 0.1,
        "f_mmd": 0.1,
        "mask_density": {"mid_block to_k": 0.3},
        "saved_mib_ours": 1.0,
        "saved_mib_eager": 4.0,
        "step_ms_ours": 1.0,
        "step_ms_eager": 2.0,
        "step_ms_ours_sd15": 1.0,
        "step_ms_eager_sd15": 2.1,
        "stock_pipeline_bit_identical": True,
        "backend": "cpu",
        "threads": 1,
        "seed": 0,
        "seconds": 1.0,
    }
    return DemoReport(**{**sound, **changes})


def test_a_sound_run_meets_every_expectation():
    assert all(_report().expectations().values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"accuracy_final": 0.84}, "ceiling"),
        ({"accuracy_after_learning": 0.96}, "right after learning"),
        ({"mask_density": {"a": 0.3, "b": 0.7}}, "density"),
        ({"mask_density": {"a": 0.02, "b": 0.3}}, "density"),
        ({"saved_mib_eager": 3.9}, "memory"),
        ({"step_ms_eager_sd15": 2.0}, "SD 1.5"),
        ({"stock_pipeline_bit_identical": False}, "bits"),
    ],
)
def test_each_expectation_can_fail(changes, word):
    missed = [text for text, met in _report(**changes).expectations().items() if not met]
    assert len(missed) == 1
    assert word in missed[0]
