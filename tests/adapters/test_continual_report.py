# SPDX-License-Identifier: Apache-2.0
"""The page and the Markdown from made-up rows alone."""

import base64
import io
import random
import re

import pytest
from PIL import Image
from stamina_adapters.cli import app
from stamina_adapters.continual.report.curves import first_concepts, plasticity
from stamina_adapters.continual.report.heat import (
    accuracy_matrix,
    confusion_matrix,
    overlap_matrix,
)
from stamina_adapters.continual.report.results import read_results
from stamina_adapters.continual.report.stats import moving_mean, spread
from stamina_adapters.continual.report.tables import growth_table, mask_table
from stamina_adapters.continual.rows import (
    CheckpointRow,
    ConceptRow,
    FailedRow,
    PairRow,
    PictureRow,
    RunRow,
    SummaryRow,
    TuningRow,
    to_line,
)
from stamina_adapters.continual.thumbnails import encode
from stamina_adapters.training.errors import InputError
from typer.testing import CliRunner

pytest.importorskip("matplotlib")


def made_run(method, seed, concepts, *, forgets=0.0, tires=0.0, masks=False, name="made"):
    """Rows of a run whose concepts lose `forgets` for each later one, and are learned ever worse
    by `tires`."""
    chance = random.Random(f"{method}{seed}")
    labels = {"method": method, "seed": seed}
    checkpoints = [k for k in (1, 5, 10, 25, 50) if k <= concepts]
    rows = [
        RunRow(
            benchmark=name,
            concepts=concepts,
            identities=max(concepts, 2),
            pictures=16,
            training={},
            settings={},
            versions={},
            device="cpu",
            threads=1,
            **labels,
        )
    ]

    def share(value):
        return min(1.0, max(0.0, value + chance.gauss(0, 0.03)))

    learned = []
    for task in range(1, concepts + 1):
        learned.append(share(0.95 - tires * task))
        rows.append(
            ConceptRow(
                task=task,
                concept=f"face-{task:03d}",
                token=f"<v{task}>",
                family="face",
                accuracy=learned[-1],
                cosine=0.8,
                mmd=0.2,
                told=[(task - 1, 16)],
                loss_sampled=0.1,
                loss_committed=0.1,
                trained_percent=2.5,
                stored_percent=0.01 * task,
                carried_percent=10,
                density=0.15 if masks else None,
                overlap=0.3 if masks else None,
                overlaps=[share(0.15) for _ in range(task - 1)] if masks else [],
                seconds=10 + chance.random(),
                peak_mib=100,
                **labels,
            )
        )
        if task == 1 or task == concepts:
            tile = Image.new("RGB", (32, 32), (5 * task % 255, 90, 160))
            rows.append(
                PictureRow(
                    stage="learned", task=task, concept=f"face-{task:03d}", data=encode([tile]),
                    **labels,
                )
            )  # fmt: skip
        if task not in checkpoints:
            continue
        kept = [share(a - forgets * (task - k)) for k, a in enumerate(learned, 1)]
        confusion = []
        for k, a in enumerate(kept, 1):
            right = round(16 * a)
            confusion += [(k, k - 1, right), (k, task - 1 if k != task else 0, 16 - right)]
        f_mmd = forgets * task / 2
        rows.append(
            CheckpointRow(
                after=task,
                accuracy=kept,
                cosine=[0.8] * task,
                a_mmd=0.1 + f_mmd,
                a_mmd_each=[0.1 + f_mmd] * task,
                f_mmd=f_mmd if task > 1 else None,
                f_mmd_each=[f_mmd] * (task - 1),
                kid=0.002,
                confusion=confusion,
                seconds=3,
                **labels,
            )
        )
        rows.append(
            SummaryRow(
                concepts=task,
                a_mmd=0.1 + f_mmd,
                f_mmd=f_mmd if task > 1 else None,
                kid=0.002,
                accuracy_after_learning=sum(learned) / task,
                accuracy_final=sum(kept) / task,
                accuracy_ceiling=0.99,
                accuracy_family=0.05,
                chance=1 / max(concepts, 2),
                cosine_final=0.8,
                trained_percent=2.5,
                stored_percent=0.01 * task,
                carried_percent=10,
                density=0.15 if masks else None,
                seconds=10.5 * task,
                peak_mib=100,
                **labels,
            )
        )
    for task in {1, concepts}:
        tile = Image.new("RGB", (32, 32), (5 * task % 255, 120, 60))
        rows.append(
            PictureRow(
                stage="final", task=task, concept=f"face-{task:03d}", data=encode([tile]), **labels
            )
        )
    if concepts > 1:
        rows.append(
            PairRow(
                after=concepts, first=1, second=2, share_first=0.4, share_second=0.3,
                share_either=0.7, **labels,
            )
        )  # fmt: skip
    return rows


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(map(to_line, rows)))


RIVALS = {
    "lora": {"forgets": 0.04},
    "c-lora": {"forgets": 0.003, "tires": 0.014},
    "textual-inversion": {"tires": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of two benchmarks and of tuning, with their report."""
    tmp_path = tmp_path_factory.mktemp("rows")
    for seed in (0, 1, 2):
        for name, ways in RIVALS.items():
            rows = made_run(name, seed, 10, **ways)
            write(tmp_path, f"{name}/seed-{seed}/rows.jsonl", rows)
        rows = made_run("stamina", seed, 10, forgets=0.001, masks=True)
        write(tmp_path, f"stamina/seed-{seed}/rows.jsonl", rows)
    rows = made_run("ablation-no-mask", 0, 5, name="ablations")
    write(tmp_path, "ablations/ablation-no-mask/seed-0/rows.jsonl", rows)
    tile = Image.new("RGB", (32, 32), "white")
    real = [
        PictureRow(stage="real", task=task, concept=f"face-{task:03d}", data=encode([tile]))
        for task in (1, 10)
    ]
    write(tmp_path, "levels/rows.jsonl", real)
    trial = {
        "method": "lora",
        "trials": 2,
        "seed": 0,
        "concepts": 5,
        "failed": None,
        "accuracy_after_learning": 0.9,
        "accuracy_final": 0.5,
        "a_mmd": 0.2,
        "f_mmd": 0.1,
        "seconds": 5,
    }
    tuning = [
        TuningRow(trial=k, settings={"rate": 10.0**-k}, picked=k == 2, **trial) for k in (1, 2)
    ]
    write(tmp_path, "tuning/lora.jsonl", tuning)
    outcome = run(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_page_stands_alone_and_shows_everything(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "http" not in page and "url(" not in page
    for text in (
        "10 concepts, one after the other",
        "ablations: 5 concepts",
        "ablation-no-mask",
        "Who is taken for whom",
        "Two concepts in one prompt",
        "How settings were chosen",
        "mask density",
        '<tr class="ours"><td>stamina</td><td>3</td>',
    ):
        assert text in page
    pictures = re.findall(r"base64,([^\"]+)\"", page)
    # accuracy, balance, distance, four grids, accuracy and confusion maps, overlap of masks
    assert len(pictures) == 10
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == "PNG" and min(image.size) > 150


def test_f_mmd_never_stands_without_accuracy_after_learning(folder):
    page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
    heads = [re.findall("<th>(.*?)</th>", row) for row in re.findall("<tr><th>.*?</tr>", page)]
    heads += [line.strip("| ").split(" | ") for line in text.splitlines() if "F_mmd" in line]
    shown = [head for head in heads if "F_mmd" in head]
    assert len(shown) > 4
    for head in shown:
        assert head[head.index("F_mmd") - 1] == "accuracy after learning"


def test_markdown_gives_means_and_deviations(folder):
    text = (folder / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| stamina | 3 |"))
    assert re.search(r"\| 0\.9\d ± 0\.0\d \| 0\.9\d ± 0\.0\d \| 0\.005 ± 0\.000 \|", row)
    order = re.findall(r"^\| ([a-z-]+) \| 3 \|", text, re.M)[:4]
    assert order[0] == "stamina" and order[-1] == "lora"
    assert "| lora | 2 / 2 | picked |" in text


def test_equal_rows_make_equal_pages(folder, tmp_path):
    assert run(folder, "--output", tmp_path / "again").exit_code == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_rows_are_collected_one_file_for_each_run(folder, tmp_path):
    assert run(folder, "--collect", tmp_path / "flat").exit_code == 0
    names = {file.name for file in (tmp_path / "flat").iterdir()}
    assert {"stamina-seed-0.jsonl", "levels.jsonl", "tuning-lora.jsonl"} <= names
    assert run(tmp_path / "flat").exit_code == 0
    first, second = (f / "report.md" for f in (folder, tmp_path / "flat"))
    assert first.read_bytes() == second.read_bytes()
    outcome = run(folder, "--collect", tmp_path / "flat")
    assert outcome.exit_code == 2 and "exists; choose a new folder" in outcome.stderr


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_got(tmp_path):
    write(tmp_path, "a.jsonl", made_run("stamina", 0, 10))
    # killed while it learned the sixth
    rows = made_run("lora", 0, 10)
    stop = next(k for k, row in enumerate(rows) if getattr(row, "task", 0) == 6)
    write(tmp_path, "b.jsonl", rows[:stop])
    write(tmp_path, "c.jsonl", made_run("ewc", 0, 10)[:1])
    outcome = run(tmp_path)
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
    outcome = run(tmp_path)
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
    outcome = run(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for text in told_in(tmp_path):
        assert "| lora | 1 of 1 seeds failed at concept 1 |" in text


def test_a_report_of_whole_runs_names_no_others(folder):
    for text in told_in(folder):
        assert "not whole" not in text and " of 3 " not in text


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
    outcome = run(tmp_path)
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
    outcome = run(tmp_path)
    assert outcome.exit_code == 2 and outcome.stderr.count("\n") == 1
    assert f"but {words} differs; give the rows of one experiment" in outcome.stderr
    assert "a.jsonl' and " in outcome.stderr and "b.jsonl' are both of made" in outcome.stderr
    assert not (tmp_path / "report.html").exists()


def test_methods_may_differ_in_training_and_settings(tmp_path):
    write(tmp_path, "a.jsonl", _with(made_run("m", 0, 2), training={"rate": 1}, settings={"r": 4}))
    write(tmp_path, "b.jsonl", _with(made_run("n", 0, 2), training={"rate": 2}, settings={"k": 4}))
    outcome = run(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "differ in" not in outcome.stdout + (tmp_path / "report.md").read_text()


def test_runs_made_with_other_versions_are_told(tmp_path):
    for name, methods in (("large", ("m", "n")), ("small", ("k",))):
        for method in methods:
            for seed, torch in ((0, "2.11.0"), (1, "2.13.0")):
                rows = made_run(method, seed, 3 if name == "large" else 2, name=name)
                rows = _with(rows, versions={"torch": torch, "python": "3.12"}, threads=1 + seed)
                write(tmp_path, f"{method}-{seed}.jsonl", rows)
    outcome = run(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for name in ("large", "small"):
        line = f"Runs of {name} differ in threads (1, 2), torch (2.11.0, 2.13.0)."
        texts = (outcome.stdout, *((tmp_path / f"report.{e}").read_text() for e in ("html", "md")))
        assert [text.count(line) for text in texts] == [1, 1, 1]


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_results([tmp_path / "absent"])


def test_the_first_and_the_last_ten_stand_beside_each_other(tmp_path):
    rows = made_run("stamina", 0, 50, tires=0.01)
    (tmp_path / "rows.jsonl").write_text("".join(map(to_line, rows)))
    (benchmark,) = read_results([tmp_path]).benchmarks
    table = growth_table(benchmark)
    learned = [row for row in rows if isinstance(row, ConceptRow)]
    for first, figures, digits in (
        (1, [row.accuracy for row in learned], 2),
        (3, [row.seconds for row in learned], 1),
        (5, [row.peak_mib for row in learned], 0),
    ):
        expected = [f"{sum(part) / 10:.{digits}f}" for part in (figures[:10], figures[40:])]
        assert list(table.rows[0][first : first + 2]) == expected
    assert table.rows[0][1] > table.rows[0][2]
    short = tmp_path / "short"
    short.mkdir()
    (short / "rows.jsonl").write_text("".join(map(to_line, made_run("stamina", 0, 10))))
    assert growth_table(read_results([short]).benchmarks[0]) is None


def test_masks_are_means_of_whole_runs_and_their_spread(tmp_path):
    """Concepts of one run differ; the deviation is that of seeds, and a run cut short is none."""
    write(tmp_path, "a.jsonl", made_run("m", 0, 10, masks=True))
    write(tmp_path, "b.jsonl", made_run("m", 1, 10, masks=True))
    cut = [r for r in made_run("m", 2, 10, masks=True) if getattr(r, "task", 0) in (0, 1, 2)]
    cut = [r for r in cut if not isinstance(r, (CheckpointRow, SummaryRow, PairRow))]
    write(tmp_path, "c.jsonl", [*cut[:1], *(r for r in cut if isinstance(r, ConceptRow))])
    (benchmark,) = read_results([tmp_path]).benchmarks
    whole = [run for run in benchmark.methods["m"] if run.learned == 10]
    assert len(benchmark.methods["m"]) == 3 and len(whole) == 2
    means = []
    for run in whole:
        values = [one for row in run.concepts for one in row.overlaps]
        means.append(sum(values) / len(values))
    ((name, density, overlap, last),) = mask_table(benchmark).rows
    assert (name, density, last) == ("m", "0.15 ± 0.00", "0.30 ± 0.00")
    assert overlap == spread(means).text()


def test_curves_and_matrices_hold_the_rows_figures(tmp_path):
    write(tmp_path, "a.jsonl", made_run("m", 0, 10, masks=True))
    write(tmp_path, "b.jsonl", made_run("m", 1, 10, masks=True))
    (benchmark,) = read_results([tmp_path]).benchmarks
    runs = benchmark.methods["m"]
    early = first_concepts(runs)
    assert [task for task, _ in early] == [5, 10]
    means = [sum(run.checkpoints[-1].accuracy[:5]) / 5 for run in runs]
    assert early[-1][1] == spread(means)
    assert [task for task, _ in plasticity(runs)] == list(range(1, 11))
    after, matrix = accuracy_matrix(runs)
    assert after == [1, 5, 10] and matrix.shape == (3, 10)
    assert matrix[1, 4] == pytest.approx(sum(r.checkpoints[1].accuracy[4] for r in runs) / 2)
    assert (matrix != matrix).sum() == 9 + 5
    confusion = confusion_matrix(runs)
    assert confusion.shape == (10, 11)
    assert confusion.sum(axis=1) == pytest.approx([1] * 10)
    overlap = overlap_matrix(runs)
    assert overlap[1, 0] == pytest.approx(sum(r.concepts[1].overlaps[0] for r in runs) / 2)
    assert overlap[0, 1] != overlap[0, 1]


def test_spreads_are_sample_deviations():
    assert spread([]) is None and spread([None]) is None
    assert spread([1.0]).text() == "1.00"
    found = spread([1.0, 2.0, 3.0, None])
    assert (found.mean, found.deviation, found.count) == (2, 1, 3)
    assert found.text(1, 10) == "20.0 ± 10.0"
    assert moving_mean([0, 3, 6, 3], 3) == [0, 3, 4, 3]
