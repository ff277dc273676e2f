# SPDX-License-Identifier: Apache-2.0
"""The term that keeps earlier prompts' keys and values."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from stamina_adapters import apply_stamina, linear, load_stamina_weights, set_stamina_mask_mode
from stamina_adapters.config import StaminaConfig
from stamina_adapters.files import concept_from_bytes, concept_to_bytes
from stamina_adapters.linear import changes_together
from stamina_adapters.training import preservation
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.methods import StaminaMethod
from stamina_adapters.training.preservation import (
    Preservation,
    earlier_prompts,
    encode,
    factor,
    preconditioner,
)
from stamina_adapters.training.rivals.masked import MaskedMethod
from stamina_adapters.training.trainer import ContinualTrainer

ADAPTER = StaminaConfig(r=4, mask_rank=4)
METHODS = (
    lambda: StaminaMethod(ADAPTER),
    lambda: MaskedMethod.build({"stamina": {"adapter": {"r": 4, "mask_rank": 4}}}),
)


def _concept(number):
    return ConceptSpec(instance_prompt=f"a photo of <v{number}>", instance_data_dir=".")


def _dataset(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = torch.randint(0, 256, (3, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ConceptDataset([Image.fromarray(array.numpy()) for array in arrays])


def _config(**settings):
    return TrainingConfig(**{"max_train_steps": 6, "train_batch_size": 2, **settings})


def _spoken(prompt):
    return ConceptSpec(instance_prompt=prompt, instance_data_dir=".")


def _watched(monkeypatch):
    """A list that holds the prompts held for the concept that is learned, once it is attached."""
    held = []

    def watched(pipe, prompts):
        held[:] = prompts
        return encode(pipe, prompts)

    monkeypatch.setattr(preservation, "encode", watched)
    return held


def _loaded(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()  # mapped from a file they are not aligned: other sums
    return pipe


def _without_prompts(state):
    """A method's state as it was before prompts were kept."""
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("prompt/")}
    for key, tensor in kept.items():
        if key.startswith("concept/"):
            concept = concept_from_bytes(tensor.numpy().tobytes(), key)
            data = bytearray(concept_to_bytes(replace(concept, prompt=None)))
            kept[key] = torch.frombuffer(data, dtype=torch.uint8)
    return kept


def _held(pipe, layers, **settings):
    config = _config(**{"precondition": 0.0, **settings})
    return Preservation(pipe, _concept(9), layers, config, {})


def _learn(pipe, method, *numbers, **settings):
    trainer = ContinualTrainer(pipe, method, _config(**settings))
    return [trainer.learn(_concept(n), _dataset(n))[1] for n in numbers]


def _adapted(pipe):
    """The layers of a live adapter that is not zero, in the mode whose masks are fixed."""
    paths = apply_stamina(pipe, ADAPTER, adapter_name="live")
    set_stamina_mask_mode(pipe, "hard")
    layers = {path: pipe.unet.get_submodule(path) for path in paths}
    generator = torch.Generator().manual_seed(5)
    for layer in layers.values():
        layer.A.data.normal_(generator=generator)
    return layers


def _changes(layers):
    return lambda paths, H: changes_together([layers[path] for path in paths], H)


def _dense(layer):
    """D in fp64."""
    U, V, b = layer.mask()
    return ((U @ V + b > 0) * (layer.A @ layer.B)).double().detach()


def test_prompts_are_those_of_all_added_words(pipe):
    assert earlier_prompts(pipe, _concept(1), {}) == {"": 1.0}
    _learn(pipe, StaminaMethod(ADAPTER), 3, 1)
    other = _spoken("a night <v2> photo")
    todays = ["", "a night <v3> photo", "a night <v1> photo"]
    assert earlier_prompts(pipe, other, {}) == dict.fromkeys(todays, 1.0)
    # the prompt that a word was learned with takes half of the share, unless it is the same
    own = {"<v3>": "<v3> by day", "<v1>": "a  night <v1> photo ", "<gone>": "a <gone>"}
    assert earlier_prompts(pipe, other, own) == {
        "": 1.0, "<v3> by day": 0.5, "a night <v3> photo": 0.5, "a night <v1> photo": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("build", METHODS)
def test_a_concept_is_held_in_the_prompt_it_was_learned_with(pipe, build, tmp_path, monkeypatch):
    trainer = ContinualTrainer(pipe, build(), _config())
    trainer.learn(_spoken("a photo of <v1>"), _dataset(1))
    held = _watched(monkeypatch)
    trainer.learn(_spoken("<v2> at night"), _dataset(2))
    assert held == ["", "a photo of <v1>", "<v1> at night"]
    pipe.save_pretrained(tmp_path)
    state = trainer.method.state_dict()
    trainer.learn(_spoken("<v3>"), _dataset(3))
    assert held == ["", "a photo of <v1>", "<v1>", "<v2> at night", "<v2>"]

    resumed = ContinualTrainer(_loaded(tmp_path), build(), _config())
    resumed.method.load_state_dict(resumed.pipe, state)
    resumed.learn(_spoken("<v3>"), _dataset(3))
    assert held == ["", "a photo of <v1>", "<v1>", "<v2> at night", "<v2>"]


def test_a_concepts_file_knows_its_prompt(pipe, pipe_of, tmp_path, monkeypatch):
    other, method = pipe_of(pipe), StaminaMethod(ADAPTER)
    state, _ = ContinualTrainer(pipe, method, _config()).learn(_concept(1), _dataset(1))
    method.save(state, tmp_path / "v1.safetensors")
    load_stamina_weights(other, tmp_path / "v1.safetensors")
    held = _watched(monkeypatch)
    learner = ContinualTrainer(other, StaminaMethod(ADAPTER), _config())
    learner.learn(_spoken("<v2> at night"), _dataset(2))
    assert held == ["", "a photo of <v1>", "<v1> at night"]


@pytest.mark.parametrize("build", METHODS)
def test_prompts_of_one_template_give_the_bits_of_a_state_without_them(pipe, build, tmp_path):
    """A state of before prompts were kept goes on, as it did then."""
    trainer = ContinualTrainer(pipe, build(), _config())
    for number in (1, 2):
        trainer.learn(_concept(number), _dataset(number))
    pipe.save_pretrained(tmp_path)
    state = trainer.method.state_dict()
    bits = []
    for known in (state, _without_prompts(state)):
        resumed = ContinualTrainer(_loaded(tmp_path), build(), _config())
        resumed.method.load_state_dict(resumed.pipe, known)
        resumed.learn(_concept(3), _dataset(3))
        bits.append(resumed.pipe.unet.state_dict())
    assert all(torch.equal(bits[0][key], bits[1][key]) for key in bits[0])


def test_the_factor_keeps_the_energy_of_every_direction():
    states = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    H = factor(states, [1.0] * len(states))
    D = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    expected = torch.einsum("oi,kji->kjo", D, states).square().sum(-1).mean(1).sum()
    # two chains of 12 fp32 products, and a rank of at most 12
    torch.testing.assert_close((H @ D.t()).square().sum(), expected, rtol=1e-5, atol=0)
    assert H.shape == (12, 12)
    halves = factor(states[[0, 0, 1]], [0.5, 0.5, 1.0])
    torch.testing.assert_close(halves.t() @ halves, _gram(states[:2]).float(), rtol=0, atol=1e-5)
    assert len(factor(states[:1, :3], [1.0])) == 3


def test_the_term_is_the_relative_change_of_keys_and_values(pipe):
    _learn(pipe, StaminaMethod(ADAPTER), 1, 2, preserve_weight=0.0)
    states = encode(pipe, ["", "a photo of <v1>", "a photo of <v2>"]).double()
    layers = _adapted(pipe)
    expected = torch.zeros((), dtype=torch.float64)
    for layer in layers.values():
        size = (states @ layer.weight.double().t()).square().sum(-1).mean()
        drift = (states @ _dense(layer).t()).square().sum(-1).mean(1).sum()
        expected += 3.0 / len(layers) * drift / size
    preservation = _held(pipe, layers, preserve_weight=3.0)
    term = preservation.term(_changes(layers))
    # y - x W^T cancels: D is as large as W here, so a few fp32 roundings of either
    torch.testing.assert_close(term.double(), expected, rtol=1e-4, atol=0)


def test_its_gradient_is_that_of_the_dense_formula(pipe):
    layers = _adapted(pipe)
    preservation = _held(pipe, layers, preserve_weight=3.0)
    preservation.term(_changes(layers)).backward()
    states = encode(pipe, [""])
    for layer in layers.values():
        layer.forget_weight.fill_(1e6)  # the penalties of the layer have no part in it
        layer.sparse_weight.fill_(1e6)
        A = layer.A.detach().double().requires_grad_()
        U, V, b = layer.mask()
        D = (U @ V + b > 0).double() * (A @ layer.B.detach().double())
        size = (states @ layer.weight.t()).square().sum(-1).mean().item()
        drift = (states.double() @ D.t()).square().sum(-1).mean(1).sum()
        (3.0 / len(layers) / size * drift).backward()
        error = (layer.A.grad - A.grad).norm() / A.grad.norm()
        assert error < 1e-4  # y - x W^T cancels, see above


def test_penalties_of_the_layer_take_no_part(pipe):
    layers = _adapted(pipe)
    layer = next(iter(layers.values()))
    grads = []
    for weight in (0.0, 1e6):
        layer.forget_weight.fill_(weight)
        layer.sparse_weight.fill_(weight)
        layer.zero_grad()
        changes_together([layer], torch.ones(2, layer.in_features))[0].sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for free, penalised in zip(*grads, strict=True):
        assert torch.equal(free, penalised)


def test_layers_that_fit_share_a_launch_whatever_they_are(pipe, monkeypatch):
    layers = list(_adapted(pipe).values())
    x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(1))
    alone = [changes_together([layer], x)[0] for layer in layers]
    launches = []
    operator = linear.masked_linear

    def counted(x, group, **settings):
        launches.append(sum(p.weight.numel() for p in group))
        return operator(x, group, **settings)

    monkeypatch.setattr(linear, "masked_linear", counted)
    # one layer apart from the others, in the middle of them
    layers[1].hard = False
    expected = [*alone[:1], changes_together([layers[1]], x)[0], *alone[2:]]
    launches.clear()
    for got, wanted in zip(changes_together(layers, x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert len(launches) == 3
    limit = max(layer.weight.numel() for layer in layers)
    monkeypatch.setattr(linear, "_MOST_WEIGHTS", limit)
    launches.clear()
    changes_together(layers, x)
    assert max(launches) <= limit and len(launches) > 3


def test_layers_outside_of_cross_attention_take_no_part(pipe):
    config = StaminaConfig(r=4, mask_rank=4, target_modules=("attn1.to_k", "attn2.to_k"))
    paths = apply_stamina(pipe, config, adapter_name="live")
    layers = {path: pipe.unet.get_submodule(path) for path in paths}
    seen = []

    def changes(paths, H):
        seen.extend(paths)
        return _changes(layers)(paths, H)

    _held(pipe, layers, preserve_weight=1.0).term(changes)
    assert seen == [path for path in paths if "attn2" in path]
    assert len(seen) < len(paths)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_weight_is_no_term(pipe, weight):
    layers = _adapted(pipe) if weight == 0 else {}
    assert _held(pipe, layers, preserve_weight=weight).term(_changes(layers)) is None


def test_a_large_weight_keeps_the_pictures_of_earlier_prompts(pipe, render):
    drift = {}
    for weight in (0.0, 1e3):
        own = copy.deepcopy(pipe)
        own.set_progress_bar_config(disable=True)
        _learn(own, StaminaMethod(ADAPTER), 1, preserve_weight=0.0)
        before = render(own, "a photo of <v1>")
        _learn(own, StaminaMethod(ADAPTER), 2, preserve_weight=weight, learning_rate=0.02)
        drift[weight] = (render(own, "a photo of <v1>") - before).abs().mean().item()
    assert drift[1e3] < 0.2 * drift[0.0]


def test_the_eager_mechanism_adds_the_same_term(pipe):
    logs = []
    for build in METHODS:
        own = copy.deepcopy(pipe)
        own.set_progress_bar_config(disable=True)
        settings = {"forget_weight": 0.0, "sparse_weight": 0.0, "preserve_weight": 5.0}
        logs.append(_learn(own, build(), 1, **settings)[0])
    ours, eager = ([step.penalty for step in log.steps] for log in logs)
    assert ours == pytest.approx(eager, rel=1e-3)
    assert ours[-1] > 0


def _gram(states):
    wide = states.double()
    return torch.einsum("kji,kjc->ic", wide, wide) / states.shape[1]


@pytest.mark.parametrize("strength", [0.0, 10.0])
def test_the_preconditioner_is_the_inverse_root_of_the_formula(pipe, strength):
    _learn(pipe, StaminaMethod(ADAPTER), 1, 2)
    states = encode(pipe, ["", "a photo of <v1>", "a photo of <v2>"])
    gram = _gram(states)
    eye = torch.eye(len(gram), dtype=torch.float64)
    inverse = eye + strength * gram * (3 / gram.trace())
    C = preconditioner(factor(states, [1.0] * 3), 3, strength).double()
    # C is rounded to fp32 once; its condition number is below sqrt(1 + 3 strength)
    torch.testing.assert_close(C @ C @ inverse, eye, rtol=0, atol=1e-4)


def test_the_operator_and_the_committed_factors_take_the_preconditioned_factor(pipe):
    layers = _adapted(pipe)
    _held(pipe, layers, precondition=10.0)
    for layer in layers.values():
        B = (layer.B @ layer.preconditioner).detach()
        assert not torch.allclose(B, layer.B)
        U, V, b = layer.mask()
        D = ((U @ V + b > 0) * (layer.A @ B)).double().detach()
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        expected = x.double() @ D.t()
        # y - x W^T cancels, see above
        (change,) = changes_together([layer], x)
        torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-4)
        adapter = layer.commit()
        committed = adapter.B.double() * 2.0 ** adapter.exponent[1]
        # fp16 once, relative to the largest element of the factor
        assert (committed - B.double()).abs().max() <= 2.0**-11 * B.abs().max()
        layer.detach()
        assert not hasattr(layer, "preconditioner")


@pytest.mark.parametrize("C", [torch.eye(3), torch.eye(40, dtype=torch.float64)])
def test_a_preconditioner_that_does_not_fit_is_refused(pipe, C):
    layer = next(iter(_adapted(pipe).values()))
    with pytest.raises(ValueError, match=r"C must be \(40, 40\) in float32, got"):
        layer.set_preconditioner(C)
    assert layer.preconditioner is None


def test_small_changes_are_seen_in_16_bits(pipe):
    layers = list(_adapted(pipe).values())
    pipe.unet.bfloat16()
    x = torch.randn(5, layers[0].in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer in layers:
        layer.A.data.mul_(1e-4)  # far below the last place of W
    for layer, change in zip(layers, changes_together(layers, x), strict=True):
        U, V, b = (t.detach().double() for t in layer.mask())
        product = layer.A.detach().double() @ layer.B.detach().double()
        expected = x.double() @ (layer.scale * (U @ V + b > 0) * product).T
        # D and the result are rounded to bf16 once each, 2^-9 of their sizes at most
        assert (change.double() - expected).norm() <= 3 * 2**-9 * expected.norm()


def test_projections_of_pictures_take_no_part(pipe):
    adapter = ADAPTER.model_copy(update={"target_modules": ("attn2.to_q", "attn2.to_out.0")})
    (log,) = _learn(pipe, StaminaMethod(adapter), 1)
    assert len(log.steps) == 6
    assert all(step.penalty is None for step in log.steps)
