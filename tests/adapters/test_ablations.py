# SPDX-License-Identifier: Apache-2.0
"""The registry of methods, and STAMINA in eager PyTorch with one part replaced."""

import copy

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from stamina_adapters.training.ablations import ABLATIONS, merged
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.registry import METHODS, SEARCH, describe
from stamina_adapters.training.rivals.masked import MaskedMethod
from stamina_adapters.training.trainer import ContinualTrainer

from stamina_kernels import unpack_bits

SMALL = {"adapter": {"r": 4, "mask_rank": 4}}


def _dataset(seed=0):
    generator = torch.Generator().manual_seed(seed)
    arrays = torch.randint(0, 256, (3, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ConceptDataset([Image.fromarray(array.numpy()) for array in arrays])


def _concept(number=1):
    return ConceptSpec(instance_prompt=f"a photo of <v{number}>", instance_data_dir=".")


def _learn(pipe, method, numbers=(1, 2), **settings):
    config = TrainingConfig(**{"max_train_steps": 6, "train_batch_size": 2, **settings})
    trainer = ContinualTrainer(pipe, method, config)
    return [trainer.learn(_concept(k), _dataset(k)) for k in numbers]


def _masks(state, shapes):
    return {
        key.removesuffix(".bits"): unpack_bits(bits, shapes[key.removesuffix(".bits")])
        for key, bits in state.items()
        if key.endswith(".bits")
    }


def test_every_method_is_described_and_searched_alike():
    assert METHODS.keys() == SEARCH.keys()
    assert len({len(trials) for trials in SEARCH.values()}) == 1
    for name, trials in SEARCH.items():
        assert "Source: " in describe(name)
        assert all(trial not in trials[:k] for k, trial in enumerate(trials))
        for trial in trials:
            assert METHODS[name](trial).settings()
    with pytest.raises(KeyError):
        describe("no such method")


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_refused(name):
    with pytest.raises(ValidationError):
        METHODS[name]({"no_such_setting": 1})
    if name == "stamina" or name in ABLATIONS:
        for group in ("adapter", "token", "training"):
            with pytest.raises(ValidationError):
                METHODS[name]({group: {"no_such_setting": 1}})


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_of_the_settings_it_is_given(pipe, name):
    tuned = merged(SMALL, {"training": {"forget_weight": 3.0, "hard_fraction": 0.4}})
    kept = copy.deepcopy(tuned)
    method = METHODS[name](tuned)
    assert tuned == kept
    settings = method.settings()
    settings = settings.get("stamina", settings)
    for group, values in merged(tuned, ABLATIONS[name].changes).items():
        for key, value in values.items():
            assert settings[group][key] == value
    (_, log), _ = _learn(pipe, method, max_train_steps=3)
    assert len(log.steps) == 3


def test_what_a_method_sets_goes_before_the_run(pipe):
    method = METHODS["ablation-no-hard-phase"](SMALL)
    config = TrainingConfig(max_train_steps=6, train_batch_size=2, hard_fraction=0.5)
    modes = []

    def note(report):
        modes.append({layer.hard for layer in method._layers.values()})

    ContinualTrainer(pipe, method, config).learn(_concept(), _dataset(), note)
    assert modes == [{False}] * 6


@pytest.mark.parametrize("generator", ["embedding_mlp", "free"])
def test_eager_stamina_is_stamina(stock_pipe, pipe, generator):
    """So an ablation that replaces one part differs in nothing else: bits, schedules, rates."""
    other = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
    settings = merged(SMALL, {"adapter": {"mask_generator": generator}})
    run = {"forget_weight": 1e6, "sparse_start": 0.0, "target_density": 0.5}
    ours = _learn(pipe, METHODS["stamina"](settings), max_train_steps=10, **run)
    eager = _learn(other, MaskedMethod.build({"stamina": settings}), max_train_steps=10, **run)
    for (state, log), (tensors, same) in zip(ours, eager, strict=True):
        for a, b in zip(log.steps, same.steps, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert log.densities == pytest.approx(same.densities, abs=0.01)
        shapes = {path: adapter.B.shape[1] for path, adapter in state.layers.items()}
        for path, mask in _masks(tensors, shapes).items():
            known = unpack_bits(state.layers[path].bits, shapes[path])
            assert (mask != known).float().mean() < 0.01
    moved = difference = 0.0
    start, found = stock_pipe.unet.state_dict(), other.unet.state_dict()
    for key, weight in pipe.unet.state_dict().items():
        moved += (weight - start[key]).square().sum().item()
        difference += (weight - found[key]).square().sum().item()
    assert moved > 0
    # factors are committed in fp16 (2^-11); a logit at the threshold may fall on either side
    assert difference**0.5 < 0.02 * moved**0.5


def test_disjoint_masks_share_no_weight_and_pay_no_forgetting_term(pipe):
    training = {"sparse_weight": 0.0, "preserve_weight": 0.0, "forget_weight": 1e6}
    method = METHODS["ablation-disjoint"](merged(SMALL, {"training": training}))
    seen = []
    penalty = method.penalty

    def watched():
        value = penalty()
        seen.append(None if value is None else value.item())
        return value

    method.penalty = watched
    states = [state for state, _ in _learn(pipe, method, numbers=(1, 2, 3))]
    shapes = {
        key.removesuffix(".B"): tensor.shape[1]
        for key, tensor in states[0].items()
        if key.endswith(".B")
    }
    masks = [_masks(state, shapes) for state in states]
    for path in shapes:
        assert not (masks[0][path] & masks[1][path]).any()
        assert not ((masks[0][path] | masks[1][path]) & masks[2][path]).any()
        assert masks[0][path].any()
    assert set(seen[6:]) == {0.0}


def test_a_soft_mask_is_folded_as_it_was_trained(stock_pipe, pipe):
    ((state, log),) = _learn(pipe, METHODS["ablation-soft-mask"](SMALL), numbers=(1,))
    start = stock_pipe.unet.state_dict()
    for key, weight in pipe.unet.state_dict().items():
        path = key.removesuffix(".weight")
        if f"{path}.mask" in state:
            D = state[f"{path}.mask"] * (state[f"{path}.A"] @ state[f"{path}.B"])
            assert torch.equal(weight, start[key] + D)
            assert log.densities[path] == pytest.approx(state[f"{path}.mask"].mean().item())
    assert log.probes[-1].sampled == log.probes[-1].committed


def test_one_mlp_serves_all_layers(pipe):
    method = METHODS["ablation-shared-mlp"](SMALL)
    config = TrainingConfig(max_train_steps=2, train_batch_size=2)
    pipe.unet.requires_grad_(False)
    groups = method.attach(pipe, _concept(), config)
    mask = groups[1]["params"]
    assert len(mask) == len({id(p) for p in mask}) == 4 + 3 * len(method._layers)
    # b = logit(0.7) = 0.85 is passed by four fifths of logits of unit standard deviation
    for path, density in method.densities().items():
        assert density == pytest.approx(0.8, abs=0.2), path
