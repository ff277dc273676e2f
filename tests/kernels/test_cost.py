# SPDX-License-Identifier: Apache-2.0
"""The cost model: a roofline by hand, what it prefers where, overrides, and unknown GPUs."""

import logging

import pytest

from stamina_kernels import cost

H100 = "NVIDIA H100 80GB HBM3"


def problem(tokens, rows=1280, columns=768, rank=16, **more):
    return cost.Problem(rows, columns, tokens, rank, 16, **more)


def test_the_vendor_gemm_is_the_roofline_by_hand():
    device = cost.find_device(H100)
    gemm = cost.estimate(device, problem(4096, 4096, 4096, has_initial=False))["compose"][1]
    # bf16, W_eff of 32 MiB does not stay in half of 50 MB
    assert gemm.bytes == 3 * 4096**2 * 2
    assert gemm.flops == 2 * 4096**3
    assert gemm.matrix_s == pytest.approx(2 * 4096**3 / 989e12)
    assert gemm.memory_s == pytest.approx(3 * 4096**2 * 2 / 3.35e12)
    assert gemm.bound == "matrix"
    assert gemm.seconds == pytest.approx(gemm.matrix_s + device.launch_s)


def test_small_weights_stay_in_the_cache():
    launches = cost.estimate(cost.find_device(H100), problem(154, has_initial=False))["compose"]
    weights = 1280 * 768
    assert launches[0].bytes == weights * 2 + weights / 8
    assert launches[1].bytes == 154 * (1280 + 768) * 2


LARGE = {"rows": 1 << 16, "columns": 2048, "has_initial": False, "sampled": False}


@pytest.mark.parametrize("name", cost.devices())
def test_known_gpus_compose(name):
    """As measured on an H200: 0.40 ms for 4096^3, where generating took 1.41."""
    for tokens in (77, 154, 4096):
        assert cost.choose(name, problem(tokens, **LARGE)).strategy == "compose"


def test_where_memory_is_slow_few_tokens_are_generated(monkeypatch):
    slow = cost.find_device(H100)._replace(bandwidth=3e11)
    monkeypatch.setattr(cost, "devices", lambda: {"Slow": slow})
    assert cost.choose("Slow", problem(77, **LARGE)).strategy == "generate"
    assert cost.choose("Slow", problem(4096, **LARGE)).strategy == "compose"
    assert cost.choose("Slow", problem(77, rank=64, **LARGE)).strategy == "compose"


def test_more_work_never_takes_less_time():
    for name in cost.devices():
        device = cost.find_device(name)
        for strategy in cost.STRATEGIES:
            times = [
                cost.total_seconds(cost.estimate(device, problem(tokens))[strategy])
                for tokens in (1, 77, 128, 129, 1024, 8192)
            ]
            assert times == sorted(times)


def test_fp32_runs_on_the_ordinary_units():
    wide = problem(154, weight_bytes=4, x_bytes=4)
    gemm = cost.estimate(cost.find_device(H100), wide)["compose"][1]
    assert gemm.flops == 0
    assert gemm.instructions == 154 * 1280 * 768


def test_the_generating_gemm_of_fp32_has_tiles_of_its_own():
    """Every 32 tokens compose W_eff anew, by one product of fp32 factors."""
    wide = problem(128, weight_bytes=4, x_bytes=4)
    gemm = cost.estimate(cost.find_device(H100), wide)["generate"][1]
    assert gemm.instructions == 4 * 1280 * 768 * (cost._GENERATE + 32 + 16)


@pytest.mark.parametrize("name", ["AMD Instinct MI300X", "cpu", ""])
def test_an_unknown_gpu_gets_an_answer(name):
    choice = cost.choose(name, problem(154))
    assert choice.strategy in cost.STRATEGIES
    assert "us against" in choice.reason
    assert cost.find_device(name).name == "A100"


def test_an_empty_batch_gets_an_answer():
    assert cost.choose(H100, problem(0)).strategy in cost.STRATEGIES


def test_the_environment_overrides_and_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setenv("STAMINA_STRATEGY", "generate")
    with caplog.at_level(logging.INFO, "stamina_kernels.cost"):
        assert cost.choose(H100, problem(4099)).strategy == "generate"
        assert cost.choose(H100, problem(4099)).strategy == "generate"
    assert caplog.text.count("'generate'") == 1
    assert "STAMINA_STRATEGY says so" in caplog.text
    with cost.forced("compose"):
        assert cost.choose(H100, problem(4099)).strategy == "compose"
    monkeypatch.setenv("STAMINA_STRATEGY", "guess")
    with pytest.raises(ValueError, match="must be compose or generate, got 'guess'"):
        cost.choose(H100, problem(4099))
