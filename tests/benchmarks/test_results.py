# SPDX-License-Identifier: Apache-2.0
"""What a result file holds, for every suite."""

import math
import re

import pytest
import torch
from stamina_adapters.continual import memory

from benchmarks import machine
from benchmarks.canvas import machine_note
from benchmarks.cases import BY_NAME, SDXL, SDXL_TENTH, LinearCase, MemoryCase
from benchmarks.peak import growth, measure
from benchmarks.rivals import RIVALS
from benchmarks.suites import SUITES

FIELDS = {
    "suite", "case", "provider", "pass", "median_ms", "p20_ms", "p80_ms", "device_ms",
    "device_p20_ms", "device_p80_ms", "busy_ms", "launches", "gb_s", "tflop_s", "saved_mib",
    "peak_mib", "error", "error_limit", "machine", "versions",
}  # fmt: skip
OURS_HERE = ("ours.reference", "ours.cpu")
CLOCKS = ("device", "wall")


def by_backend(name, *peers, backends=OURS_HERE):
    return {
        f"{name}.{ours}.over.{peer}.{clock}"
        for ours in backends
        for peer in peers
        for clock in CLOCKS
    }


def of_lora(name, *figures):
    return {f"{name}.ours.cpu.of_lora.{figure}" for figure in figures}


def over_copy(*names):
    return {f"{name}.{ours}.over.copy" for ours in OURS_HERE for name in names}


SUMMARY = {
    "linear": {
        "speedup.gumbel", "speedup.eager_best", "speedup.loha", "floor_ratio",
        "saved_bits_per_weight", "dtype_ratio.bf16", "dtype_ratio.fp16", "gemm_ratio.bf16",
        "gemm_ratio.fp16",
    },
    "group": {
        "group.speedup.gumbel", "group.speedup.eager_best", "group.speedup.loha",
        "group.floor_ratio", "group.saved_bits_per_weight", "group.speedup.separate",
    },
    "fold": {
        "fold.speedup.eager_masks", "fold.speedup.peft_fuse", "fold.speedup.loha_merge",
        "fold.correctly_rounded",
    },
    "memory": {"memory.sdxl_ours_over_eager"},
    "scale": {"scale.step_1000_over_1", "scale.peft_50_over_1"},
    "gpu-ops": over_copy("compose", "sample_compose")
    | {"fold_3.ours.cpu.over.copy"}
    | by_backend("compose", "eager")
    | by_backend("linear_bits", "frozen")
    | by_backend("linear_sampled", "frozen")
    | by_backend("fold_3", "eager_masks", "peft_fuse", "loha_merge", backends=["ours.cpu"]),
    "gpu-kv": by_backend("kv", "gumbel", "eager", "peft", "loha", "dense", "frozen"),
    "gpu-step": by_backend("step", "gumbel", "eager", "peft", "loha", "dense",
                           backends=["ours.cpu"])
    | of_lora("step", *CLOCKS, "peak"),
    "gpu-unet": of_lora("unet", *CLOCKS, "peak"),
}  # fmt: skip
NOT_RUN_QUICKLY = {
    "memory.sdxl_ours_over_eager", "scale.peft_50_over_1", "speedup.eager_best",
    "group.speedup.eager_best",
}  # fmt: skip
# the memory of so small a step may be found among what the process has
MAYBE_NOTHING = of_lora("step", "peak") | of_lora("unet", "peak")
ON_DEVICES = [suite for suite in SUITES if suite.startswith("gpu-")]

RUN_IN_FULL = re.compile("fold_1|compile|at_once")

every_suite = pytest.mark.parametrize("suite", SUITES)


def median(result, case, provider, pass_="step"):
    (row,) = [
        row
        for row in result["rows"]
        if (row["case"], row["provider"], row["pass"]) == (case, provider, pass_)
    ]
    return row["median_ms"]


@every_suite
def test_a_file_has_rows_of_one_schema(results, suite):
    result = results[suite]
    assert set(result) == {"machine", "versions", "rows", "summary", "skipped", "errors"}
    assert result["errors"] == {}
    assert result["rows"]
    for row in result["rows"]:
        assert set(row) == FIELDS
        assert row["suite"] == suite
        assert row["provider"] in SUITES[suite].rivals
        assert row["versions"] == result["versions"]
        assert result["machine"]["cpu"] in row["machine"]


@every_suite
def test_every_row_is_checked_against_fp64(results, suite):
    for row in results[suite]["rows"]:
        assert 0 <= row["error"] <= row["error_limit"] < 0.05


@every_suite
def test_a_row_measures_time_or_memory(results, suite):
    for row in results[suite]["rows"]:
        if suite == "memory":
            assert row["median_ms"] is row["p20_ms"] is row["p80_ms"] is None
            assert row["peak_mib"] > row["saved_mib"] > 0
        else:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            has_peak = suite in ("gpu-step", "gpu-unet") and row["pass"] == "step"
            assert (row["peak_mib"] is not None) == has_peak


@every_suite
def test_a_device_is_timed_by_its_own_clock_too(results, suite):
    for row in results[suite]["rows"]:
        times = [row[f"device_{name}ms"] for name in ("p20_", "", "p80_")]
        assert times == sorted(times) and times[0] > 0 if suite in ON_DEVICES else not any(times)
        assert row["launches"] is row["busy_ms"] is None  # the profiler sees no device here
        rated = suite in ON_DEVICES and (row["gb_s"] or 0) > 0
        assert rated == (suite == "gpu-ops" or suite == "gpu-kv" and masked(row))


def masked(row):
    return RIVALS[row["provider"]].masked


@every_suite
def test_a_rival_without_rows_is_named_with_the_reason(results, suite):
    """Those that a quick run has no time for among them."""
    result = results[suite]
    ran = {row["provider"] for row in result["rows"]}
    for name in SUITES[suite].rivals:
        assert (name in ran) != (name in result["skipped"]), name


@pytest.mark.parametrize("suite", ON_DEVICES)
def test_backends_that_cannot_run_are_named_with_the_reason(results, suite):
    result = results[suite]
    ran = {row["provider"] for row in result["rows"]}
    assert "ours.cpu" in ran
    for name in SUITES[suite].rivals:
        if name.startswith("ours."):
            assert (name in ran) != (name in result["skipped"])
    assert "'cpu'" in result["skipped"]["ours.triton"]


@every_suite
def test_the_summary_is_flat_and_complete(results, suite):
    summary = results[suite]["summary"]
    assert set(summary) == SUMMARY[suite]
    for name, value in summary.items():
        if name in NOT_RUN_QUICKLY:
            assert value is None, name
        elif not (value is None and name in MAYBE_NOTHING):
            assert 0 < value < math.inf, name


@pytest.mark.parametrize("suite", ON_DEVICES)
def test_goals_are_of_figures_that_the_suite_tells(results, suite):
    goals = SUITES[suite].goals
    assert goals
    for name, goal in goals.items():
        relation, bound = goal.split()
        assert relation in (">=", "<=", ">") and float(bound) > 0
        if "ours.cpu" in name and not RUN_IN_FULL.search(name):
            assert name in results[suite]["summary"], name


def test_one_thread_is_one():
    found = {"cpu": "c", "device": "cpu", "simd_kernels": "avx2"}
    versions = {"torch": "2"}
    for count, words in ((1, "c, 1 thread"), (8, "c, 8 threads")):
        here = found | {"threads": count}
        assert machine.label(here) == f"{words}, avx2"
        assert machine_note({"machine": here, "versions": versions}) == f"{words}; torch 2"


def test_a_peak_that_the_system_does_not_tell_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_REFERENCES", tmp_path / "absent" / "clear_refs")
    row = measure(MemoryCase("small", (LinearCase(64, (32,), 8),)), "ours", "cpu")
    assert row["peak_mib"] is None and row["saved_mib"] > 0
    rows = [
        {"case": case.name, "provider": name, "pass": "step", "error_limit": 1.0} | row
        for case, name in ((SDXL, "ours"), (SDXL_TENTH, "eager"))
    ]
    assert SUITES["memory"].summary(rows) == {"memory.sdxl_ours_over_eager": None}
    rows = [r | {"peak_mib": peak} for r, peak in zip(rows, (6.0, 8.0), strict=True)]
    assert SUITES["memory"].summary(rows) == {"memory.sdxl_ours_over_eager": pytest.approx(0.75)}


def test_on_the_cpu_the_process_is_measured_where_there_is_a_gpu_too(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    grown = growth(lambda: torch.ones(1 << 24), "cpu")
    assert grown is None or 50 < grown < 100  # it is 64 MiB; pages of other things come and go


def test_machine_and_versions_say_what_ran(results):
    found, versions = results["linear"]["machine"], results["linear"]["versions"]
    assert found["threads"] > 0
    assert found["gemm_gflops"] > 0
    assert found["copy_gb_s"] > 0
    assert found["simd_torch"] and found["cpu"]
    needed = {"python", "torch", "triton", "stamina-kernels", "peft", "lycoris-lora", "diffusers",
              "numpy"}  # fmt: skip
    assert set(versions) == needed


def test_linear_runs_three_passes_and_16_bits_beside_the_rivals(results):
    rows = results["linear"]["rows"]
    providers = {row["provider"] for row in rows if BY_NAME[row["case"]].dtype == "fp32"}
    assert providers == {"ours", "gumbel", "eager", "peft", "loha", "dense", "frozen"}
    assert {row["pass"] for row in rows} == {"forward", "backward", "step"}
    for dtype in ("bf16", "fp16"):
        of_dtype = {row["provider"] for row in rows if BY_NAME[row["case"]].dtype == dtype}
        assert of_dtype == {"ours", "dense", "frozen"}


def test_ratios_are_of_fp32_medians_of_the_step(results):
    result = results["linear"]
    case = next(iter(name for name in BY_NAME if name == result["rows"][0]["case"]))
    ours = median(result, case, "ours")
    summary = result["summary"]
    assert summary["speedup.gumbel"] == pytest.approx(median(result, case, "gumbel") / ours)
    assert summary["floor_ratio"] == pytest.approx(ours / median(result, case, "dense"))
    ours16 = median(result, f"{case} bf16", "ours")
    assert summary["dtype_ratio.bf16"] == pytest.approx(ours16 / ours)


def test_ours_saves_one_bit_for_each_weight(results):
    assert results["linear"]["summary"]["saved_bits_per_weight"] == pytest.approx(1.0, abs=0.01)
    assert results["group"]["summary"]["group.saved_bits_per_weight"] <= 1.01


def test_group_compares_one_call_with_two(results):
    result = results["group"]
    case = result["rows"][0]["case"]
    expected = median(result, case, "ours.separate") / median(result, case, "ours")
    assert result["summary"]["group.speedup.separate"] == pytest.approx(expected)


def test_folds_are_in_three_dtypes_and_bf16_is_rounded_once(results):
    result = results["fold"]
    ours = [row["case"] for row in result["rows"] if row["provider"] == "ours"]
    assert [case.split()[-1] in ("bf16", "fp16") for case in ours] == [False, True, True]
    assert 0.9999 <= result["summary"]["fold.correctly_rounded"] <= 1


def test_scale_times_a_step_after_a_thousand_concepts(results):
    result = results["scale"]
    ratio = median(result, "1000 concepts", "ours") / median(result, "1 concepts", "ours")
    assert result["summary"]["scale.step_1000_over_1"] == pytest.approx(ratio)


def test_eager_code_grows_by_more_than_ours(results):
    peaks = {row["provider"]: row["peak_mib"] for row in results["memory"]["rows"]}
    assert peaks["eager"] > 2 * peaks["ours"]
