# SPDX-License-Identifier: Apache-2.0
"""Numbers and folders that the commands cannot work with are told before any work."""

import json

import pytest
from cli_kit import MODEL, refused, run
from continual_kit import write_concepts, write_spec
from pydantic import ValidationError
from stamina_adapters import fold_stamina, save_stamina_weights
from stamina_adapters.training.config import TrainingConfig


def _generate(model, out, *more):
    return run("generate", "a photo", MODEL, model, "--output_dir", out, *more)


def test_more_steps_than_the_scheduler_has_are_refused(model, tmp_path):
    outcome = _generate(model, tmp_path / "out", "--num_inference_steps", 1001)
    refused(outcome, "--num_inference_steps 1001", "1000 steps at most")
    assert not (tmp_path / "out").exists()


def test_a_benchmark_with_too_many_steps_is_refused_before_anything_is_learned(model, tmp_path):
    spec = write_spec(tmp_path, model, methods={})
    settings = json.loads(spec.read_text())
    settings["sampling"]["num_inference_steps"] = 1001
    spec.write_text(json.dumps(settings))
    runs = tmp_path / "runs"
    outcome = run("benchmark", "--sequence", spec, "--methods", "stamina", "--output", runs)
    refused(outcome, "sampling.num_inference_steps 1001", "1000 steps at most")
    assert not runs.exists()


def test_guidance_that_is_not_finite_is_refused(model, tmp_path):
    message = "--guidance_scale inf: must be a finite number"
    refused(_generate(model, tmp_path / "out", "--guidance_scale", "inf"), message)
    assert not (tmp_path / "out").exists()
    given = (MODEL, model, "--concepts_list", tmp_path / "none.json", "--guidance_scale", "inf")
    refused(run("evaluate", *given), message)


def test_seeds_beyond_a_generators_are_refused(model, tmp_path):
    for seed in (-1, 2**62 + 1, 2**63):
        outcome = _generate(model, tmp_path / "out", "--seed", seed)
        assert outcome.exit_code == 2
        assert "--seed" in outcome.stderr and str(seed) in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["forget_weight", "learning_rate", "sparse_weight"])
def test_infinite_settings_are_refused(name):
    with pytest.raises(ValidationError, match=name):
        TrainingConfig(**{name: float("inf")})


def test_folders_that_cannot_be_made_are_told(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(run("pretrain", "--output_dir", file), "--output_dir", "is a file")
    refused(run("pretrain", "--output_dir", file / "x"), "--output_dir", "cannot be made")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("nope", "backend must be one of reference, cpu, triton, cuda, got 'nope'"),
        ("triton", "backend 'triton' (from the environment variable STAMINA_BACKEND) cannot be"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_any_folder_is_made(
    model, tmp_path, monkeypatch, no_interpreter, backend, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("STAMINA_BACKEND", backend)
    out = tmp_path / "out"
    concepts = write_concepts(tmp_path / "concepts", 1)
    spec = write_spec(tmp_path / "spec", model, methods={"stamina": {}})
    for command in (
        ("train", MODEL, model, "--concepts_list", concepts, "--output_dir", out),
        ("generate", "a photo", MODEL, model, "--output_dir", out),
        ("demo", "--output", out),
        ("benchmark", "--sequence", spec, "--output", out),
    ):
        refused(run(*command), message)
        assert not out.exists()


@pytest.fixture
def learned_concept(pipe, learn, tmp_path):
    """A concept's file, learned on `model`."""
    learn(pipe)
    (file,) = save_stamina_weights(tmp_path / "c0.safetensors", fold_stamina(pipe))
    return file


def _full(*arguments, **named):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("command", "full"),
    [
        (("generate", "a photo", MODEL, "{model}", "--num_inference_steps", 2), "os.fsync"),
        (
            ("fold", "{concept}", MODEL, "{model}"),
            "diffusers.StableDiffusionPipeline.save_pretrained",
        ),
        (("pretrain",), "stamina_adapters.cli.pretrain.train_embedded"),
        (("demo",), "os.fsync"),
    ],
)
def test_a_full_disk_is_told(model, tmp_path, monkeypatch, learned_concept, command, full):
    out = tmp_path / "out"
    option = "--output" if command[0] == "demo" else "--output_dir"
    places = {"{model}": model, "{concept}": learned_concept}
    arguments = [places.get(word, word) for word in command]
    monkeypatch.setattr(full, _full)
    outcome = run(*arguments, option, out)
    assert outcome.exit_code == 2, outcome.output
    assert f"error: {option} {str(out)!r}: the disk is full; free some" in outcome.stderr
    assert not [path for path in out.rglob("*") if path.is_file()]
