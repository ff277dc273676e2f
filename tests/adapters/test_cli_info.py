# SPDX-License-Identifier: Apache-2.0
"""`stamina info`: what this installation can do, and how a GPU would compute a projection."""

import json

from cli_kit import run


def test_info_tells_versions_and_backends():
    shown = run("info")
    assert shown.exit_code == 0
    assert "reference" in shown.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["backends"]["reference"] == {"available": True, "reason": None}
    assert {"torch", "diffusers", "safetensors"} <= found["versions"].keys()
    assert "embedded_model" in found


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
