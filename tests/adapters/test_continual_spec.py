# SPDX-License-Identifier: Apache-2.0
"""Specifications: what the committed ones say, and what is refused."""

import json
from pathlib import Path

import pytest
from continual_kit import REGISTRY, write_spec
from stamina_adapters.cli.train import read_datasets
from stamina_adapters.continual.materials import embedded_identities, load_material
from stamina_adapters.continual.registry import chosen_lines, chosen_seeds, default_registry
from stamina_adapters.continual.rows import SummaryRow
from stamina_adapters.continual.spec import BenchmarkSpec, EmbeddedConcepts, load_spec
from stamina_adapters.continual.tune import best, merged, trials_of, tuned, tuning_rows
from stamina_adapters.training.config import load_concepts_list
from stamina_adapters.training.errors import InputError

COMMITTED = sorted(Path(__file__).parents[2].glob("benchmarks/sequences/*.json"))


def _spec(**changes):
    return BenchmarkSpec.model_validate(
        {"name": "x", "concepts": {"source": "embedded"}, **changes}
    )


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_specifications_are_valid_and_described(file):
    spec = load_spec(file)
    assert spec.name == file.stem and spec.description
    if spec.concepts.source == "embedded":
        spec.check_count(spec.concepts.count, "--sequence")
        assert spec.concepts.tuning == 5


def test_the_fifty_concepts_and_the_ablations_are_committed():
    found = {file.stem: load_spec(file) for file in COMMITTED}
    assert found["continual50"].checkpoints == (1, 5, 10, 25, 50)
    assert found["continual50"].ceiling is not None
    assert found["ablations10"].checkpoints[-1] == 10
    learned = {
        name: {i.id for i in embedded_identities(found[name].concepts, tuning=False)[0]}
        for name in ("continual50", "ablations10")
    }
    # defaults follow from the ablations, so they are not run on what is evaluated
    assert len(learned["ablations10"]) == 10 and learned["ablations10"].isdisjoint(
        learned["continual50"]
    )
    assert "untested" in found["stable-diffusion50"].description.lower()


def test_tuning_never_sees_an_evaluated_identity():
    concepts = EmbeddedConcepts()
    evaluated, others = embedded_identities(concepts, tuning=False)
    tuning, distractors = embedded_identities(concepts, tuning=True)
    assert [len(x) for x in (evaluated, others, tuning, distractors)] == [50, 0, 5, 45]
    names = {identity.id for identity in evaluated}
    assert not names & {identity.id for identity in [*tuning, *distractors]}
    assert {identity.family for identity in tuning} == {"face", "landmark"}
    with pytest.raises(InputError, match="too few distractors"):
        embedded_identities(EmbeddedConcepts(count=50, identities=106), tuning=True)


def test_real_pictures_are_not_those_learned_from():
    concepts = {"source": "embedded", "count": 2, "identities": 3, "pictures": 2}
    spec = _spec(concepts={**concepts, "real_pictures": 2}, checkpoints=[2])
    material = load_material(spec)
    first = material.concepts[0]
    assert first.spec.instance_prompt == "a photo of <v1>"
    assert len(material.others) == 1
    learned = {image.tobytes() for image in first.dataset.images}
    assert not learned & {image.tobytes() for image in first.real}
    assert material.digest() == load_material(spec).digest()
    assert material.digest() != load_material(spec, tuning=True).digest()


def _relative(file):
    """The list with its folders relative to its own."""
    entries = json.loads(file.read_text())
    for entry in entries:
        entry["instance_data_dir"] = Path(entry["instance_data_dir"]).name
    file.write_text(json.dumps(entries))


def test_folders_of_a_list_are_relative_to_it_and_to_the_working_directory_in_commands(
    tmp_path, monkeypatch
):
    spec = load_spec(write_spec(tmp_path, tmp_path / "no-model"))
    digests = [load_material(spec, tuning=tuning).digest() for tuning in (False, True)]
    for file in (spec.concepts.concepts_list, spec.concepts.tuning_list):
        _relative(file)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [load_material(spec, tuning=tuning).digest() for tuning in (False, True)] == digests
    # what is tuned on is still told apart from what is evaluated
    entries = json.loads(spec.concepts.concepts_list.read_text())
    entries[0]["instance_data_dir"] = "../tuning/data11"
    spec.concepts.concepts_list.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="is in tuning_list and in concepts_list"):
        load_material(spec, tuning=True)

    tuning = spec.concepts.tuning_list
    with pytest.raises(InputError, match="'data11': no such folder"):
        read_datasets(load_concepts_list(tuning))
    monkeypatch.chdir(tuning.parent)
    assert len(read_datasets(load_concepts_list(tuning))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unknown": 1}, "unknown key 'unknown'; remove it"),
        ({"sampling": {"steps": 3}}, "unknown key 'sampling.steps'; remove it"),
        ({"concepts": {"source": "web"}}, "concepts"),
        ({"concepts": {"source": "embedded", "count": 0}}, "concepts.embedded.count"),
        ({"concepts": {"source": "embedded", "identities": 10}}, "must not be below count 50"),
        ({"concepts": {"source": "embedded", "start": 51}}, "must not exceed the 100 identities"),
        ({"checkpoints": [5, 1]}, "must be ascending task numbers"),
        ({"checkpoints": [0, 1]}, "must be ascending task numbers"),
        ({"prompts": {"concept": "a photo"}}, "must hold {token}"),
        ({"prompts": {"concept": "a photo of {token}."}}, "must hold {token} between spaces"),
        ({"prompts": {"pair": "{first} {second} {third}"}}, "holds a field it must not"),
        ({"training": {"max_train_steps": 0}}, "training.max_train_steps"),
        ({"training": {"seed": 77}}, "seed 77 is not read: seeds come from --seeds"),
        ({"sampling": {"guidance_scale": float("inf")}}, "sampling.guidance_scale"),
        ({"ceiling": {"rate": float("inf")}}, "ceiling.rate"),
        ({"methods": {"fake": {"rate": 1}}}, "unknown key 'methods.fake.rate'"),
        (
            {"concepts": {"source": "folders", "concepts_list": "a"}, "ceiling": {}},
            "ceiling is for embedded concepts",
        ),
    ],
)
def test_a_wrong_specification_is_refused_in_one_line(tmp_path, changes, words):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"name": "x", "concepts": {"source": "embedded"}, **changes}))
    with pytest.raises(InputError) as caught:
        load_spec(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("--sequence ")


def test_a_file_that_is_no_specification_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_spec(tmp_path / "absent.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_spec(tmp_path / "a.json")
    with pytest.raises(InputError, match="checkpoints end at 50, the sequence has 10"):
        _spec().check_count(10, "--sequence")


def test_paths_are_relative_to_the_file(tmp_path):
    file = tmp_path / "spec.json"
    concepts = {"source": "folders", "concepts_list": "list.json"}
    file.write_text(json.dumps({"name": "x", "model": "sd", "concepts": concepts}))
    spec = load_spec(file)
    assert spec.model == tmp_path / "sd" and spec.clip is None
    assert spec.concepts.concepts_list == tmp_path / "list.json"


def test_lines_and_seeds_are_chosen_by_name():
    spec = _spec(methods={"fake": {}, "slow": {"method": "fake", "settings": {"rate": 1e-4}}})
    assert chosen_lines(spec, None, REGISTRY) == ["fake", "slow"]
    assert chosen_lines(spec, "slow, other", REGISTRY) == ["slow", "other"]
    assert spec.line("slow").method == "fake" and spec.line("other").method == "other"
    assert chosen_seeds("0, 2") == [0, 2]
    for methods, words in (
        (
            "fake,absent",
            "--methods: no method 'absent'; there are the specification's fake, slow; registered "
            "are fake, other$",
        ),
        ("slwo", r"no method 'slwo'; did you mean 'slow'\?; there are"),
        ("fake,fake", "named twice"),
        ("fake,,other", "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            chosen_lines(spec, methods, REGISTRY)
    for seeds in ("", "1,x", "-1", "1,1"):
        with pytest.raises(InputError, match="--seeds"):
            chosen_seeds(seeds)
    wrong = _spec(methods={"line": {"method": "otter"}})
    wanted = r"--sequence: methods\.line: no method 'otter'; did you mean 'other'\?; there are fake"
    with pytest.raises(InputError, match=wanted):
        chosen_lines(wrong, None, REGISTRY)
    with pytest.raises(InputError, match="--sequence: names no methods; give some with --methods"):
        chosen_lines(_spec(methods={}), None, REGISTRY)
    wrong = _spec(methods={"fake": {"settings": {"speed": 1}}})
    with pytest.raises(InputError, match="unknown setting 'speed'"):
        chosen_lines(wrong, None, REGISTRY)
    wrong = _spec(methods={"fake": {"training": {"max_train_steps": 0}}})
    with pytest.raises(InputError, match=r"methods\.fake\.training: max_train_steps"):
        chosen_lines(wrong, None, REGISTRY)


def _summary(final, a_mmd, f_mmd=0.1):
    return SummaryRow(
        method="fake",
        seed=0,
        concepts=5,
        a_mmd=a_mmd,
        f_mmd=f_mmd,
        kid=None,
        accuracy_after_learning=0.5,
        accuracy_final=final,
        accuracy_ceiling=None,
        accuracy_family=None,
        chance=0.02,
        cosine_final=0.5,
        trained_percent=1,
        stored_percent=0,
        carried_percent=0,
        density=None,
        seconds=1,
        peak_mib=1,
    )


def test_every_method_has_as_many_trials():
    spec = _spec(methods={"fake": {"settings": {"fail_at": 3}}})
    trials = trials_of(spec, ["fake", "other"], REGISTRY)
    assert [len(one) for one in trials.values()] == [2, 2]
    assert trials["fake"] == [{"fail_at": 3, "rate": 1e-3}, {"fail_at": 3, "rate": 1e-2}]
    # what an earlier search picked is no part of a trial
    picked = _spec(methods={"fake": {"settings": {"fail_at": 3, "rate": 7.0}}})
    assert trials_of(picked, ["fake", "other"], REGISTRY) == trials
    with pytest.raises(InputError, match="trials 3: 'fake' offers 2"):
        trials_of(_spec(tuning={"trials": 3}), ["fake"], REGISTRY)
    uneven = type(REGISTRY)(REGISTRY.methods, {**REGISTRY.search, "other": [{}]})
    with pytest.raises(InputError, match="different numbers of settings"):
        trials_of(_spec(), ["fake", "other"], uneven)
    twice = type(REGISTRY)(REGISTRY.methods, {"fake": [{"rate": 1}, {"rate": 2}, {"rate": 1}]})
    with pytest.raises(InputError, match="trials 1 and 3 of 'fake' are the same"):
        trials_of(_spec(), ["fake"], twice)
    alike = _spec(methods={"again": {"method": "fake", "settings": {"rate": 5}}})
    with pytest.raises(InputError, match="'again' would be tried with the settings of 'fake'"):
        trials_of(alike, ["fake", "again"], REGISTRY)
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_the_committed_search_is_what_tuning_repeats():
    """Every trial of the committed rows, in their order, from the specification with the picks."""
    root = Path(__file__).parents[2] / "benchmarks"
    spec = load_spec(root / "sequences/continual50.json")
    files = sorted((root / "results/continual50").glob("tuning-*.jsonl"))
    committed = {
        file.stem.removeprefix("tuning-"): [
            json.loads(line)["settings"] for line in file.read_text().splitlines()
        ]
        for file in files
    }
    assert len(committed) == 10
    assert trials_of(spec, list(committed), default_registry()) == committed


def test_the_best_trial_is_picked_and_enters_the_specification():
    summaries = [_summary(0.8, 0.3), _summary(0.9, 0.3), _summary(0.7, 0.2)]
    assert best(summaries) == 2
    settings = [{"rate": k} for k in (1, 2, 3, 4)]
    rows = tuning_rows("fake", settings, [*summaries, "diverged"], 0, 5)
    assert [row.picked for row in rows] == [False, False, True, False]
    assert [row.trials for row in rows] == [4, 4, 4, 4]
    assert (rows[3].failed, rows[3].accuracy_final, rows[2].failed) == ("diverged", None, None)
    assert tuned(_spec(), rows).methods["fake"].settings == {"rate": 3}
    assert best(["diverged", "diverged"]) is None
    # what was forgotten counts besides the distance it adds to
    assert best([_summary(0.5, 0.2, 0.4), _summary(0.5, 0.3, 0.2), _summary(0.5, 0.6, 0.0)]) == 1
