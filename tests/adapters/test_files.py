# SPDX-License-Identifier: Apache-2.0
"""Concept files: exact round trip, size, and every way a file can be wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stamina_adapters import (
    ConceptState,
    StaminaConfig,
    add_custom_token,
    fold_stamina,
    get_list_stamina,
    load_stamina_weights,
    read_stamina_weights,
    save_stamina_weights,
    unload_stamina,
)

from stamina_kernels import CommittedAdapter


@pytest.fixture
def concept(pipe, learn):
    """A folded concept with a word, taken off the pipeline again."""
    learn(pipe)
    add_custom_token(pipe, "<v1>")
    state = fold_stamina(pipe)
    unload_stamina(pipe)
    return state


def test_round_trip_is_exact(pipe, learn, render, tmp_path):
    images, files = [], []
    for name in ("c0", "c1"):
        learn(pipe, name)
        add_custom_token(pipe, f"<{name}>")
        concept = fold_stamina(pipe)
        files += save_stamina_weights(tmp_path / "concepts", concept)
    images = [render(pipe, f"a <{name}>") for name in ("c0", "c1")]
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    assert [f.name for f in files] == ["c0.safetensors", "c1.safetensors"]
    unload_stamina(pipe)
    # the order of loading does not matter: concepts know theirs
    loaded = [load_stamina_weights(pipe, file) for file in reversed(files)]
    assert loaded[0].index == 1 and loaded[0].config == concept.config
    assert list(get_list_stamina(pipe)) == ["c0", "c1"]
    assert all(torch.equal(weights[k], v) for k, v in pipe.unet.state_dict().items())
    assert all(
        torch.equal(render(pipe, f"a <{n}>"), i) for n, i in zip(("c0", "c1"), images, strict=True)
    )
    again = save_stamina_weights(tmp_path / "again", pipe)
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]


def test_the_prompt_is_kept_where_it_is_known(concept, tmp_path):
    for known in (None, "a photo of <v1>"):
        (file,) = save_stamina_weights(tmp_path, replace(concept, prompt=known))
        assert read_stamina_weights(file).prompt == known


def test_no_stock_key_or_name(concept, tmp_path):
    (file,) = save_stamina_weights(tmp_path / "one.safetensors", concept)
    keys = list(load_file(file))
    assert not any("lora" in key for key in keys)
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
    described = json.loads(metadata["stamina"])
    assert described["version"] == 1 and described["tokens"] == {"text_encoder": ["<v1>"]}
    with pytest.raises(ValueError, match="must not be named pytorch_lora_weights"):
        save_stamina_weights(tmp_path / "pytorch_lora_weights.safetensors", concept)
    assert [f.name for f in tmp_path.iterdir()] == ["one.safetensors"]


def test_stock_diffusers_refuses_the_file(pipe, concept, tmp_path):
    (file,) = save_stamina_weights(tmp_path, concept)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError):
        pipe.load_lora_weights(file)
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())


def test_size_at_stable_diffusion_shapes(tmp_path):
    blocks = [("down", 320, 2), ("down", 640, 2), ("down", 1280, 2), ("mid", 1280, 1)]
    blocks += [("up", 1280, 3), ("up", 640, 3), ("up", 320, 3)]
    rank, columns, layers = 16, 768, {}
    for place, (kind, rows, count) in enumerate(blocks):
        for k in range(2 * count):
            attention = f"{kind}_blocks.{place}.attentions.{k // 2}"
            path = f"{attention}.transformer_blocks.0.attn2.to_{'kv'[k % 2]}"
            layers[path] = CommittedAdapter(
                torch.zeros(rows, rank, dtype=torch.float16),
                torch.zeros(rank, columns, dtype=torch.float16),
                (0, 0),
                torch.zeros(rows, columns // 32, dtype=torch.int32),
                1.0,
            )
    assert sum(a.A.shape[0] * columns for a in layers.values()) == 19_169_280
    tokens = {"text_encoder": {"<v1>": torch.zeros(768)}}
    digests = dict.fromkeys(layers, "0" * 64)
    state = ConceptState("c0", 0, StaminaConfig(), layers, digests, tokens)
    (file,) = save_stamina_weights(tmp_path, state)
    assert file.stat().st_size <= 4_100_000


def test_failed_writes_leave_the_old_file(concept, tmp_path, monkeypatch):
    (file,) = save_stamina_weights(tmp_path, concept)
    old = file.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_stamina_weights(tmp_path, replace(concept, index=3))
    assert [f.name for f in tmp_path.iterdir()] == [file.name] and file.read_bytes() == old


def test_saving_needs_something_finished(pipe, learn, tmp_path):
    with pytest.raises(RuntimeError, match="no folded concept to save"):
        save_stamina_weights(tmp_path / "out", pipe)
    learn(pipe)
    with pytest.raises(RuntimeError, match="'c0' is not finished: call fold_stamina"):
        save_stamina_weights(tmp_path / "out", pipe)
    fold_stamina(pipe)
    learn(pipe, "c1")
    fold_stamina(pipe)
    with pytest.raises(ValueError, match="must be a directory for 2 concepts"):
        save_stamina_weights(tmp_path / "both.safetensors", pipe)
    assert not list(tmp_path.iterdir())


def rewrite(file, change_tensors=None, change_concept=None, change_metadata=None):
    tensors = load_file(file)
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
    described = json.loads(metadata["stamina"])
    if change_tensors:
        change_tensors(tensors)
    if change_concept:
        change_concept(described)
    metadata["stamina"] = json.dumps(described)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, file, metadata)


def first(mapping, ending):
    return next(key for key in mapping if key.endswith(ending))


def set_item(mapping, key, value):
    mapping[key] = value


TENSOR_FAULTS = {
    r"missing keys: .*\.A": lambda t: t.pop(first(t, ".A")),
    "unexpected keys: extra": lambda t: set_item(t, "extra", torch.zeros(1)),
    r"\.B must be torch.float16": lambda t: set_item(t, first(t, ".B"), t[first(t, ".B")].float()),
    r"\.bits must be torch.int32 \[": lambda t: set_item(
        t, first(t, ".bits"), t[first(t, ".bits")][:, :1].clone()
    ),
    "do not multiply": lambda t: set_item(t, first(t, ".B"), t[first(t, ".B")][:1].clone()),
    r"\.A is not finite": lambda t: t[first(t, ".A")].fill_(float("nan")),
    "missing keys: token/text_encoder/<v1>": lambda t: t.pop("token/text_encoder/<v1>"),
    "vector of token '<v1>' must be": lambda t: t["token/text_encoder/<v1>"].fill_(float("inf")),
    "of size 40": lambda t: set_item(t, "token/text_encoder/<v1>", torch.zeros(41)),
    "<v1> must be torch.float32 of one": lambda t: set_item(
        t, "token/text_encoder/<v1>", torch.zeros(40, dtype=torch.int64)
    ),
    "A \\[\\] and B": lambda t: set_item(t, first(t, ".A"), torch.zeros((), dtype=torch.float16)),
}
CONCEPT_FAULTS = {
    "wrong base digest": lambda c: c["layers"][next(iter(c["layers"]))].update(base="0" * 64),
    "file version 2, this release reads 1": lambda c: c.update(version=2),
    "malformed: 'index'": lambda c: c.pop("index"),
    "malformed: .*values": lambda c: c.update(tokens=[]),
    "prompt must be a string, got 3": lambda c: c.update(prompt=3),
    "tokens must be lists": lambda c: c.update(tokens={"text_encoder": "<v1>"}),
    "(?s)malformed.*density_init": lambda c: c["config"].update(density_init=7),
    "scale or digest is malformed": lambda c: c["layers"][next(iter(c["layers"]))].update(
        scale=float("inf")
    ),
}
METADATA_FAULTS = {
    "not a STAMINA file": lambda m: m.clear(),
    "malformed": lambda m: m.update(stamina="{"),
}


@pytest.mark.parametrize(
    "message, where, change",
    [(m, "change_tensors", c) for m, c in TENSOR_FAULTS.items()]
    + [(m, "change_concept", c) for m, c in CONCEPT_FAULTS.items()]
    + [(m, "change_metadata", c) for m, c in METADATA_FAULTS.items()],
)
def test_wrong_files_change_nothing(
    pipe, concept, tmp_path, snapshot, assert_same, message, where, change
):
    (file,) = save_stamina_weights(tmp_path, concept)
    rewrite(file, **{where: change})
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        load_stamina_weights(pipe, file)
    assert_same(before, snapshot(pipe))


def test_wrong_models_change_nothing(pipe, concept, tmp_path, snapshot, assert_same):
    (file,) = save_stamina_weights(tmp_path, concept)
    with pytest.raises(TypeError, match="brings the tokens <v1>: pass the pipeline"):
        load_stamina_weights(pipe.unet, file)
    path = next(iter(concept.layers))
    pipe.unet.get_submodule(path).weight.data[0, 0] += 1
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=f"weight of '{path}' is not the one.*wrong base digest"):
        load_stamina_weights(pipe, file)
    assert_same(before, snapshot(pipe))
    load_stamina_weights(pipe, file, verify_base=False)
    missing = replace(concept, name="x", layers={"nowhere.to_k": concept.layers[path]}, tokens={})
    (other,) = save_stamina_weights(tmp_path, replace(missing, digests={"nowhere.to_k": "0" * 64}))
    with pytest.raises(ValueError, match="the model has no module 'nowhere.to_k'"):
        load_stamina_weights(pipe, other)


def test_loading_twice_and_renaming(pipe, concept, tmp_path):
    (file,) = save_stamina_weights(tmp_path, replace(concept, tokens={}))
    load_stamina_weights(pipe, file)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match="'c0' is folded or live already"):
        load_stamina_weights(pipe, file)
    assert all(torch.equal(weights[k], v) for k, v in pipe.unet.state_dict().items())
    load_stamina_weights(pipe, file, "copy", weight=0.0)
    assert list(get_list_stamina(pipe)) == ["c0", "copy"]


def test_token_in_the_vocabulary_already(pipe, concept, tmp_path):
    (file,) = save_stamina_weights(tmp_path, concept)
    add_custom_token(pipe, "<v1>")
    with pytest.raises(ValueError, match="'<v1>' is already in the vocabulary"):
        load_stamina_weights(pipe, file)
    assert get_list_stamina(pipe) == {}


def test_unreadable_files(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_stamina_weights(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_stamina_weights(pipe, tmp_path / "text.safetensors")


@pytest.mark.parametrize("name", ["a/b", "a\0b", "a" * 201])
def test_names_that_no_file_can_have_are_refused_at_once(pipe, learn, snapshot, assert_same, name):
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="adapter_name must be a non-empty string without"):
        learn(pipe, name)
    assert_same(before, snapshot(pipe))


def test_of_several_concepts_none_is_written_where_one_cannot_be(pipe, learn, tmp_path):
    for name in ("a", "pytorch_lora_weights"):
        learn(pipe, name)
        fold_stamina(pipe)
    with pytest.raises(ValueError, match="file must not be named pytorch_lora_weights"):
        save_stamina_weights(tmp_path, pipe)
    assert list(tmp_path.iterdir()) == []
