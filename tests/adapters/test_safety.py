# SPDX-License-Identifier: Apache-2.0
"""What other code does to an adapted model either works as on a stock model or raises by name."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stamina_adapters import (
    StaminaConfig,
    add_custom_token,
    apply_stamina,
    delete_stamina,
    fold_concepts,
    fold_stamina,
    fuse_stamina,
    get_list_stamina,
    load_stamina_weights,
    read_stamina_weights,
    save_stamina_weights,
    stamina_eval,
    stamina_statistics,
    unload_stamina,
)
from stamina_adapters.linear import project_together
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured


def first_layer(pipe, paths):
    return pipe.unet.get_submodule(paths[0])


def test_a_weight_changed_after_folding_is_not_dropped_in_silence(pipe, learn):
    paths = learn(pipe, "a")
    fold_stamina(pipe)
    with torch.no_grad():
        first_layer(pipe, paths).weight.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed since its concepts were folded"):
        apply_stamina(pipe, StaminaConfig(r=3), "b")
    assert list(get_list_stamina(pipe)) == ["a"]


def test_casting_a_folded_model_is_no_change(pipe, learn):
    learn(pipe, "a")
    fold_stamina(pipe)
    pipe.unet.half()
    learn(pipe, "b")
    fold_stamina(pipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m[1], "weight", m[0].weight), r"target '0' shares its weight: 0, 1"),
        (lambda m: m.double(), "must have a contiguous fp32, bf16 or fp16 weight"),
        (lambda m: setattr(m[0].weight, "data", torch.randn(8, 8).t()), "strides"),
        (lambda m: l1_unstructured(m[0], "weight", 0.5), "'0' has a weight that is no Parameter"),
        (lambda m: weight_norm(m[0]), "no Parameter|'0' is ParametrizedLinear"),
    ],
)
def test_a_weight_that_cannot_be_folded_is_refused_at_once(learn, change, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    learn(model, target_modules=("0", "1"))
    concept = fold_stamina(model)
    unload_stamina(model)
    change(model)
    kinds, before = [type(layer) for layer in model], copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=message):
        apply_stamina(model, StaminaConfig(r=2, target_modules=("0", "1")))
    with pytest.raises(TypeError, match=message):
        fold_concepts(model, [concept], verify_base=False)
    assert [type(layer) for layer in model] == kinds
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_outputs_may_be_changed_in_place():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    apply_stamina(model, StaminaConfig(r=2, target_modules=("0",)))
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].A.grad.abs().max() > 0


def test_statistics_of_a_fused_adapter_raise(pipe, learn):
    learn(pipe)
    fuse_stamina(pipe)
    with pytest.raises(RuntimeError, match="the adapter is fused, call unfuse_stamina first"):
        stamina_statistics(pipe)


def test_delete_that_raises_changes_nothing(pipe, learn, snapshot, assert_same):
    learn(pipe, "a")
    add_custom_token(pipe, "<v1>")
    fold_stamina(pipe)
    pipe.fuse_qkv_projections()
    before = snapshot(pipe)
    with pytest.raises(RuntimeError, match="call unfuse_qkv_projections first"):
        delete_stamina(pipe, "a")
    assert_same(before, snapshot(pipe))
    assert list(get_list_stamina(pipe)) == ["a"]


def test_folding_inside_stamina_eval_leaves_plain_layers(pipe, learn):
    paths = learn(pipe)
    with stamina_eval(pipe):
        fold_stamina(pipe)
    assert "hard" not in vars(first_layer(pipe, paths))


def test_names_cannot_leave_the_folder_that_concepts_are_saved_to(pipe, learn, tmp_path):
    learn(pipe)
    (file,) = save_stamina_weights(tmp_path / "c0.safetensors", fold_stamina(pipe))
    with pytest.raises(ValueError, match="adapter_name must be a non-empty string without '/'"):
        load_stamina_weights(pipe, file, adapter_name="../evil")
    with pytest.raises(ValueError, match="adapter_name must be"):
        apply_stamina(pipe, StaminaConfig(r=2), "a/b")


@pytest.mark.parametrize(("key", "value"), [("index", "zero"), ("index", -1), ("name", "../evil")])
def test_a_file_with_a_malformed_header_is_refused(pipe, learn, tmp_path, key, value):
    learn(pipe)
    (file,) = save_stamina_weights(tmp_path / "c0.safetensors", fold_stamina(pipe))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    (entry,) = (k for k, text in metadata.items() if text.startswith("{"))
    metadata[entry] = json.dumps(json.loads(metadata[entry]) | {key: value})
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="index must be|adapter_name must be"):
        read_stamina_weights(file)


def test_layers_that_are_wrapped_or_hooked_are_called_as_they_are(pipe, learn):
    paths = learn(pipe)
    attention = pipe.unet.get_submodule(paths[0].rpartition(".")[0])
    x = torch.randn(1, 5, attention.to_k.in_features, requires_grad=True)
    seen = []
    handle = attention.to_k.register_full_backward_hook(lambda *_: seen.append("backward"))
    sum(y.sum() for y in project_together([attention.to_k, attention.to_v], x)).backward()
    handle.remove()
    original = attention.to_v.forward
    attention.to_v.forward = lambda value: seen.append("forward") or original(value)
    project_together([attention.to_k, attention.to_v], x)
    assert seen == ["backward", "forward"]
