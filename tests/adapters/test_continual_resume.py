# SPDX-License-Identifier: Apache-2.0
"""A benchmark killed at any moment ends with the bits and rows of an undisturbed one."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from continual_kit import comparable, write_spec
from safetensors.torch import load_file

EVENTS = (
    "step:3",  # in the middle of the first concept's second step
    "step:15",  # in the middle of a later concept
    "before-rename:1",
    "before-rename:2",
    "after-rename:1",  # the state is there, its rows are not
    "after-rename:3",
    "half-rows:2",
    "after-rows:2",
)


def _kill_everywhere(folder, model, method, events):
    spec = write_spec(folder, model, methods={})
    child = Path(__file__).with_name("continual_child.py")
    paths = [str(child.parent), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(child), str(spec), str(folder / "runs"), method, "3", *events]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def _assert_equal(one, other, method):
    for part in (f"{method}/seed-3", "levels"):
        assert comparable(one / part / "rows.jsonl") == comparable(other / part / "rows.jsonl")
    states = [load_file(run / method / "seed-3" / "state.safetensors") for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_a_killed_run_ends_like_an_undisturbed_one(model, tmp_path):
    _kill_everywhere(tmp_path, model, "fake", EVENTS)
    whole = tmp_path / "runs" / "whole"
    rows = comparable(whole / "fake" / "seed-3" / "rows.jsonl")
    kinds = [row["kind"] for row in rows]
    assert kinds.count("run") == 1
    assert [row["task"] for row in rows if row["kind"] == "concept"] == [1, 2, 3]
    assert [row["after"] for row in rows if row["kind"] == "checkpoint"] == [1, 3]
    for event in EVENTS:
        _assert_equal(tmp_path / "runs" / event.replace(":", "-"), whole, "fake")


def test_our_method_resumes_to_the_bit(model, tmp_path):
    events = ("after-rename:1", "step:15")
    _kill_everywhere(tmp_path, model, "stamina", events)
    for event in events:
        output = tmp_path / "runs" / event.replace(":", "-")
        _assert_equal(output, tmp_path / "runs" / "whole", "stamina")


def test_twenty_kills_at_random_moments_change_no_bit(model, tmp_path):
    _kill_everywhere(tmp_path, model, "stamina", ("random:20",))
    disturbed = sorted((tmp_path / "runs").glob("random-*"))
    assert disturbed
    for output in disturbed:
        _assert_equal(output, tmp_path / "runs" / "whole", "stamina")
