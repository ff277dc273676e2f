# SPDX-License-Identifier: Apache-2.0
"""What the tests of commands share: to run one, and what a refusal is and leaves."""

from stamina_adapters.cli import app
from typer.testing import CliRunner

MODEL = "--pretrained_model_name_or_path"
STEPS = ["--max_train_steps", "3", "--train_batch_size", "2", "--rank", "2", "--mask_rank", "2"]


def run(*arguments):
    """A command's outcome."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(model, concepts, output, *more):
    """The outcome of a short training."""
    where = (MODEL, model, "--concepts_list", concepts, "--output_dir", output)
    return run("train", *where, *STEPS, *more)


def refused(outcome, *words):
    """The outcome is one line on stderr that holds all words, and a status other than 0."""
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stdout == ""
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def tree(folder):
    """Every path below a folder with its bytes."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
