# SPDX-License-Identifier: Apache-2.0
"""The page and the Markdown from made-up rows alone."""

import base64
import io
import re

import pytest
from PIL import Image
from report_kit import made_run, report, write
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
    PairRow,
    PictureRow,
    SummaryRow,
    TuningRow,
    to_line,
)
from stamina_adapters.continual.thumbnails import encode

pytest.importorskip("matplotlib")


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
    outcome = report(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    return tmp_path


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
    assert report(folder, "--output", tmp_path / "again").exit_code == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_rows_are_collected_one_file_for_each_run(folder, tmp_path):
    assert report(folder, "--collect", tmp_path / "flat").exit_code == 0
    names = {file.name for file in (tmp_path / "flat").iterdir()}
    assert {"stamina-seed-0.jsonl", "levels.jsonl", "tuning-lora.jsonl"} <= names
    assert report(tmp_path / "flat").exit_code == 0
    first, second = (f / "report.md" for f in (folder, tmp_path / "flat"))
    assert first.read_bytes() == second.read_bytes()
    outcome = report(folder, "--collect", tmp_path / "flat")
    assert outcome.exit_code == 2 and "exists; choose a new folder" in outcome.stderr


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
