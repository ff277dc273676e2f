# SPDX-License-Identifier: Apache-2.0
"""Wrong results are found, and no speed-up is told beside one."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import command
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, measure, record
from benchmarks.cases import DTYPES, LinearCase, as_dtype
from benchmarks.compiled import compiler_missing, forget_compiled
from benchmarks.measure import check, error_limit, interleave, relative_rms
from benchmarks.problem import make_problem
from benchmarks.rivals import RIVALS, Rival, peft_lora
from benchmarks.suites.fold import correctly_rounded
from benchmarks.summary import Table, geometric_mean, speedup

SMALL = LinearCase(64, (32, 48), 10, rank=4)
TINY = LinearCase(64, (32,), 8)
LIMIT = error_limit(torch.float32)
COMPILED = ["eager.compile", "gumbel.compile"]
NOT_QUICK = "speedup.eager_best"  # the faster of two, of which a quick run has one
HERE = [n for n, rival in RIVALS.items() if n not in COMPILED and rival.missing("cpu") is None]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return make_problem(SMALL, "cpu")


def scaled(contestant, factor):
    """The contestant with its first output off by a factor."""

    def run():
        first, *others = contestant.run()
        return [first * factor, *others]

    return replace(contestant, run=run)


@pytest.mark.parametrize("name", HERE)
def test_every_rival_agrees_with_fp64(problem, name):
    errors = check(RIVALS[name].build(problem))
    assert errors["step"] == max(errors["forward"], errors["backward"])
    assert 0 < errors["step"] < LIMIT


@pytest.mark.parametrize("name", [name for name in HERE if name != "ours.triton"])
def test_every_rival_works_in_bfloat16(name):
    torch.manual_seed(0)
    case = as_dtype(SMALL, "bf16")
    contestant = RIVALS[name].build(make_problem(case, "cpu"))
    assert contestant.upstream[0].dtype == torch.bfloat16
    assert 0 < check(contestant)["step"] < error_limit(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(compiler_missing("cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_rivals_agree_with_fp64_on_the_noise_they_drew(problem, name):
    errors = check(RIVALS[name].build(problem))
    forget_compiled()
    assert 0 < errors["step"] < LIMIT


@pytest.mark.parametrize("name", ["ours", "eager", "gumbel"])
def test_other_noise_fails_the_check(problem, name):
    contestant = RIVALS[name].build(problem)

    def restart():
        contestant.restart()
        torch.manual_seed(123)
        problem.step.fill_(8)

    def formula(leaves):
        problem.step.fill_(7)
        return contestant.formula(leaves)

    errors = check(replace(contestant, restart=restart, formula=formula))
    assert errors["forward"] > LIMIT
    assert errors["backward"] > LIMIT


@pytest.mark.parametrize("penalty", ["g_forget", "g_sparse"])
def test_a_forgotten_penalty_fails_the_check(problem, penalty):
    contestant = RIVALS["ours"].build(problem)
    weights = {"g_forget": 1, "g_sparse": 2}
    upstream = list(contestant.upstream)
    upstream[weights[penalty]] = torch.zeros_like(upstream[weights[penalty]])

    class Forgetful(type(contestant)):
        def backward(self, outputs):
            return torch.autograd.grad(outputs, self.leaves, upstream)

    errors = check(Forgetful(**vars(contestant)))
    assert errors["forward"] < LIMIT < errors["backward"]


def test_stacked_lora_trains_the_last_adapter_only(problem):
    contestant = peft_lora(problem, adapters=3)
    assert len(contestant.leaves) == 1 + 2 * len(SMALL.outs)
    assert check(contestant)["step"] < LIMIT


def test_a_result_that_is_not_finite_fails(problem):
    exact = torch.ones(3, dtype=torch.float64)
    assert relative_rms(torch.tensor([1.0, float("nan"), 1.0]), exact) > 1e300
    assert relative_rms(torch.tensor([1.0, float("inf"), 1.0]), exact) > 1e300
    assert relative_rms(torch.tensor([1.0, 1.0, 1.1]), exact) == pytest.approx(0.1 / 3**0.5, 1e-6)


def quick_linear(tmp_path, monkeypatch, name, rival):
    """The linear suite on one small case, with one rival replaced."""
    monkeypatch.setattr(cases, "LINEAR", (TINY,))
    for case in (as_dtype(TINY, dtype) for dtype in DTYPES):
        monkeypatch.setitem(cases.BY_NAME, case.name, case)
    monkeypatch.setitem(RIVALS, name, rival)
    file = tmp_path / "linear.json"
    outcome = command("run", "linear", "--json", file, "--quick")
    return outcome, record.read(file), file


def test_no_speedup_beside_a_failed_check_of_ours(tmp_path, monkeypatch):
    build = RIVALS["ours"].build
    broken = Rival(lambda problem: scaled(build(problem), 1.1))
    outcome, result, file = quick_linear(tmp_path, monkeypatch, "ours", broken)
    assert outcome.exit_code == 1
    case = result["rows"][0]["case"]
    assert f"check failed: linear, {case}, ours, step: error" in outcome.stderr
    for name, value in result["summary"].items():
        refused = name.startswith(("speedup", "floor_ratio", "dtype_ratio"))
        assert (value is None) == refused, name
    printed = command("table", file).stdout
    assert printed.count("refused: check failed") == 3  # ours in three dtypes
    compared = command("compare", file, file).stdout
    assert "refused" in compared


def test_a_failed_check_of_one_rival_refuses_its_speedup_only(tmp_path, monkeypatch):
    build = RIVALS["gumbel"].build
    broken = Rival(lambda problem: scaled(build(problem), float("nan")))
    outcome, result, _ = quick_linear(tmp_path, monkeypatch, "gumbel", broken)
    assert outcome.exit_code == 1
    refused = {name for name, value in result["summary"].items() if value is None}
    assert refused == {"speedup.gumbel", NOT_QUICK}


def test_a_missing_rival_is_named_and_has_no_rows(tmp_path, monkeypatch):
    absent = Rival(RIVALS["loha"].build, lambda device: "the package lycoris is not installed")
    outcome, result, _ = quick_linear(tmp_path, monkeypatch, "loha", absent)
    assert outcome.exit_code == 0
    assert "loha is left out: the package lycoris is not installed" in outcome.stderr
    assert not [row for row in result["rows"] if row["provider"] == "loha"]
    assert result["summary"]["speedup.loha"] is None
    assert result["summary"]["speedup.gumbel"] is not None


def test_rivals_that_a_quick_run_leaves_out_are_named_and_no_mean_rests_on_their_peers(
    tmp_path, monkeypatch
):
    outcome, result, file = quick_linear(tmp_path, monkeypatch, "eager", RIVALS["eager"])
    for name in COMPILED:
        why = compiler_missing("cpu") or "--quick"
        assert result["skipped"][name] == why
        assert f"{name} is left out: {why}" in outcome.stderr
        assert f"- {name}: {why}" in command("table", file).stdout
    refused = {name for name, value in result["summary"].items() if value is None}
    assert refused == {NOT_QUICK}


def test_rounds_are_interleaved_and_the_first_is_left_out():
    calls = []

    def sample(name):
        def run():
            calls.append(name)
            return {"step": float(len(calls))}

        return run

    keys = [("case", name) for name in "abc"]
    timings = interleave({key: sample(key) for key in keys}, rounds=4)
    rounds = [calls[k : k + 3] for k in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(one) == keys for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert sorted(t for key in keys for t in timings[key]["step"]) == list(range(4, 16))


def test_a_slow_entry_rests_after_a_few_rounds(monkeypatch):
    monkeypatch.setattr(measure, "ENOUGH_SECONDS", 0.01)

    def slow():
        time.sleep(0.005)
        return {"step": 1.0}

    samples = {("case", "slow"): slow, ("case", "fast"): lambda: {"step": 1.0}}
    timings = interleave(samples, rounds=20)
    assert len(timings["case", "slow"]["step"]) == measure.FEWEST_ROUNDS
    assert len(timings["case", "fast"]["step"]) == 20


def test_correctly_rounded_counts_the_nearest():
    exact = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 2**-8 + 2**-20], dtype=torch.float64)
    nearest = torch.tensor([1.0, 1.0, 1.0 + 2**-7], dtype=torch.bfloat16)
    assert correctly_rounded(nearest, exact) == 3
    # one that fp32 on the way would round to a tie, and the tie to even
    between = torch.tensor([1.0 + 2**-8 + 2**-30], dtype=torch.float64)
    assert correctly_rounded(torch.tensor([1.0], dtype=torch.bfloat16), between) == 0
    assert correctly_rounded(torch.tensor([1.0078125], dtype=torch.bfloat16), between) == 1


def test_counted_arithmetic_is_that_of_the_dense_formula(problem):
    contestant = RIVALS["eager"].build(problem)
    with FlopCounterMode(display=False) as counter:
        contestant.backward(contestant.run())
    assert counter.get_total_flops() == SMALL.step_flops()


def test_the_faster_of_two_is_told_only_of_cases_that_both_ran():
    times = {
        "a": {"ours": 1.0, "eager": 4.0, "eager.compile": 3.0},
        "b": {"ours": 1.0, "eager": 8.0},
    }
    rows = [
        {"case": case, "provider": name, "pass": "step", "median_ms": time, "error": None,
         "error_limit": None}
        for case, found in times.items()
        for name, time in found.items()
    ]  # fmt: skip
    table, rivals = Table(rows), ("eager", "eager.compile")
    assert speedup(table, ["a"], rivals) == pytest.approx(3.0)
    assert speedup(table, ["a", "b"], rivals) == pytest.approx(3.0)
    assert speedup(table, ["b"], rivals) is None
    assert speedup(table, ["b"], ("eager",)) == pytest.approx(8.0)


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([]) is None
