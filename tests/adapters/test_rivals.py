# SPDX-License-Identifier: Apache-2.0
"""Rival methods: what each may change, its formulas against dense ones, resuming after a stop."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from stamina_adapters import unfold_stamina
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset
from stamina_adapters.training.registry import METHODS
from stamina_adapters.training.rivals.c_lora import CLoRA
from stamina_adapters.training.rivals.ewc import EWC
from stamina_adapters.training.rivals.orthogonal import OrthogonalAdaptation
from stamina_adapters.training.rivals.sd_lora import SDLoRA
from stamina_adapters.training.trainer import ContinualTrainer

SMALL = {"r": 4}
STAMINA = {"adapter": {"r": 4, "mask_rank": 4}}
SETTINGS = {
    "stamina": STAMINA,
    "textual-inversion": {},
    "lora": SMALL,
    "lora-merge": SMALL,
    "custom-diffusion": {},
    "ewc": {"fisher_samples": 2},
    "c-lora": SMALL,
    "orthogonal": SMALL,
    "sd-lora": SMALL,
    "ablation-no-mask": STAMINA,
    "ablation-soft-mask": STAMINA,
    "ablation-disjoint": STAMINA,
    "ablation-shared-mlp": STAMINA,
}
RIVALS = [name for name in SETTINGS if name != "stamina" and "ablation" not in name]


def _dataset(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    arrays = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ConceptDataset([Image.fromarray(array.numpy()) for array in arrays])


def _concept(number=1):
    return ConceptSpec(instance_prompt=f"a photo of <v{number}>", instance_data_dir=".")


def _config(**settings):
    return TrainingConfig(**{"max_train_steps": 4, "train_batch_size": 2, **settings})


def _trainer(pipe, name, overrides=None, **settings):
    method = METHODS[name]({**SETTINGS[name], **(overrides or {})})
    return ContinualTrainer(pipe, method, _config(**settings))


def _bits(pipe):
    return {
        f"{part}.{key}": tensor.clone()
        for part in ("unet", "text_encoder")
        for key, tensor in getattr(pipe, part).state_dict().items()
    }


def _adapted(bits):
    return {key: tensor for key, tensor in bits.items() if ".attn2.to_" in key}


def _attach(method, pipe, number=1):
    pipe.unet.requires_grad_(False)
    return method.attach(pipe, _concept(number), _config())


def _randomise(method, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in method._layers.values():
            for parameter in layer.delta.factors():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_concept_changes_what_it_may_and_leaves_a_stock_pipeline(stock_pipe, pipe, name):
    before = _bits(stock_pipe)
    types = {path: type(module) for path, module in pipe.unet.named_modules()}
    state, log = _trainer(pipe, name).learn(_concept(), _dataset())
    after = _bits(pipe)
    assert {path: type(module) for path, module in pipe.unet.named_modules()} == types
    assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding
    assert after.keys() == before.keys()
    table = next(key for key in before if "token_embedding" in key)
    assert torch.equal(after[table][:-1], before[table])
    assert len(after[table]) == len(before[table]) + 1
    changed = {k for k in before if k != table and not torch.equal(before[k], after[k])}
    if name == "textual-inversion":
        assert not changed
    else:
        assert changed
        assert all(".attn2.to_k." in key or ".attn2.to_v." in key for key in changed)
    assert log.token == "<v1>"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_falls(pipe, name):
    # hard from the first step, so that there is a probe before anything is learned
    trainer = _trainer(pipe, name, max_train_steps=40, hard_fraction=1.0, sparse_weight=0.0)
    _, log = trainer.learn(_concept(), _dataset(count=1))
    first, last = log.probes
    assert first.step == 0
    assert last.committed < first.committed


@pytest.mark.parametrize("name", SETTINGS)
def test_another_process_goes_on_with_the_same_bits(stock_pipe, pipe, tmp_path, name):
    trainer = _trainer(pipe, name)
    trainer.learn(_concept(1), _dataset(1))
    trainer.learn(_concept(2), _dataset(2))
    save_file(trainer.method.state_dict(), tmp_path / "state.safetensors")
    # the stock class saves whatever is left of an unfinished adapter, or refuses
    pipe.save_pretrained(tmp_path / "model")
    trainer.learn(_concept(3), _dataset(3))

    other = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    for part in (other.unet, other.vae, other.text_encoder):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data = tensor.data.clone()  # mapped from a file they are not aligned: other sums
    resumed = _trainer(other, name)
    resumed.method.load_state_dict(other, load_file(tmp_path / "state.safetensors"))
    resumed.learn(_concept(3), _dataset(3))
    expected, found = _bits(pipe), _bits(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    again = trainer.method.state_dict()
    for key, tensor in resumed.method.state_dict().items():
        assert torch.equal(tensor, again[key]), key


def test_a_resumed_stamina_unfolds_earlier_concepts_exactly(stock_pipe, pipe, tmp_path):
    trainer = _trainer(pipe, "stamina")
    trainer.learn(_concept(1), _dataset(1))
    state = trainer.method.state_dict()
    pipe.save_pretrained(tmp_path)
    other = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    resumed = METHODS["stamina"](STAMINA)
    resumed.load_state_dict(other, state)
    unfold_stamina(other, "v1")
    before, after = _adapted(_bits(stock_pipe)), _adapted(_bits(other))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_staminas_state_is_checked_before_anything_changes(stock_pipe, pipe):
    trainer = _trainer(pipe, "stamina")
    trainer.learn(_concept(1), _dataset(1))
    state = trainer.method.state_dict()
    method = METHODS["stamina"](STAMINA)
    with pytest.raises(RuntimeError, match="has the concepts v1 already"):
        method.load_state_dict(pipe, state)

    reloaded = copy.deepcopy(stock_pipe.unet)
    reloaded.load_state_dict(pipe.unet.state_dict())
    pipe.unet = reloaded
    first = next(key for key in state if key.startswith("initial/"))
    missing = {key: tensor for key, tensor in state.items() if key != first}
    other = {**state, first: state[first] + 1}
    cut = {**state, "concept/000000": state["concept/000000"][:-9]}
    for wrong, message in (
        (missing, "initial has no weight for"),
        (other, "'v1' was learned on another"),
        (cut, "concept/000000: not readable as safetensors"),
        ({**state, "more": state[first]}, "the state is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            method.load_state_dict(pipe, wrong)
        assert "_stamina_state" not in pipe.unet.__dict__
    method.load_state_dict(pipe, state)


def test_a_state_before_the_first_concept_is_a_beginning(pipe):
    for name, settings in SETTINGS.items():
        state = METHODS[name](settings).state_dict()
        METHODS[name](settings).load_state_dict(pipe, state)


@pytest.mark.parametrize("name", ["stamina", "lora", "ewc", "sd-lora"])
def test_a_state_of_something_else_is_refused(stock_pipe, pipe, name):
    trainer = _trainer(pipe, name)
    trainer.learn(_concept(1), _dataset(1))
    other = "lora-merge" if name == "lora" else "lora"
    state = trainer.method.state_dict()
    with pytest.raises(ValueError, match="the state is not one of"):
        METHODS[other]({}).load_state_dict(pipe, state)
    pipe.unet = copy.deepcopy(stock_pipe.unet)
    with pytest.raises(ValueError, match="not the fold of|does not belong to"):
        METHODS[name](SETTINGS[name]).load_state_dict(pipe, state)


def test_c_lora_penalises_where_earlier_concepts_changed_the_weights(stock_pipe, pipe):
    method = CLoRA.build({"r": 3, "forget_weight": 7.0})
    for number in (1, 2):
        _attach(method, pipe, number)
        assert (method.penalty() is None) == (number == 1)
        _randomise(method, number)
        method.finish()
    before, now = _adapted(_bits(stock_pipe)), _adapted(_bits(pipe))
    _attach(method, pipe, 3)
    assert method.penalty().item() == 0
    _randomise(method, 3)
    expected = 0.0
    for path, layer in method._layers.items():
        key = f"unet.{path}.weight"
        change = (now[key].double() - before[key].double()).abs()
        D = layer.delta.A.double() @ layer.delta.B.double()
        expected += 7.0 * (change * D).square().sum()
    # W in fp32 holds S with an error of an ulp of W; S is about 0.1 of it
    torch.testing.assert_close(method.penalty().double(), expected, rtol=1e-5, atol=0)
    method.penalty().backward()
    assert all(layer.delta.A.grad.any() for layer in method._layers.values())


def test_ewc_is_one_quadratic_for_each_earlier_concept(pipe):
    method = EWC.build({"fisher_weight": 5.0, "fisher_samples": 3})
    anchors, fishers = [], []
    for number in (1, 2, 3):
        _attach(method, pipe, number)
        assert (method.penalty() is None) == (number == 1)
        _randomise(method, number)
        generator = torch.Generator().manual_seed(number)
        slopes = []

        def loss(slopes=slopes, generator=generator):
            deltas = {path: layer.delta.D for path, layer in method._layers.items()}
            slope = {p: torch.randn(D.shape, generator=generator) for p, D in deltas.items()}
            slopes.append(slope)
            return sum((slope[path] * D).sum() for path, D in deltas.items())

        method.consolidate(loss)
        assert len(slopes) == 3
        paths = list(method._layers)
        fishers.append({p: sum(s[p].double() ** 2 for s in slopes) / 3 for p in paths})
        method.finish()
        weights = {p: pipe.unet.get_submodule(p).weight.double().clone() for p in paths}
        anchors.append(weights)
    _attach(method, pipe, 4)
    _randomise(method, 4)
    expected = 0.0
    for path, layer in method._layers.items():
        theta = layer.weight.double() + layer.delta.D.double()
        for anchor, fisher in zip(anchors, fishers, strict=True):
            expected += 2.5 * (fisher[path] * (theta - anchor[path]) ** 2).sum()
    torch.testing.assert_close(method.penalty().double(), expected.detach(), rtol=1e-5, atol=0)
    method.penalty().backward()
    for path, layer in method._layers.items():
        theta = layer.weight.double() + layer.delta.D.double()
        slope = sum(
            5.0 * f[path] * (theta - a[path]) for a, f in zip(anchors, fishers, strict=True)
        )
        torch.testing.assert_close(layer.delta.D.grad.double(), slope, rtol=1e-4, atol=1e-6)


def test_fisher_information_comes_from_single_latents(pipe, monkeypatch):
    seen = []
    trainer = _trainer(pipe, "ewc", {"fisher_samples": 5})
    draw = trainer._draw
    monkeypatch.setattr(
        trainer, "_draw", lambda latents, g, n=None: seen.append(n) or draw(latents, g, n)
    )
    trainer.learn(_concept(), _dataset())
    assert seen.count(1) == 5
    assert all(F.min() >= 0 and F.max() > 0 for F in trainer.method._carried["fisher"].values())


def test_orthogonal_concepts_read_orthogonal_subspaces(pipe):
    method = OrthogonalAdaptation.build({"r": 8})  # five concepts fill the 40 inputs
    factors = []
    for number in range(6):
        _attach(method, pipe, number)
        layer = next(iter(method._layers.values()))
        assert [p.shape for p in layer.delta.factors()] == [layer.delta.A.shape]
        factors.append(layer.delta.B.detach().clone())
        _randomise(method, number)
        method.finish()
    eye = torch.eye(40)
    together = torch.cat(factors[:5])
    # rows rounded once to fp32: 40 products with an error of 2^-25 each
    torch.testing.assert_close(together @ together.t(), eye, rtol=0, atol=1e-6)
    overlap = torch.linalg.matrix_norm(factors[5] @ factors[0].t()) / 8**0.5
    assert 0 < overlap < 1
    with pytest.raises(ValueError, match="r must be at most 40"):
        _attach(OrthogonalAdaptation.build({"r": 41}), pipe, 9)


@pytest.mark.parametrize("name", ["lora-merge", "orthogonal"])
def test_merged_deltas_are_learned_alone_and_summed(stock_pipe, pipe, name):
    initial = _adapted(_bits(stock_pipe))
    trainer = _trainer(pipe, name)

    def alone(report):
        for path, layer in trainer.method._layers.items():
            assert torch.equal(layer.weight, initial[f"unet.{path}.weight"])

    states = [trainer.learn(_concept(k), _dataset(k), alone)[0] for k in (1, 2, 3)]
    for key, weight in _adapted(_bits(pipe)).items():
        path = key.removeprefix("unet.").removesuffix(".weight")
        if ".to_k" in path or ".to_v" in path:
            change = sum(state[f"{path}.A"] @ state[f"{path}.B"] for state in states)
            assert change.any()
            assert torch.equal(weight, initial[key] + change)


def test_sequential_lora_learns_on_what_was_learned(stock_pipe, pipe):
    trainer = _trainer(pipe, "lora")
    trainer.learn(_concept(1), _dataset(1))
    between = _adapted(_bits(pipe))

    def on_top(report):
        for path, layer in trainer.method._layers.items():
            assert torch.equal(layer.weight, between[f"unet.{path}.weight"])

    trainer.learn(_concept(2), _dataset(2), on_top)


def test_sd_lora_moves_magnitudes_but_no_direction(pipe):
    method = SDLoRA.build({"r": 2})
    _attach(method, pipe, 1)
    _randomise(method, 1)
    method.finish()
    first = {
        path: (A.clone(), method._carried["B"][path].clone())
        for path, A in method._carried["A"].items()
    }
    initial = method._carried["initial"]
    groups = _attach(method, pipe, 2)
    for path, layer in method._layers.items():
        assert torch.equal(layer.weight, initial[path])
        assert torch.equal(layer.delta(), first[path][0] @ first[path][1])  # nothing moved yet
        assert layer.delta.gain.shape == (1,)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert all(id(layer.delta.gain) in trained for layer in method._layers.values())
    _randomise(method, 2)
    with torch.no_grad():
        for layer in method._layers.values():
            layer.delta.gain.fill_(1.5)
    state = method.finish()
    for path, (A, B) in first.items():
        D = 1.5 * A.double() @ B.double()
        D += state[f"{path}.A"].double() @ state[f"{path}.B"].double()
        weight = pipe.unet.get_submodule(path).weight.double()
        torch.testing.assert_close(weight, initial[path].double() + D, rtol=0, atol=1e-6)
        assert method._carried["A"][path].shape[1] == 4


@pytest.mark.parametrize("name", RIVALS)
def test_a_concepts_file_holds_what_was_learned(pipe, tmp_path, name):
    trainer = _trainer(pipe, name)
    state, _ = trainer.learn(_concept(), _dataset())
    trainer.method.save(state, tmp_path / "v1.safetensors")
    loaded = load_file(tmp_path / "v1.safetensors")
    assert loaded.keys() == state.keys()
    row = pipe.text_encoder.get_input_embeddings().weight[-1]
    assert torch.equal(loaded["token/<v1>"], row)


def test_a_delta_that_is_not_finite_is_refused(pipe):
    method = METHODS["lora"](SMALL)
    _attach(method, pipe)
    before = _bits(pipe)
    with torch.no_grad():
        next(iter(method._layers.values())).delta.A.fill_(float("nan"))
    with pytest.raises(ValueError, match="A is not finite"):
        method.finish()
    after = _bits(pipe)
    assert all(torch.equal(before[k], after[k]) for k in _adapted(before) if "delta" not in k)
