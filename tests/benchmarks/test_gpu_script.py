# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.sh: what it runs, what it records, and what it says of a wrong argument.

A stand-in for the interpreter notes its arguments; the suites themselves run in the other tests.
"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STAGES = ["build", "tests", "gpu-unet", "gpu-ops", "gpu-step", "gpu-kv", "pictures"]
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$NOTES"
case "$*" in
  *"import torch"*) echo "$TORCH"; [ "$TORCH" != "no torch" ] ;;
  *"run $BROKEN "*) echo 'check failed: this one'; exit 1 ;;
  *"run $SLOW "*) sleep 60 ;;
  *"benchmarks run "*) echo '{}' >"$6" ;;
  *"benchmarks table "*) echo '| `figure` | 0.9 | >= 0.85 | yes |' ;;
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """Run the script; its outcome, what it had Python do, and the folder."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    notes, output = tmp_path / "notes", tmp_path / "results"

    def run(*arguments, broken="-", slow="-", torch="True"):
        environment = os.environ | {
            "PYTHON": str(python), "NOTES": str(notes), "BROKEN": broken, "SLOW": slow,
            "TORCH": torch,
        }  # fmt: skip
        outcome = subprocess.run(
            ["bash", SCRIPT, *map(str, arguments)],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return outcome, notes.read_text().splitlines() if notes.exists() else [], output

    run.output = output
    return run


def outcomes(output):
    """Stage -> what became of it, as recorded."""
    lines = (output / "stages.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|", 2)] for line in lines]
    return {stage: outcome for stage, _, outcome in cells}


def test_all_stages_run_in_order_and_goals_are_told(gpu):
    outcome, notes, output = gpu("--output", gpu.output)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcomes(output) == dict.fromkeys(STAGES, "ok")
    runs = [line.split() for line in notes if "benchmarks run" in line]
    assert [line[3] for line in runs] == STAGES[2:6]
    assert all(line[line.index("--device") + 1] == "cuda" for line in runs)
    assert any(line.startswith("-m pip install") and line.endswith("-e .") for line in notes)
    assert any("pytest" in line and "tests/kernels/test_triton.py" in line for line in notes)
    assert "| `figure` | 0.9 | >= 0.85 | yes |" in outcome.stdout
    assert "## Stages" in (output / "tables.md").read_text()


def test_a_dry_run_installs_nothing_and_runs_small_on_the_cpu(gpu):
    outcome, notes, _ = gpu("--output", gpu.output, "--dry-run")
    assert outcome.returncode == 0
    assert not [line for line in notes if "pip" in line]
    runs = [line for line in notes if "benchmarks run" in line]
    assert all("--device cpu --quick" in line for line in runs)
    assert any("pytest" in line and "--collect-only" in line for line in notes)


def test_wheels_are_installed_without_a_network(gpu, tmp_path):
    (tmp_path / "some-1-py3-none-any.whl").write_text("")
    _, notes, _ = gpu("--output", gpu.output, "--wheels", tmp_path, "--stages", "build")
    (wheels,) = [line for line in notes if "some-1-py3-none-any.whl" in line]
    assert "--no-index --no-deps" in wheels


def test_a_stage_that_fails_is_recorded_and_the_rest_runs(gpu):
    outcome, notes, output = gpu("--output", gpu.output, broken="gpu-step")
    assert outcome.returncode == 1
    found = outcomes(output)
    assert found.pop("gpu-step") == "status 1: check failed: this one"
    assert set(found.values()) == {"ok"}
    assert "check failed: this one" in outcome.stdout


def test_a_stage_that_hangs_is_stopped_and_the_time_left_goes_to_the_pictures(gpu):
    outcome, notes, output = gpu("--output", gpu.output, "--seconds", 36, slow="gpu-unet")
    assert outcome.returncode == 1
    found = outcomes(output)
    assert found["gpu-unet"].startswith("stopped after")
    assert found["gpu-kv"] == "left out: the 36 s are used up"
    assert found["pictures"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nothing"], ["--nothing"]),
        ([], ["--output"]),
        (["--output"], ["--output", "value"]),
        (["--output", "{}", "--seconds", "soon"], ["--seconds", "soon"]),
        (["--output", "{}", "--wheels", "{}/absent"], ["--wheels", "absent"]),
        (["--output", "{}", "--stages", "tests,gpu_unet"], ["--stages", "'gpu_unet'", "gpu-unet"]),
        (["--output", "{}", "--stages", "test"], ["--stages", "'test'", "tests"]),
        (["--output", "{}", "--stages", ""], ["--stages", "''", "tests"]),
    ],
)
def test_wrong_arguments_are_named_before_any_work(gpu, tmp_path, arguments, words):
    outcome, notes, _ = gpu(*(argument.format(tmp_path / "o") for argument in arguments))
    assert outcome.returncode == 2
    assert notes == []
    (line,) = outcome.stderr.splitlines()
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("torch", "options", "words"),
    [
        ("no torch", [], ["cannot import torch: no torch"]),
        ("no torch", ["--dry-run"], ["cannot import torch: no torch"]),
        ("a warning\nFalse", [], ["torch.cuda.is_available() is false", "--dry-run"]),
    ],
)
def test_without_torch_or_a_gpu_no_stage_begins(gpu, torch, options, words):
    outcome, notes, output = gpu("--output", gpu.output, *options, torch=torch)
    assert outcome.returncode == 2
    assert len(notes) == 1 and "import torch" in notes[0]
    assert list(output.iterdir()) == []
    (line,) = outcome.stderr.splitlines()
    assert all(word in line for word in words)


def test_a_dry_run_needs_no_gpu_and_a_warning_of_torch_hides_none(gpu):
    small, _, _ = gpu("--output", gpu.output, "--dry-run", "--stages", "build", torch="False")
    whole, _, _ = gpu("--output", gpu.output, "--stages", "build", torch="a warning\nTrue")
    assert small.returncode == whole.returncode == 0
