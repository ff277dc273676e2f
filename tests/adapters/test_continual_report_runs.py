# SPDX-License-Identifier: Apache-2.0
"""Rows that are refused, runs that may not stand together, and runs that did not finish."""

import re

import pytest
from report_kit import made_run, report, write
from stamina_adapters.continual.report.results import read_results
from stamina_adapters.continual.rows import FailedRow
from stamina_adapters.training.errors import InputError

pytest.importorskip("matplotlib")


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_got(tmp_path):
    write(tmp_path, "a.jsonl", made_run("stamina", 0, 10))
    # killed while it learned the sixth
    rows = made_run("lora", 0, 10)
    stop = next(k for k, row in enumerate(rows) if getattr(row, "task", 0) == 6)
    write(tmp_path, "b.jsonl", rows[:stop])
    write(tmp_path, "c.jsonl", made_run("ewc", 0, 10)[:1])
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for text in told_in(tmp_path):
        assert "| stamina | 1 |" in text
        assert "| lora | 0 of 1 |" in text
        assert "| lora | 1 of 1 seeds unfinished: 5 of 10 concepts learned |" in text
        assert "| ewc | 1 of 1 seeds unfinished: 0 of 10 concepts learned |" in text


def told_in(folder):
    """The Markdown, and the page with its tables as in Markdown."""
    page = (folder / "report.html").read_text()
    for tags, bar in (
        ("</t[dh]><t[dh]>", " | "),
        ("<tr[^>]*><t[dh]>", "| "),
        ("</t[dh]></tr>", " |"),
    ):
        page = re.sub(tags, bar, page)
    return (folder / "report.md").read_text(), page


def failed_run(method, seed, task, *, name="made"):
    """A run of ten concepts whose training diverges at one of them."""
    rows = made_run(method, seed, 10, name=name)
    begun = next(k for k, row in enumerate(rows) if getattr(row, "task", 0) == task)
    why = FailedRow(method=method, seed=seed, task=task, reason="the loss is nan|inf")
    return [*rows[:begun], why]


def test_runs_that_failed_are_counted_and_named_with_the_reason(tmp_path):
    write(tmp_path, "a.jsonl", made_run("lora", 0, 10))
    write(tmp_path, "b.jsonl", failed_run("lora", 1, 6))
    for seed in (0, 1):
        write(tmp_path, f"c{seed}.jsonl", failed_run("ewc", seed, 1))
    write(tmp_path, "d.jsonl", failed_run("lora", 0, 1, name="ablations"))
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    reasons = ("the loss is nan\\|inf", "the loss is nan|inf")
    for text, reason in zip(told_in(tmp_path), reasons, strict=True):
        assert "| lora | 1 of 2 |" in text and "| ewc | 0 of 2 |" in text
        assert f"| lora | 1 of 2 seeds failed at concept 6 | {reason} |" in text
        assert f"| ewc | 2 of 2 seeds failed at concept 1 | {reason} |" in text
        assert "ablations: no checkpoint reached" in text
        assert f"| lora | 1 of 1 seeds failed at concept 1 | {reason} |" in text


def test_a_report_of_failures_alone_names_them(tmp_path):
    write(tmp_path, "a.jsonl", failed_run("lora", 0, 1))
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for text in told_in(tmp_path):
        assert "| lora | 1 of 1 seeds failed at concept 1 |" in text


def test_a_report_of_whole_runs_names_no_others(tmp_path):
    for seed in (0, 1):
        write(tmp_path, f"{seed}.jsonl", made_run("lora", seed, 10))
    assert report(tmp_path).exit_code == 0
    for text in told_in(tmp_path):
        assert "| lora | 2 |" in text and "not whole" not in text


@pytest.mark.parametrize(
    ("write_it", "words"),
    [
        (lambda f: None, "holds no rows"),
        (lambda f: write(f, "a.jsonl", []), "holds no row of a run"),
        (lambda f: (f / "a.jsonl").write_text("{"), "line 1 is no result row"),
        (lambda f: write(f, "a.jsonl", made_run("m", 0, 1)[1:]), "does not begin with"),
        (
            lambda f: [write(f, n, made_run("m", 0, 1)) for n in ("a.jsonl", "b.jsonl")],
            "are both of m, seed 0",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_told(tmp_path, write_it, words):
    write_it(tmp_path)
    outcome = report(tmp_path)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1
    assert words in outcome.stderr
    assert not (tmp_path / "report.html").exists()


def _with(rows, **changes):
    """The rows with values of the row of kind run replaced."""
    return [rows[0].model_copy(update=changes), *rows[1:]]


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("m", {"training": {"seed": 1, "max_train_steps": 600}}, "training.max_train_steps"),
        ("m", {"settings": {"adapter": {"r": 64}}}, "settings.adapter.r"),
        ("m", {"concepts": 5}, "concepts"),
        ("other", {"identities": 8}, "identities"),
        ("other", {"pictures": 2}, "pictures"),
    ],
)
def test_runs_of_two_experiments_are_refused(tmp_path, method, changes, words):
    training, settings = {"seed": 0, "max_train_steps": 6}, {"adapter": {"r": 4}}
    rows = _with(made_run("m", 0, 2), training=training, settings=settings)
    write(tmp_path, "a.jsonl", rows)
    same = {"training": {**training, "seed": 1}, "settings": settings}
    write(tmp_path, "b.jsonl", _with(made_run(method, 1, 2), **{**same, **changes}))
    outcome = report(tmp_path)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1
    assert f"but {words} differs; give the rows of one experiment" in outcome.stderr
    assert "a.jsonl' and " in outcome.stderr and "b.jsonl' are both of made" in outcome.stderr
    assert not (tmp_path / "report.html").exists()


def test_methods_may_differ_in_training_and_settings(tmp_path):
    write(tmp_path, "a.jsonl", _with(made_run("m", 0, 2), training={"rate": 1}, settings={"r": 4}))
    write(tmp_path, "b.jsonl", _with(made_run("n", 0, 2), training={"rate": 2}, settings={"k": 4}))
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "differ in" not in outcome.stdout + (tmp_path / "report.md").read_text()


def test_runs_made_with_other_versions_are_told(tmp_path):
    for name, methods in (("large", ("m", "n")), ("small", ("k",))):
        for method in methods:
            for seed, torch in ((0, "2.11.0"), (1, "2.13.0")):
                rows = made_run(method, seed, 3 if name == "large" else 2, name=name)
                rows = _with(rows, versions={"torch": torch, "python": "3.12"}, threads=1 + seed)
                write(tmp_path, f"{method}-{seed}.jsonl", rows)
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for name in ("large", "small"):
        line = f"Runs of {name} differ in threads (1, 2), torch (2.11.0, 2.13.0)."
        texts = (outcome.stdout, *((tmp_path / f"report.{e}").read_text() for e in ("html", "md")))
        assert [text.count(line) for text in texts] == [1, 1, 1]


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_results([tmp_path / "absent"])
