# SPDX-License-Identifier: Apache-2.0
"""`stamina info`: what this installation can do, and how a GPU would compute a projection."""

import json

import pytest
from cli_kit import run

from stamina_kernels import cpu


def test_info_tells_versions_and_backends():
    shown = run("info")
    assert shown.exit_code == 0
    assert "reference" in shown.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["backends"]["reference"] == {"available": True, "reason": None}
    assert {"torch", "diffusers", "safetensors"} <= found["versions"].keys()
    assert "embedded_model" in found


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the C++ backend is not built")
def test_info_names_the_instruction_set_of_the_cpu_backend():
    assert f"instructions    {cpu.instruction_set()}\n" in run("info").stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["cpu_instruction_set"] == cpu.instruction_set()


def test_info_says_why_there_is_no_instruction_set(monkeypatch):
    def refused():
        raise RuntimeError("STAMINA_CPU_ISA must be one of [...]\nin C++")

    monkeypatch.setattr("stamina_kernels.cpu.unavailable_reason", lambda: None)
    monkeypatch.setattr("stamina_kernels.cpu.instruction_set", refused)
    assert "instructions    none: STAMINA_CPU_ISA must be one of [...]\n" in run("info").stdout
    monkeypatch.setattr("stamina_kernels.cpu.unavailable_reason", lambda: "not built")
    found = json.loads(run("info", "--json").stdout)
    assert found["cpu_instruction_set"] is None
    assert found["cpu_instruction_set_error"] == "not built"


def test_info_explains_the_strategy_of_a_gpu():
    shown = run("info", "--explain", 1280, 768, 154, 16)
    assert shown.exit_code == 0, shown.output
    for word in ("compose", "generate", "sampled", "hard", "vendor GEMM", "STAMINA_STRATEGY"):
        assert word in shown.stdout
    rows = json.loads(run("info", "--explain", 1280, 768, 154, 16, "--json").stdout)
    assert {row["mask"] for row in rows} == {"sampled", "hard"}
    assert all(row["reason"] and row["seconds"] > 0 for row in rows)
    refusal = run("info", "--explain", 1280, 0, 154, 16)
    assert refusal.exit_code == 2
    assert "--explain takes positive numbers, got 1280 0 154 16" in refusal.output
    refusal = run("info", "--explain", 1280, 768, 154, 257)
    assert refusal.exit_code == 2
    assert "--explain takes ranks of at most 256, got 257" in refusal.output


def test_the_explanation_follows_the_environment(monkeypatch):
    monkeypatch.setenv("STAMINA_STRATEGY", "generate")
    rows = json.loads(run("info", "--explain", 1280, 768, 154, 16, "--json").stdout)
    assert {row["strategy"] for row in rows if row["chosen"]} == {"generate"}
    assert {row["backend"] for row in rows} == {"triton"}
    monkeypatch.setenv("STAMINA_STRATEGY", "guess")
    refusal = run("info", "--explain", 1280, 768, 154, 16)
    assert refusal.exit_code == 2
    assert "STAMINA_STRATEGY must be compose or generate, got 'guess'" in refusal.output


def test_the_explanation_says_whose_figures_it_takes(monkeypatch):
    monkeypatch.setattr(
        "stamina_adapters.cli.info.info", lambda: {"devices": ["cpu", "Some GPU", "NVIDIA H200"]}
    )
    shown = run("info", "--explain", 1280, 768, 154, 16).stdout
    assert "no figures of Some GPU: those of A100 stand in for them" in shown
    assert "no figures of NVIDIA H200" not in shown


def test_info_answers_where_the_environment_asks_for_what_is_not_there(monkeypatch):
    monkeypatch.setenv("STAMINA_BACKEND", "nonsense")
    shown = run("info")
    assert shown.exit_code == 0, shown.output
    assert "got 'nonsense' (from the environment variable STAMINA_BACKEND)" in shown.stdout
