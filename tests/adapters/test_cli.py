# SPDX-License-Identifier: Apache-2.0
"""The commands on a tiny pipeline: what they write, and what each user error says and leaves."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from cli_kit import MODEL, refused, run, train, tree
from continual_kit import write_concepts
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from stamina_adapters import StaminaConfig
from stamina_adapters.cli import app
from typer.main import get_command


@pytest.fixture
def concepts(tmp_path):
    """A concept list of two concepts, as JSON."""
    return write_concepts(tmp_path, 2)


@pytest.fixture(scope="session")
def trained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    outcome = train(model, write_concepts(folder, 2), folder / "out")
    assert outcome.exit_code == 0, outcome.output
    return folder / "out"


def test_train_writes_a_stock_pipeline_and_a_file_for_each_concept(trained, model):
    assert {path.name for path in trained.iterdir()} == {
        "concepts",
        "training.json",
        *(path.name for path in model.iterdir()),
    }
    assert sorted(path.name for path in (trained / "concepts").iterdir()) == [
        "v1.safetensors",
        "v2.safetensors",
    ]
    learned = load_file(trained / "unet/diffusion_pytorch_model.safetensors")
    stock = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    assert learned.keys() == stock.keys()
    pipe = StableDiffusionPipeline.from_pretrained(trained)
    assert {"<v1>", "<v2>"} <= pipe.tokenizer.get_added_vocab().keys()
    record = json.loads((trained / "training.json").read_text())
    assert [concept["token"] for concept in record["concepts"]] == ["<v1>", "<v2>"]
    assert record["training"]["max_train_steps"] == 3
    assert record["method"]["adapter"]["r"] == 2


@pytest.mark.parametrize("given", [("v1.safetensors", "v2.safetensors"), (".",)])
def test_fold_rebuilds_the_trained_pipeline_from_the_concept_files(trained, model, tmp_path, given):
    outcome = _fold(model, tmp_path / "folded", *(trained / "concepts" / name for name in given))
    assert outcome.exit_code == 0, outcome.output
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        folded, learned = (load_file(f / part) for f in (tmp_path / "folded", trained))
        assert all(torch.equal(folded[name], learned[name]) for name in learned)


def test_generate_writes_pictures_that_depend_on_the_seed_alone(trained, tmp_path):
    def generate(output, *more):
        return run(
            "generate",
            "--pretrained_model_name_or_path",
            trained,
            "a photo of <v1>",
            "<v2>",
            "--num_images_per_prompt",
            2,
            "--num_inference_steps",
            2,
            "--output_dir",
            output,
            *more,
        )

    # the last name is what rich would take for a style
    names = ("a", "b", "c[red]")
    for name, more in zip(names, ((), (), ("--seed", 7)), strict=True):
        outcome = generate(tmp_path / name, *more)
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout.rstrip().endswith(f"in {tmp_path / name}")
    first, again, other = (tree(tmp_path / name) for name in names)
    assert sorted(map(str, first)) == ["00-000.png", "00-001.png", "01-000.png", "01-001.png"]
    assert first == again
    assert first != other


def test_one_picture_is_not_called_pictures(trained, tmp_path):
    few = ("--num_images_per_prompt", 1, "--num_inference_steps", 1)
    out = tmp_path / "out"
    outcome = run("generate", "<v1>", MODEL, trained, *few, "--output_dir", out)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.splitlines() == ["draw 1 picture", f"1 picture in {out}"]
    judged = run("evaluate", MODEL, trained, "--concepts_list", write_concepts(tmp_path, 2), *few)
    assert judged.exit_code == 0, judged.output
    assert "1 picture each" in judged.stdout


def _shown(*arguments):
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return re.sub(r"\x1b\[[0-9;]*m", "", outcome.stdout)


def test_options_have_diffusers_spelling():
    shown = _shown("train", "--help")
    for option in ("--output_dir", "--max_train_steps", "--learning_rate", "--train_batch_size"):
        assert option in shown


@pytest.mark.parametrize("name", sorted(get_command(app).commands))
def test_no_option_name_is_cut_at_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = get_command(app).commands[name]
    shown = _shown(name, "--help")
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) == 80
    for parameter in command.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert not option.startswith("--") or f" {option} " in shown


def test_every_option_of_an_adapter_is_explained():
    adapter = _shown("train", "--help").partition("Adapter")[2]
    assert "rank of A B" in adapter
    assert all(field.description for field in StaminaConfig.model_fields.values())


def test_the_version_is_the_packages():
    assert _shown("--version") == f"stamina-kernels {version('stamina-kernels')}\n"
    assert "one concept after the other" in _shown("--help")


# Each case spoils one thing of a sound call of `train`; nothing may be written or changed.
def _edit(file, change):
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def _missing_folder(tmp_path, file):
    _edit(file, lambda entries: entries[1].update(instance_data_dir=str(tmp_path / "absent")))
    return {}


def _empty_folder(tmp_path, file):
    (tmp_path / "empty").mkdir()
    _edit(file, lambda entries: entries[1].update(instance_data_dir=str(tmp_path / "empty")))
    return {}


def _corrupt_image(tmp_path, file):
    picture = tmp_path / "data2" / "1.png"
    picture.write_bytes(picture.read_bytes()[:60])
    return {}


def _unknown_key(tmp_path, file):
    _edit(file, lambda entries: entries[0].update(class_prompt="a face"))
    return {}


def _duplicate_token(tmp_path, file):
    _edit(file, lambda entries: entries[1].update(instance_prompt="a <v1>"))
    return {}


def _known_word(tmp_path, file):
    _edit(file, lambda entries: entries[1].update(instance_prompt="a photo of x", token="x"))
    return {}


def _known_word_in_capitals(tmp_path, file):
    _edit(file, lambda entries: entries[1].update(instance_prompt="a photo of X", token="X"))
    return {}


def _long_prompt(tmp_path, file):
    _edit(file, lambda entries: entries[0].update(instance_prompt="a " * 90 + "<v1>"))
    return {}


def _used_output(tmp_path, file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    return {}


def _file_output(tmp_path, file):
    (tmp_path / "out").write_text("mine")
    return {}


def _missing_model(tmp_path, file):
    return {"model": tmp_path / "no-model"}


def _no_pipeline(tmp_path, file):
    return {"model": tmp_path / "data1"}


def _other_pipeline(tmp_path, file):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return {"model": tmp_path / "other"}


def _damaged_index(tmp_path, file):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text("{")
    return {"model": tmp_path / "other"}


def _incomplete_model(tmp_path, file):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    return {"model": tmp_path / "other"}


def _missing_list(tmp_path, file):
    return {"concepts": tmp_path / "absent.json"}


def _no_steps(tmp_path, file):
    return {"more": ("--max_train_steps", "0")}


def _no_rank(tmp_path, file):
    return {"more": ("--rank", "0")}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            _missing_folder,
            ("--concepts_list", ": entry 1: instance_data_dir", "no such folder; give a folder"),
        ),
        (_empty_folder, ("instance_data_dir", "is empty; put")),
        (_corrupt_image, ("instance_data_dir", "1.png", "cannot be decoded", "replace or remove")),
        (_unknown_key, ("--concepts_list", "unknown key 'class_prompt'; remove it")),
        (_duplicate_token, ("--concepts_list", "'<v1>' is used twice", "rename one")),
        (_known_word, ("--concepts_list", "'x' is already in the vocabulary", "choose another")),
        (_known_word_in_capitals, ("--concepts_list", "'X' is already in the vocabulary")),
        (_long_prompt, ("--concepts_list", "instance_prompt of '<v1>' has 93 tokens; shorten")),
        (_used_output, ("--output_dir", "in use", "choose an empty or new folder")),
        (_file_output, ("--output_dir", "is a file; choose")),
        (_missing_model, ("--pretrained_model_name_or_path", "no such folder; give")),
        (_no_pipeline, ("--pretrained_model_name_or_path", "no model_index.json; give")),
        (_other_pipeline, ("--pretrained_model_name_or_path", "is a FluxPipeline; give")),
        (_damaged_index, ("--pretrained_model_name_or_path", "model_index.json is damaged")),
        (_incomplete_model, ("--pretrained_model_name_or_path", "cannot be loaded")),
        (_missing_list, ("--concepts_list", "cannot be read", "give a JSON file")),
        (_no_steps, ("--max_train_steps", "greater than or equal to 1, not 0")),
        (_no_rank, ("--rank", "greater than or equal to 1, not 0")),
    ],
)
def test_train_refuses_in_one_line_and_writes_nothing(model, concepts, tmp_path, spoil, words):
    given = {"model": model, "concepts": concepts, "more": (), **spoil(tmp_path, concepts)}
    before = tree(tmp_path)
    outcome = train(given["model"], given["concepts"], tmp_path / "out", *given["more"])
    refused(outcome, *words)
    assert tree(tmp_path) == before


def test_train_tells_of_a_disk_without_room_and_of_a_full_one(model, concepts, tmp_path):
    class Usage:
        free = 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stamina_adapters.continual.folder.shutil.disk_usage", lambda path: Usage)
        refused(train(model, concepts, tmp_path / "out"), "--output_dir", "MiB free")
    assert not (tmp_path / "out").exists()

    def full_for_tensors(*arguments, **named):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    synced = []

    def full_for_files(handle):
        synced.append(handle)
        if len(synced) > 2:  # the first concept's file and its folder fit
            raise OSError(28, "No space left on device")

    for place, full in (
        ("diffusers.StableDiffusionPipeline.save_pretrained", full_for_tensors),
        ("os.fsync", full_for_files),
    ):
        out = tmp_path / place
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, full)
            outcome = train(model, concepts, out)
        assert outcome.exit_code == 2, outcome.output
        assert f"error: --output_dir {str(out)!r}: the disk is full; free some" in outcome.stderr
        assert (out / "concepts" / "v1.safetensors").is_file()
        assert not (out / "model_index.json").exists()


def test_a_model_of_ones_own_needs_concepts(model, tmp_path):
    outcome = run(
        "train", "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out"
    )
    refused(outcome, "--concepts_list", "is needed with a model of your own; give a JSON list")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of <v9>", ("PROMPT", "knows no <v9>; it has learned <v1>, <v2>")),
        ("  ", ("PROMPT", "is blank; describe the picture")),
        ("a " * 90 + "<v1>", ("PROMPT", "has 93 tokens; shorten it to 77")),
    ],
)
def test_generate_refuses_prompts(trained, tmp_path, prompt, words):
    outcome = run(
        "generate",
        "--pretrained_model_name_or_path",
        trained,
        prompt,
        "--output_dir",
        tmp_path / "out",
    )
    refused(outcome, *words)
    assert not (tmp_path / "out").exists()


def test_generate_and_fold_refuse_a_folder_in_use(trained, model, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    generated = run("generate", "a", "--output_dir", tmp_path)
    refused(generated, "--output_dir", "in use (not empty); choose an empty or new folder")
    folded = run("fold", trained / "concepts" / "v1.safetensors", "--output_dir", tmp_path)
    refused(folded, "--output_dir", "in use (not empty); choose an empty or new folder")
    assert (tmp_path / "kept.txt").read_text() == "mine"


def _fold(model, output, *files):
    return run("fold", *files, "--pretrained_model_name_or_path", model, "--output_dir", output)


def test_fold_refuses_files_that_do_not_fit(trained, model, tmp_path):
    file = trained / "concepts" / "v1.safetensors"
    out = tmp_path / "out"
    refused(_fold(model, out, tmp_path / "absent"), "CONCEPTS", "no such file; give files")
    refused(_fold(model, out, trained), "CONCEPTS", "no .safetensors file; give the folder")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    refused(_fold(model, out, tmp_path / "cut.safetensors"), "CONCEPTS", "cut.safetensors")
    refused(_fold(model, out, file, file), "CONCEPTS", "v1")
    way_on = f"give the folder that it was learned on with {MODEL}"
    refused(_fold(trained, out, file), "CONCEPTS", f"(wrong base digest); {way_on}")
    assert not out.exists()


def test_an_unknown_option_is_refused(tmp_path):
    outcome = run("train", "--output_dir", tmp_path / "out", "--unknown")
    assert outcome.exit_code == 2
    assert "No such option" in outcome.output
    assert not (tmp_path / "out").exists()


def test_pretrain_refuses_a_file_and_a_model_without_encoder(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(run("pretrain", "--output_dir", tmp_path / "file"), "--output_dir", "is a file")
    checked = run("pretrain", "--check", "--pretrained_model_name_or_path", model)
    refused(checked, "--pretrained_model_name_or_path", "holds no image encoder")


def test_a_missing_embedded_model_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("stamina_adapters.cli.embedded.assets_dir", lambda: tmp_path / "absent")
    outcome = run("generate", "a", "--output_dir", tmp_path / "out")
    refused(outcome, "embedded model", "is missing; reinstall the package")
