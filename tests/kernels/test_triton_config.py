# SPDX-License-Identifier: Apache-2.0
"""Launch options: the default table, a device's own file, and measuring one."""

import json

import pytest
import torch

pytest.importorskip("triton")

from stamina_kernels.checks import MAX_HIDDEN  # noqa: E402
from stamina_kernels.triton import config, tune  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {"rows": 20, "columns": 40, "tokens": 3, "rank": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of tuned options, and no table remembered from or for another test."""
    monkeypatch.setenv("STAMINA_TRITON_CONFIGS", str(tmp_path))
    config.table.cache_clear()
    yield tmp_path
    config.table.cache_clear()


def test_names_of_files_are_plain():
    assert config.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert config.file_name("Intel(R) Data Center GPU Max 1550") == (
        "intel-r-data-center-gpu-max-1550.json"
    )


def test_an_unknown_device_gets_the_default(folder):
    assert config.table("A GPU of next year") == config.default_table()


def test_a_file_of_the_device_is_laid_over_the_default(folder):
    (folder / "some-gpu.json").write_text(json.dumps({"fold": {"num_warps": 8}}))
    expected = config.default_table()
    expected["fold"]["num_warps"] = 8
    assert config.table("Some GPU") == expected
    assert config.table("Other GPU") == config.default_table()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"fould": {}}', "unknown kernel 'fould', known are .*fold"),
        ('{"fold": {"BX": 1}}', "'fold' has no option 'BX', only BO, BI"),
        ('{"fold": {"BO": "64"}}', "'BO' of 'fold' must be a positive integer, got '64'"),
        ('{"fold": {"BO": true}}', "must be a positive integer, got True"),
        ('{"fold": {"BO": 0}}', "must be a positive integer, got 0"),
        ('{"fold": 64}', "must hold an object of objects"),
        ("[]", "must hold an object of objects"),
        ('{"fold": {"BO": ', "is not JSON: "),
    ],
)
def test_a_wrong_file_is_refused_by_name(folder, content, message):
    (folder / "some-gpu.json").write_text(content)
    with pytest.raises(ValueError, match=f"some-gpu.json.*{message}"):
        config.table("Some GPU")
    assert config.table("Other GPU") == config.default_table()


def test_a_folder_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setenv("STAMINA_TRITON_CONFIGS", str(folder / "none"))
    with pytest.raises(NotADirectoryError, match="STAMINA_TRITON_CONFIGS must be a folder, got "):
        config.table("Some GPU")


def test_tables_hold_what_kernels_can_take():
    for kernel, options in config.default_table().items():
        for candidate in [options, *tune.CANDIDATES[kernel]]:
            assert candidate.keys() <= options.keys(), kernel
            assert candidate.get("BI", 32) % 32 == 0, kernel
            assert all(candidate.get(side, 16) >= 16 for side in ("BO", "BN")), kernel


def test_a_hidden_layer_is_one_tile():
    assert MAX_HIDDEN <= config.MAX_RANK_STEP


@pytest.mark.parametrize("kernel", config.default_table())
def test_the_fastest_candidate_is_kept(folder, kernel):
    slow, fast = {"num_warps": 2}, {"num_warps": 1}
    name = config.device_name(DEVICE)
    before = dict(config.table(name)[kernel])

    def seconds(run):
        run()
        return config.table(name)[kernel]["num_warps"]

    found = tune.fastest(kernel, DEVICE, [slow, fast, slow], seconds, SMALL)
    assert found == before | fast
    assert config.table(name)[kernel] == before, "trials must leave no trace"


def test_a_candidate_with_other_results_is_left_out(folder, monkeypatch):
    monkeypatch.setattr(tune, "_same", lambda results, expected: False)
    found = tune.fastest("sample", DEVICE, [{"num_warps": 1}], lambda run: 0.0, SMALL)
    assert found == config.default_table()["sample"]


def test_what_is_written_is_what_launches_use(folder):
    path = tune.write(folder, DEVICE, {"sample": {"num_warps": 2}})
    assert path.name == config.file_name(config.device_name(DEVICE))
    config.table.cache_clear()
    assert config.table(config.device_name(DEVICE))["sample"]["num_warps"] == 2
