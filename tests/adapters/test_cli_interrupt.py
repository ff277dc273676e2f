# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in `stamina train`: what it says is kept, and the way on from there."""

import shlex

import pytest
from cli_kit import refused, run, train
from continual_kit import write_concepts
from stamina_adapters.training.trainer import ContinualTrainer
from transformers import CLIPTokenizer


@pytest.fixture
def interrupted_train(model, tmp_path, monkeypatch):
    """A function from how many concepts are finished before Ctrl-C to folder and outcome."""

    def call(finished):
        calls = []
        original = ContinualTrainer.learn

        def learn(self, *arguments):
            if len(calls) == finished:
                raise KeyboardInterrupt
            calls.append(arguments)
            return original(self, *arguments)

        out = tmp_path / "my run"
        with monkeypatch.context() as patch:
            patch.setattr(ContinualTrainer, "learn", learn)
            outcome = train(model, write_concepts(tmp_path, 3), out)
        assert outcome.exit_code == 130, outcome.output
        (line,) = outcome.stderr.splitlines()
        return out, line

    return call


def test_finished_concepts_make_a_pipeline(interrupted_train, model, tmp_path):
    out, line = interrupted_train(2)
    told, _, command = line.partition("; make a pipeline with: ")
    assert told == f"interrupted: <v1>, <v2> kept in {str(out / 'concepts')!r}"
    program, *arguments = shlex.split(command)
    assert program == "stamina" and arguments[-1] == "NEW"
    folded = run(*arguments[:-1], tmp_path / "new")
    assert folded.exit_code == 0, folded.output
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "new" / "tokenizer")
    assert {"<v1>", "<v2>"} <= tokenizer.get_added_vocab().keys()
    assert "<v3>" not in tokenizer.get_added_vocab()


def test_the_folder_of_an_unfinished_training_is_refused_with_the_way_on(
    interrupted_train, model, tmp_path
):
    out, _ = interrupted_train(1)
    again = train(model, tmp_path / "concepts1.json", out)
    way_on = f"stamina fold makes a pipeline of the files in {str(out / 'concepts')!r}"
    refused(again, "--output_dir", "in use (not empty)", way_on)
    (out / "model_index.json").write_text("{}")
    assert "stamina fold" not in train(model, tmp_path / "concepts1.json", out).stderr


def test_without_a_finished_concept_that_is_told_and_nothing_is_removed(interrupted_train):
    out, line = interrupted_train(0)
    assert line.startswith("interrupted: no concept is finished; choose an empty or new folder")
    assert (out / "concepts").is_dir()
