# SPDX-License-Identifier: Apache-2.0
"""`stamina benchmark` and its `--tune` on a tiny pipeline: what they write and refuse."""

import json
import sys

import pytest
from cli_kit import refused, run, tree
from continual_kit import REGISTRY, comparable, write_spec
from stamina_adapters.continual.folder import claim_folder
from stamina_adapters.continual.registry import default_registry
from stamina_adapters.continual.report.results import read_results
from stamina_adapters.continual.rows import ConceptRow, LevelRow, read_rows
from stamina_adapters.continual.spec import load_spec


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("stamina_adapters.cli.benchmark.default_registry", lambda: REGISTRY)


@pytest.fixture
def spec(model, tmp_path):
    return write_spec(tmp_path, model)


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_methods_and_seeds_get_folders_of_their_own(spec, tmp_path):
    out = tmp_path / "out"
    outcome = run("benchmark", "--sequence", spec, "--seeds", "0,1", "--output", out)
    assert outcome.exit_code == 0, outcome.output
    for told in ("fake, seed 0, 1 concept: accuracy", "fake, seed 0, 3 concepts: accuracy"):
        assert told in outcome.stdout
    assert "nothing left" not in outcome.stdout
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*.jsonl"))
    runs = [f"{name}/seed-{seed}/rows.jsonl" for name in ("fake", "other") for seed in (0, 1)]
    assert files == sorted([*runs, "levels/rows.jsonl"])
    rows = comparable(out / "fake" / "seed-0" / "rows.jsonl")
    kinds = [row["kind"] for row in rows]
    assert kinds == [
        "run",
        "concept",
        "picture",
        "checkpoint",
        "summary",
        "concept",
        "concept",
        "picture",
        "checkpoint",
        "summary",
        "picture",
        "picture",
        "pair",
    ]
    # pictures are of the run that the specification names
    assert "picture" not in {row["kind"] for row in comparable(out / "fake/seed-1/rows.jsonl")}
    concepts = [row for row in rows if row["kind"] == "concept"]
    assert concepts[0]["trained_percent"] > 0 and concepts[0]["carried_percent"] > 0
    # one row of the table for each word, of the same width
    stored = [row["stored_percent"] for row in concepts]
    assert stored == pytest.approx([stored[0] * k for k in (1, 2, 3)], rel=1e-3)
    summary = next(row for row in rows if row["kind"] == "summary" and row["concepts"] == 3)
    assert summary["accuracy_ceiling"] is None and summary["chance"] == pytest.approx(1 / 3, 1e-4)
    learned = sum(row["accuracy"] for row in concepts) / 3
    assert summary["accuracy_after_learning"] == pytest.approx(learned, abs=1e-4)

    # again: nothing is done twice; another method joins; another specification is refused
    before = tree(out)
    outcome = run("benchmark", "--sequence", spec, "--seeds", "0", "--output", out)
    assert outcome.exit_code == 0
    assert "nothing left to do, 2 runs finished: rows in" in outcome.stdout
    assert tree(out) == before
    _edit(spec, methods={"fake": {"settings": {"rate": 0.5}}})
    outcome = run("benchmark", "--sequence", spec, "--output", out)
    refused(outcome, "fake/seed-0", "holds another run (settings.rate differs)")
    _edit(spec, checkpoints=[2, 3])
    outcome = run("benchmark", "--sequence", spec, "--output", out)
    refused(outcome, "--output", "holds another run (spec.checkpoints differs)")
    assert tree(out) == before


def test_the_embedded_world_has_levels_and_a_ceiling(tmp_path, monkeypatch):
    monkeypatch.setattr("stamina_adapters.cli.benchmark.model_path", _embedded)
    file = tmp_path / "spec.json"
    concepts = {"source": "embedded", "count": 2, "identities": 3, "pictures": 2}
    file.write_text(
        json.dumps(
            {
                "name": "embedded",
                "concepts": {**concepts, "real_pictures": 2},
                "sampling": {"num_inference_steps": 1, "guidance_scale": 1, "pictures": 2},
                "training": {"max_train_steps": 1, "train_batch_size": 2},
                "checkpoints": [2],
                "pairs": 0,
                "ceiling": {"steps": 1},
                "methods": {"fake": {}},
            }
        )
    )
    out = tmp_path / "out"
    outcome = run("benchmark", "--sequence", file, "--output", out)
    assert outcome.exit_code == 0, outcome.output
    levels = list(read_rows([out / "levels" / "rows.jsonl"], ""))
    assert [type(row) for row in levels] == [LevelRow, LevelRow]
    assert [row.concept for row in levels] == ["face-000", "landmark-000"]
    for row in levels:
        assert None not in (row.accuracy_family, row.accuracy_ceiling, row.mmd_ceiling)
    (benchmark,) = read_results([out]).benchmarks
    assert benchmark.summaries("fake", 2)[0].accuracy_ceiling is not None


def _embedded():
    from stamina_adapters.embedded import assets_dir

    return assets_dir()


def test_a_run_that_another_process_began_meanwhile_is_left_alone(spec, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "fake" / "seed-0"

    def meanwhile(*arguments):
        claim_folder(folder, {"settings": {"rate": 0.5}})
        return []

    monkeypatch.setattr("stamina_adapters.cli.benchmark._levels", meanwhile)
    outcome = run("benchmark", "--sequence", spec, "--output", tmp_path / "out")
    assert outcome.exit_code == 2
    assert "fake/seed-0': holds another run (format differs)" in outcome.stderr
    assert not (folder / "rows.jsonl").exists()


def test_tuning_tries_every_setting_on_the_tuning_concepts_alone(spec, tmp_path):
    out = tmp_path / "out"
    outcome = run("benchmark", "--sequence", spec, "--tune", "--output", out)
    assert outcome.exit_code == 0, outcome.output
    results = read_results([out])
    assert results.benchmarks == []
    assert [(row.method, row.trial, row.trials) for row in results.tuning] == [
        ("fake", 1, 2),
        ("fake", 2, 2),
        ("other", 1, 2),
        ("other", 2, 2),
    ]
    assert {row.concepts for row in results.tuning} == {2}
    tokens = {
        row.token
        for file in out.rglob("trial.rows")
        for row in read_rows([file], "")
        if isinstance(row, ConceptRow)
    }
    assert tokens == {"<v11>", "<v12>"}
    chosen = load_spec(out / "tuned.json")
    picked = {row.method: row.settings for row in results.tuning if row.picked}
    assert {name: line.settings for name, line in chosen.methods.items()} == picked
    refused(run("benchmark", "--sequence", spec, "--output", out), "holds another run")


def test_a_method_that_diverges_does_not_stop_the_others(spec, tmp_path):
    out = tmp_path / "out"
    _edit(spec, methods={"fake": {"settings": {"fail_at": 2}}, "other": {}})
    outcome = run("benchmark", "--sequence", spec, "--output", out)
    assert outcome.exit_code == 2
    assert "1 run failed, the others are whole: fake, seed 0, concept 2: " in outcome.stderr
    rows = comparable(out / "fake" / "seed-0" / "rows.jsonl")
    assert [row["kind"] for row in rows[-2:]] == ["summary", "failed"]
    assert rows[-1]["task"] == 2 and "became nan" in rows[-1]["reason"]
    (benchmark,) = read_results([out]).benchmarks
    assert benchmark.finished() == ["other"]
    # again: it is tried once more, and still told once
    assert run("benchmark", "--sequence", spec, "--output", out).exit_code == 2
    assert comparable(out / "fake" / "seed-0" / "rows.jsonl") == rows
    tuning = run("benchmark", "--sequence", spec, "--tune", "--output", tmp_path / "tuned")
    assert tuning.exit_code == 0
    trials = read_results([tmp_path / "tuned"]).tuning
    assert [row.failed is not None for row in trials] == [True, True, False, False]


def test_a_run_that_fails_at_its_first_concept_leaves_its_row(spec, tmp_path):
    out = tmp_path / "out"
    _edit(spec, methods={"fake": {"settings": {"fail_at": 1}}})
    assert run("benchmark", "--sequence", spec, "--output", out).exit_code == 2
    rows = comparable(out / "fake" / "seed-0" / "rows.jsonl")
    assert [row["kind"] for row in rows] == ["run", "failed"]
    ((method, (failed,)),) = read_results([out]).benchmarks[0].methods.items()
    assert method == "fake" and failed.failed.task == 1


# Each case spoils one thing of a sound call; nothing may be written or changed.
def _empty(tmp_path, spec):
    for file in (tmp_path / "concepts" / "data2").iterdir():
        file.unlink()


def _corrupt(tmp_path, spec):
    picture = tmp_path / "concepts" / "data2" / "1.png"
    picture.write_bytes(picture.read_bytes()[:40])


def _edit_concept(tmp_path, index, **changes):
    file = tmp_path / "concepts" / "concepts1.json"
    entries = json.loads(file.read_text())
    entries[index].update(changes)
    file.write_text(json.dumps(entries))


def _missing(tmp_path, spec):
    _edit_concept(tmp_path, 0, instance_data_dir=str(tmp_path / "absent"))


def _twice(tmp_path, spec):
    _edit_concept(tmp_path, 1, instance_prompt="a photo of <v1>")


def _word(tmp_path, spec):
    _edit_concept(tmp_path, 0, instance_prompt="a photo of x", token="x")


def _key(tmp_path, spec):
    _edit_concept(tmp_path, 0, colour="red")


def _families(tmp_path, spec):
    concepts = json.loads(spec.read_text())["concepts"]
    _edit(spec, concepts={**concepts, "families": ["face"]})


def _clip(tmp_path, spec):
    _edit(spec, clip=str(tmp_path / "concepts"))


def _no_clip(tmp_path, spec):
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "bert"}')


def _resolution(tmp_path, spec):
    _edit(spec, methods={"fake": {"training": {"learning_rate": -1}}})


def _used(tmp_path, spec):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, ("instance_data_dir", "is empty")),
        (_corrupt, ("1.png", "cannot be decoded")),
        (_missing, ("concepts1.json': entry 0: instance_data_dir", "no such folder")),
        (_twice, ("token '<v1>' is used twice",)),
        (_word, ("token 'x' is already in the vocabulary",)),
        (_key, ("unknown key 'colour'",)),
        (_families, ("families has 1 words for 3 concepts",)),
        (_clip, ("--clip", "holds no readable config.json")),
        (_no_clip, ("--clip", "is a bert")),
        (_resolution, ("methods.fake.training", "learning_rate")),
        (_used, ("--output", "in use (not empty)")),
    ],
)
def test_a_benchmark_is_refused_before_it_begins(spec, tmp_path, spoil, words):
    spoil(tmp_path, spec)
    before = tree(tmp_path)
    refused(run("benchmark", "--sequence", spec, "--output", tmp_path / "out"), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("stamina", {"training": {"target_density": 0.04}}, "must be below target_density 0.04"),
        ("ablation-no-mask", {"training": {"target_density": 0.04}}, "below target_density 0.04"),
        ("stamina", {"adapter": {"target_modules": ["conv_in"]}}, "convolutions cannot be adapted"),
        ("orthogonal", {"r": 41}, "r must be at most 40"),
        ("lora", {"target_modules": ["nothing"]}, "is named or ends in 'nothing'"),
        (
            "lora",
            {"target_modules": ["conv_in"]},
            "only a plain nn.Linear can be adapted, 'conv_in'",
        ),
        ("lora", {"learning_rate": float("inf")}, "learning_rate"),
        ("lora", {"rank": 4}, "settings of 'lora': unknown key 'rank'; remove it"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_begins(
    spec, tmp_path, monkeypatch, method, settings, words
):
    monkeypatch.setattr("stamina_adapters.cli.benchmark.default_registry", default_registry)
    _edit(spec, methods={"lora": {}, "line": {"method": method, "settings": settings}})
    before = tree(tmp_path)
    outcome = run("benchmark", "--sequence", spec, "--output", tmp_path / "out")
    refused(outcome, "--sequence: methods.line: ", words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("method", "training"),
    [("lora", {"learning_rate": 1.0, "preserve_weight": 7}), ("stamina", {"seed": 99})],
)
def test_training_settings_that_a_line_would_not_read_are_refused(
    spec, tmp_path, monkeypatch, method, training
):
    monkeypatch.setattr("stamina_adapters.cli.benchmark.default_registry", default_registry)
    _edit(spec, methods={"line": {"method": method, "training": training}})
    before = tree(tmp_path)
    outcome = run("benchmark", "--sequence", spec, "--output", tmp_path / "out")
    unread = ", ".join(sorted(training))
    refused(outcome, f"methods.line.training: {method!r} does not read {unread}; its own settings")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["pair", "family"])
def test_prompts_that_the_model_would_cut_are_refused(spec, tmp_path, name):
    fields = {"pair": "{first} and {second}", "family": "{family}"}
    _edit(spec, prompts={name: f"{'a ' * 90}{fields[name]}"})
    before = tree(tmp_path)
    outcome = run("benchmark", "--sequence", spec, "--output", tmp_path / "out")
    refused(outcome, f"--sequence: prompts.{name} has ", "shorten it to")
    assert tree(tmp_path) == before


def test_a_finished_benchmark_needs_no_room(spec, tmp_path, monkeypatch):
    arguments = ("benchmark", "--sequence", spec, "--methods", "fake", "--output", tmp_path / "out")
    assert run(*arguments).exit_code == 0

    class Usage:
        free = 1000

    monkeypatch.setattr("stamina_adapters.continual.folder.shutil.disk_usage", lambda path: Usage)
    assert run(*arguments).exit_code == 0
    refused(run(*arguments, "--seeds", "0,1"), "--output", "MiB free")


def test_a_missing_torchmetrics_is_told_before_anything_is_made(spec, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    out = tmp_path / "out"
    refused(run("benchmark", "--sequence", spec, "--output", out), "KID needs torchmetrics; pip")
    assert not out.exists()
    where = ("--pretrained_model_name_or_path", model, "--concepts_list", spec)
    refused(run("evaluate", *where), "KID needs torchmetrics; pip")


def test_overlapping_concepts_to_tune_on_are_refused(spec, tmp_path):
    concepts = json.loads(spec.read_text())["concepts"]
    _edit(spec, concepts={**concepts, "tuning_list": concepts["concepts_list"]})
    outcome = run("benchmark", "--sequence", spec, "--tune", "--output", tmp_path / "out")
    refused(outcome, "is in tuning_list and in concepts_list")


def test_a_disk_without_room_is_refused_and_a_full_one_is_told(spec, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stamina_adapters.continual.folder.shutil.disk_usage", lambda path: Usage)
        outcome = run("benchmark", "--sequence", spec, "--output", tmp_path / "out")
        refused(outcome, "--output", "MiB free")
        assert not (tmp_path / "out").exists()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    arguments = ("benchmark", "--sequence", spec, "--methods", "fake", "--output", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stamina_adapters.continual.store.RunStore.commit", full)
        outcome = run(*arguments)
        assert outcome.exit_code == 2
        assert "--output" in outcome.stderr
        assert "the disk is full; free some or choose another folder" in outcome.stderr
    assert run(*arguments).exit_code == 0
