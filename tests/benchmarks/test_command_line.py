# SPDX-License-Identifier: Apache-2.0
"""What the commands print and write, and what each user error says before any work."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import command
from PIL import Image

from benchmarks import cli, report
from benchmarks.suites import SUITES
from stamina_kernels import dispatch

PICTURES = {
    "linear": {"linear-time.png", "linear-time-16bit.png", "linear-roofline.png"},
    "group": {"group-time.png", "group-roofline.png"},
    "fold": {"fold-time.png", "fold-time-16bit.png"},
    "memory": {"memory.png"},
    "scale": {"scale-time.png", "scale-concepts.png"},
    "gpu-ops": {"gpu-ops-time.png", "gpu-ops-rates.png"},
    "gpu-kv": {"gpu-kv-time.png"},
    "gpu-step": {"gpu-step-time.png"},
    "gpu-unet": {"gpu-unet-time.png"},
}
# a step of four small layers may find all its memory among what the process has
IF_IT_GREW = {"gpu-step-memory.png", "gpu-unet-memory.png"}
OURS = [(0xD5, 0x5E, 0x00), (0x88, 0x22, 0x55)]  # the default backend, and the one named cpu


@pytest.fixture
def no_work(monkeypatch):
    def run_suite(*_):
        raise AssertionError("work began")

    monkeypatch.setattr(cli, "run_suite", run_suite)


def refused(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stdout == ""
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert str(word) in line


def test_without_a_command_the_suites_are_listed():
    outcome = command()
    assert outcome.exit_code == 0
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == list(SUITES)


def test_unknown_suite(no_work, tmp_path):
    refused(command("run", "lines", "--json", tmp_path / "a.json"), "SUITE", "'lines'", "linear")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["absent/a.json", "."])
def test_unwritable_file(no_work, tmp_path, place):
    refused(command("run", "linear", "--json", tmp_path / place), "--json", tmp_path)


def test_folder_without_permission(no_work, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    refused(command("run", "linear", "--json", tmp_path / "a.json"), "--json", "not writable")


@pytest.mark.parametrize("device", ["tpu", "meta", "cpu:0"])
def test_unusable_device(no_work, tmp_path, device):
    outcome = command("run", "linear", "--json", tmp_path / "a.json", "--device", device)
    refused(outcome, "--device", device)


@pytest.fixture
def no_library(monkeypatch):
    """The backend of CPUs was not built."""
    monkeypatch.delenv("STAMINA_BACKEND", raising=False)
    found = dispatch.backends() | {"cpu": "_cpu.so was not built"}
    monkeypatch.setattr(dispatch, "backends", lambda: found)


def test_ours_is_not_the_reference_unless_it_is_asked_for(
    no_work, no_library, tmp_path, monkeypatch
):
    run = ("run", "linear", "--json", tmp_path / "a.json")
    words = ("'ours'", "'cpu'", "_cpu.so was not built", "STAMINA_BACKEND=reference")
    refused(command(*run), *words)
    # that suite names every backend and leaves out those that are missing
    assert "work began" in str(command("run", "gpu-kv", *run[2:]).exception)
    monkeypatch.setenv("STAMINA_BACKEND", "reference")
    assert "work began" in str(command(*run).exception)


WHOLE = '"machine": {"cpu": "c", "device": "cpu", "threads": 1}, "versions": {}, "summary": {}'


@pytest.mark.parametrize(
    "text",
    [
        None, "{", "[]", '{"rows": []}', f'{{"rows": 7, {WHOLE}}}', f'{{"rows": [1], {WHOLE}}}',
        '{"rows": [], "machine": {}, "versions": {}, "summary": {}}',
        '{"rows": [], "machine": 3, "versions": {}, "summary": {}}',
    ],
)  # fmt: skip
def test_unreadable_result(tmp_path, text):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    refused(command("plot", file), file)
    refused(command("table", file), file)
    refused(command("compare", file, file), file)


def test_drawing_without_matplotlib(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(f'{{"rows": [], {WHOLE}}}')
    program = (
        "import sys; sys.modules['matplotlib'] = None; "
        f"from benchmarks.cli import app; app(['plot', {str(file)!r}])"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: plot needs matplotlib, which the extra 'bench' has: ")


def test_unwritable_picture_folder(files, tmp_path):
    (tmp_path / "taken").write_text("")
    refused(command("plot", files["fold"], "--output", tmp_path / "taken"), "--output", "taken")


@pytest.mark.parametrize("suite", SUITES)
def test_pictures_are_drawn(files, tmp_path, suite):
    outcome = command("plot", files[suite], "--output", tmp_path / "pictures")
    assert outcome.exit_code == 0, outcome.output
    drawn = list((tmp_path / "pictures").iterdir())
    assert {path.name for path in drawn} - IF_IT_GREW == PICTURES[suite]
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert max((pixels == np.array(ours)).all(1).sum() for ours in OURS) > 50, path.name
        assert (pixels == 255).all(1).mean() > 0.3, path.name


def test_a_failed_row_is_not_drawn(files, tmp_path):
    result = json.loads(files["memory"].read_text())
    for row in result["rows"]:
        row["error"] = 1.0
    file = tmp_path / "memory.json"
    file.write_text(json.dumps(result))
    assert command("plot", file).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


def changed(results, tmp_path, change):
    result = json.loads(json.dumps(results["fold"]))
    change(result)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(result))
    return file


def test_compare_shows_what_changed(files, results, tmp_path):
    def change(result):
        result["rows"][0]["median_ms"] *= 2
        result["summary"]["fold.speedup.peft_fuse"] *= 0.25
        del result["rows"][1]

    outcome = command("compare", files["fold"], changed(results, tmp_path, change))
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    (doubled,) = [line for line in lines if "2.000" in line]
    assert "ours" in doubled
    (speedup,) = [line for line in lines if "fold.speedup.peft_fuse" in line]
    assert "0.250" in speedup
    unchanged = len(results["fold"]["rows"]) - 2 + len(results["fold"]["summary"]) - 1
    assert sum("1.000" in line for line in lines) == unchanged
    assert "1 rows are in A only." in lines
    assert "machines differ" not in outcome.stdout


def test_compare_says_that_machines_differ(files, results, tmp_path):
    def change(result):
        result["machine"]["cpu"] = "another"

    outcome = command("compare", files["fold"], changed(results, tmp_path, change))
    assert "The machines differ" in outcome.stdout


def test_compare_names_the_versions_that_differ(files, results, tmp_path):
    def change(result):
        result["versions"] |= {"torch": "1.0", "peft": None}

    versions = results["fold"]["versions"]
    outcome = command("compare", files["fold"], changed(results, tmp_path, change))
    printed = " ".join(outcome.stdout.split())
    assert (
        f"Versions differ: torch {versions['torch']} in A and 1.0 in B, "
        f"peft {versions['peft']} in A and none in B."
    ) in printed
    assert "Versions differ" not in command("compare", files["fold"], files["fold"]).stdout


@pytest.mark.parametrize(
    ("before", "after", "unit", "ratio"),
    [
        ({"device_ms": 2, "busy_ms": 4}, {"device_ms": 3, "busy_ms": 8}, "device ms", "1.500"),
        ({"device_ms": 2, "busy_ms": 4}, {"busy_ms": 8}, "kernels ms", "2.000"),
        ({"device_ms": 2, "median_ms": 5}, {"busy_ms": 8, "median_ms": 10}, "wall ms", "2.000"),
        ({"device_ms": 2, "peak_mib": 1}, {"peak_mib": 4}, "peak MiB", "4.000"),
        ({"device_ms": 2}, {"peak_mib": 4}, "", "-"),
    ],
)
def test_rows_are_compared_by_the_first_quantity_that_both_have(
    results, before, after, unit, ratio
):
    result = results["fold"] | {"summary": {}}
    bare = result["rows"][0] | {"median_ms": None}
    first, second = (result | {"rows": [bare | figures]} for figures in (before, after))
    table = next(part for part in report.comparison(first, second) if not isinstance(part, str))
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[-2:] == [unit, ratio]


def test_table_is_markdown_of_every_case_and_figure(files, results):
    lines = command("table", files["fold"]).stdout.splitlines()
    for row in results["fold"]["rows"]:
        assert any(line.startswith(f"| {row['case']} |") for line in lines)
    for name in results["fold"]["summary"]:
        assert any(line.startswith(f"| `{name}` |") for line in lines)
