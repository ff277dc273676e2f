# SPDX-License-Identifier: Apache-2.0
"""How calls are timed on a device, the single operations, and runs that go wrong in part."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import command
from torch.autograd import DeviceType

from benchmarks import clock, record, report
from benchmarks.cases import LinearCase, Work
from benchmarks.clock import Call, DeviceClock, profiled, wall, wall_and_device
from benchmarks.measure import Measurement, error_limit, timed
from benchmarks.operations import OPERATIONS
from benchmarks.problem import make_problem
from benchmarks.rivals import RIVALS
from benchmarks.suites import SUITES, gpu
from benchmarks.suites.suite import Outcome, Suite, Task, attempt
from benchmarks.summary import Table

SMALL = LinearCase(64, (32, 48), 10, rank=4)
LIMIT = error_limit(torch.float32)
HERE = [
    (pass_, name)
    for pass_, entries in OPERATIONS.items()
    for name, entry in entries.items()
    if entry.missing("cpu") is None
]


def sleeping(seconds, *, prepare=lambda: None):
    def part(value):
        time.sleep(seconds)
        return [*(value or []), seconds]

    return Call({"forward": part, "backward": part}, prepare)


@pytest.mark.parametrize("clocked", ["wall", "device"])
def test_parts_are_timed_and_preparing_is_not(clocked):
    def prepare():
        time.sleep(0.05)

    call = sleeping(0.002, prepare=prepare)
    device_clock = DeviceClock("cpu")
    times = wall(call, "cpu") if clocked == "wall" else device_clock(call, lead_ms=0.0)
    assert list(times) == ["forward", "backward", "step"]
    assert min(times["forward"], times["backward"]) >= 2
    assert times["step"] >= times["forward"] + times["backward"] - 1e-6


def test_a_call_of_one_part_has_no_step():
    assert list(wall(Call({"fold": lambda _: None}), "cpu")) == ["fold"]
    both = wall_and_device(Call({"fold": lambda _: None}), DeviceClock("cpu"), "cpu")
    assert list(both) == ["fold", "device.fold"]


def test_parts_are_given_what_the_one_before_returned():
    seen = []
    call = Call({"a": lambda value: seen.append(value) or 1, "b": seen.append})
    for measured in (lambda: wall(call, "cpu"), lambda: profiled(call, DeviceClock("cpu"), "cpu")):
        seen.clear()
        measured()
        assert seen == [None, 1]


@pytest.mark.parametrize(("lead_ms", "writes"), [(0.0, 1), (0.9, 4), (3.0, 11)])
def test_the_cache_is_overwritten_for_longer_than_the_host_may_take(lead_ms, writes):
    device_clock = DeviceClock("cpu")
    calls = []
    device_clock._device, device_clock._flush_ms = "another", 0.3
    device_clock._cover = SimpleNamespace(zero_=lambda: calls.append(1))
    device_clock.flush(lead_ms)
    assert len(calls) == writes


class FakeEvent:
    """Of a device that has begun, or not, when the host has enqueued all."""

    begun = False

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return self.begun

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_no_time_of_the_device_where_it_began_before_all_was_enqueued(monkeypatch):
    """Events would have timed the host, or how long the call waited for the device itself."""
    monkeypatch.setattr(clock, "_event", lambda device: FakeEvent())
    call = sleeping(0.001)
    assert DeviceClock("cpu")(call, lead_ms=100.0)["step"] >= 2
    monkeypatch.setattr(FakeEvent, "begun", True)
    assert DeviceClock("cpu")(call, lead_ms=100.0) == {}
    assert list(wall_and_device(call, DeviceClock("cpu"), "cpu")) == ["forward", "backward", "step"]


def test_a_few_samples_between_events_are_no_median():
    times = {"step": [2.0, 4.0, 3.0, 3.0], "device.step": [1.0], "busy.step": [0.5]}
    row = timed("case", "ours", "step", times | {"launches.step": [7.0]})
    assert (row.median_ms, row.device_ms, row.device_p20_ms, row.busy_ms) == (3.0, None, None, 0.5)
    row = timed("case", "ours", "step", {**times, "device.step": [1.0, 2.0]} | {"busy.step": []})
    assert (row.device_ms, row.busy_ms) == (1.5, None)


def test_times_of_a_device_are_compared_like_with_like():
    """Between events where both rows have that, else by the kernels of both."""

    def of(case, provider, wall, device, busy):
        what = {
            "case": case,
            "provider": provider,
            "pass": "step",
            "error": 0.0,
            "error_limit": 1.0,
        }
        return what | {"median_ms": wall, "device_ms": device, "busy_ms": busy}

    rows = [
        of("a", "eager", 60.0, None, 12.0), of("a", "ours", 20.0, 6.0, 4.0),
        of("b", "eager", 60.0, 12.0, 11.0), of("b", "ours", 20.0, 6.0, 4.0),
        of("c", "eager", 60.0, None, None), of("c", "ours", 20.0, 6.0, 4.0),
    ]  # fmt: skip
    for cases, device in ((["a"], 3.0), (["b"], 2.0), (["a", "b"], 6**0.5), (["c"], None)):
        found = gpu.ratios(Table(rows), cases, "eager", "ours", "x")
        assert found == {"x.device": pytest.approx(device), "x.wall": pytest.approx(3.0)}


def test_a_time_of_kernels_is_marked_and_a_failed_row_shows_no_figure(results):
    result = dict(results["gpu-kv"])
    shown, wrong, *_ = (dict(r) for r in result["rows"] if r["pass"] == "step")
    shown |= {"device_ms": None, "busy_ms": 12.5}
    wrong |= {"median_ms": 77.7, "error": 1.0}
    text = report.markdown(result | {"rows": [shown, wrong]}, {})
    assert "12.5 (kernels)" in text and "would have timed the host" in text
    assert "77.7" not in text
    assert text.count("refused: check failed") == 2


class FakeProfiler:
    """Reports the given durations, in microseconds, as kernels of consecutive profiled parts."""

    def __init__(self, *parts):
        self._parts = iter(parts)

    def __call__(self, activities):
        assert activities
        return self

    def __enter__(self):
        self._durations = next(self._parts)
        return self

    def __exit__(self, *_):
        return None

    def events(self):
        def event(kind, duration, **more):
            span = SimpleNamespace(elapsed_us=lambda: duration)
            return SimpleNamespace(device_type=kind, time_range=span, **more)

        return [
            event(DeviceType.CPU, 1000.0),
            event(DeviceType.CUDA, 1000.0, is_user_annotation=True),
            *(event(DeviceType.CUDA, duration) for duration in self._durations),
        ]


def test_kernels_are_counted_and_added_up_per_part(monkeypatch):
    monkeypatch.setattr(clock, "profile", FakeProfiler([30.0, 20.0], [100.0]))
    assert profiled(sleeping(0.0), DeviceClock("cpu"), "cpu") == pytest.approx(
        {
            "launches.forward": 2, "launches.backward": 1, "launches.step": 3,
            "busy.forward": 0.05, "busy.backward": 0.1, "busy.step": 0.15,
        }
    )  # fmt: skip


def test_nothing_is_said_of_kernels_where_none_were_seen():
    assert profiled(sleeping(0.0), DeviceClock("cpu"), "cpu") == {}


def test_rates_are_of_the_time_that_kernels_ran():
    times = {"step": [2.0, 4.0, 3.0], "device.step": [1.0, 1.0, 1.0]}
    work = Work(flops=2e9, bytes=1e6)
    row = timed("case", "ours", "step", times, work)
    assert (row.median_ms, row.device_ms, row.busy_ms) == (3.0, 1.0, None)
    assert (row.gb_s, row.tflop_s) == pytest.approx((1.0, 2.0))
    times |= {"busy.step": [0.5], "launches.step": [7.0]}
    row = timed("case", "ours", "step", times, work)
    assert (row.busy_ms, row.launches) == (0.5, 7.0)
    assert (row.gb_s, row.tflop_s) == pytest.approx((2.0, 4.0))
    assert timed("case", "ours", "step", times).gb_s is None


@pytest.mark.parametrize(("pass_", "name"), HERE)
def test_every_operation_agrees_with_fp64(pass_, name):
    torch.manual_seed(0)
    operation = OPERATIONS[pass_][name].build(SMALL, make_problem(SMALL, "cpu"))
    assert operation.error() < LIMIT
    assert operation.work.bytes > 0

    def wrong():
        outputs = operation.run()
        changed = [o ^ 1 if o.dtype == torch.int32 else o * 1.1 for o in outputs]
        # a fold's or a copy's outputs are its own tensors
        return [a.clone() for a in changed]

    assert replace(operation, run=wrong).error() > 100 * LIMIT


def row(case, provider, error=0.0):
    return Measurement(case, provider, "step", 2.0, 1.0, 3.0, error=error, error_limit=LIMIT)


def run_tasks(monkeypatch, tmp_path, tasks, *options, goals=None):
    """A suite of these tasks, run from the command line; the outcome and what was written."""

    def summary(rows):
        return {"rows": float(len(rows))}

    suite = Suite("made", "for a test", {}, lambda settings: tasks, summary, goals or {})
    monkeypatch.setitem(SUITES, "made", suite)
    file = tmp_path / "made.json"
    outcome = command("run", "made", "--json", file, *options)
    return outcome, record.read(file)


def test_a_task_that_raises_costs_the_others_nothing(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no kernel image\nand more")

    tasks = [
        Task("first", lambda: Outcome([row("a", "ours")])),
        Task("second", broken),
        Task("third", lambda: Outcome([row("b", "ours")], errors={"b, loha": "ValueError: no"})),
    ]
    outcome, result = run_tasks(monkeypatch, tmp_path, tasks)
    assert outcome.exit_code == 1
    assert [r["case"] for r in result["rows"]] == ["a", "b"]
    assert result["summary"] == {"rows": 2.0}
    assert result["errors"] == {
        "second": "RuntimeError: no kernel image",
        "b, loha": "ValueError: no",
    }
    assert "error in second: RuntimeError: no kernel image" in outcome.stderr
    table = command("table", tmp_path / "made.json").stdout
    assert "- second: RuntimeError: no kernel image" in table


def test_what_is_there_is_written_after_every_task(monkeypatch, tmp_path):
    def look():
        assert [r["case"] for r in record.read(tmp_path / "made.json")["rows"]] == ["a"]
        return Outcome([row("b", "ours")])

    tasks = [Task("first", lambda: Outcome([row("a", "ours")])), Task("second", look)]
    outcome, _ = run_tasks(monkeypatch, tmp_path, tasks)
    assert outcome.exit_code == 0, outcome.output


def test_no_task_begins_after_the_time_is_up(monkeypatch, tmp_path):
    def slow():
        time.sleep(0.05)
        return Outcome([row("a", "ours")])

    tasks = [Task("first", slow), Task("second", slow)]
    monkeypatch.setattr("benchmarks.run.machine.machine", lambda device: {
        "cpu": "c", "device": device, "threads": 1, "simd_kernels": None,
    })  # fmt: skip
    outcome, result = run_tasks(monkeypatch, tmp_path, tasks, "--seconds", "0.04")
    assert outcome.exit_code == 0
    assert len(result["rows"]) == 1
    assert "second" in result["skipped"] and "used up" in result["skipped"]["second"]
    assert "second is left out" in outcome.stderr


def test_goals_stand_beside_what_was_reached(monkeypatch, tmp_path):
    goals = {"rows": ">= 1"}
    outcome, result = run_tasks(
        monkeypatch, tmp_path, [Task("one", lambda: Outcome([row("a", "ours")]))], goals=goals
    )
    assert "| `rows` | 1 | >= 1 | yes |" in command("table", tmp_path / "made.json").stdout
    for value, goal, said in (
        (0.5, ">= 1", "no"),
        (1.0, "> 1", "no"),
        (1.02, "<= 1.02", "yes"),
        (None, "> 1", "no figure"),
    ):
        result["summary"] = {"rows": value}
        assert f"| {goal} | {said} |" in report.markdown(result, {"rows": goal})


def test_one_way_that_raises_is_left_out_and_named():
    errors = {}

    def make(key, item):
        if item < 0:
            raise ValueError(f"{item} is negative")
        return item

    items = [(("case", "a"), 1), (("case", "b"), -1), (("case", "c"), 2)]
    assert attempt(items, make, errors) == {("case", "a"): 1, ("case", "c"): 2}
    assert errors == {"case, b": "ValueError: -1 is negative"}


def test_no_figure_beside_a_failed_check(results):
    rows = [dict(r) for r in results["gpu-kv"]["rows"]]
    for r in rows:
        if r["provider"] == "ours.cpu":
            r["error"] = 1.0
    summary = SUITES["gpu-kv"].summary(rows)
    assert all((value is None) == ("ours.cpu" in name) for name, value in summary.items())


def test_a_backend_that_cannot_run_on_the_device_says_why():
    assert "does not run on device 'cuda'" in RIVALS["ours.cpu"].missing("cuda:0")
    assert RIVALS["ours.reference"].missing("cpu") is None
