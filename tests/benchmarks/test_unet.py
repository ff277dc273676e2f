# SPDX-License-Identifier: Apache-2.0
"""The whole step of the UNet: what is wrong in it, forward or backward, fails its check."""

import pytest
import torch
from stamina_adapters import sharing

from benchmarks import unet
from benchmarks.measure import error_limit
from benchmarks.rivals import absent
from stamina_kernels import reference

LIMIT = error_limit(torch.float32)

if reason := absent("diffusers")("cpu") or absent("peft")("cpu"):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return unet.make_batch(unet.SMALL, "cpu", torch.float32)


@pytest.fixture
def model(batch):
    return unet.make_unets(unet.SMALL, "cpu", torch.float32)[0]


@pytest.fixture
def ours(model):
    return unet.with_stamina(model)("reference")


def parameters_of_the_ends(model):
    layers = [layer for path, layer in model.named_modules() if path.endswith(unet.TARGETS)]
    return [
        {name: p for name, p in layer.named_parameters() if p.requires_grad}
        for layer in (layers[0], layers[-1])
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ours_agrees_with_fp64_in_the_launch_that_is_timed(model, batch, backend, monkeypatch):
    launches = []

    def project_group(layers, x):
        launches.append(len(layers))
        return launch(layers, x)

    launch = sharing.project_group
    monkeypatch.setattr(sharing, "project_group", project_group)
    trained = unet.with_stamina(model)(backend)
    assert 0 < trained.error(batch) < LIMIT
    assert launches == [8, 8]  # all K and V, without penalties and with them
    assert all(p.grad is None for p in (*trained.parameters, batch.prompts))
    trained.call(batch).parts["forward"](None)
    assert launches == [8, 8, 8]


def test_lora_agrees_with_fp64(model, batch):
    trained = unet.with_lora(model)
    assert 0 < trained.error(batch) < LIMIT
    assert not [m for m in model.modules() if m._forward_hooks]


@pytest.mark.parametrize(
    "make",
    [lambda model: unet.with_stamina(model)("reference"), unet.with_lora],
    ids=["ours", "peft"],
)
def test_a_wrong_gradient_of_any_parameter_fails_the_check(model, batch, make):
    trained = make(model)
    for found in parameters_of_the_ends(model):
        assert len(found) in (2, 13)
        for name, parameter in found.items():
            hook = parameter.register_hook(lambda gradient: 0.7 * gradient)
            assert trained.error(batch) > LIMIT, name
            hook.remove()
    assert trained.error(batch) < LIMIT


@pytest.mark.parametrize("function", ["masked_linear_backward", "embedding_mlp_backward"])
def test_a_wrong_backward_of_a_backend_fails_the_check(ours, batch, function, monkeypatch):
    right = getattr(reference, function)

    def wrong(*arguments):
        of_input, of_parameters = right(*arguments)
        return of_input, 0.7 * of_parameters

    monkeypatch.setattr(reference, function, wrong)
    assert ours.error(batch) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("name", ["g_forget", "g_sparse"])
def test_a_forgotten_penalty_fails_the_check(ours, batch, name, monkeypatch):
    position = {"g_forget": 14, "g_sparse": 15}[name]
    backward = reference.masked_linear_backward

    def forgetful(*arguments):
        without = torch.zeros_like(arguments[position])
        return backward(*arguments[:position], without, *arguments[position + 1 :])

    monkeypatch.setattr(reference, "masked_linear_backward", forgetful)
    assert ours.error(batch) > 0.1


def test_a_wrong_output_fails_the_check(ours, batch, monkeypatch):
    forward = reference.masked_linear
    monkeypatch.setattr(
        reference, "masked_linear", lambda *rest: (forward(*rest)[0] * 1.1, *forward(*rest)[1:])
    )
    assert ours.error(batch) == pytest.approx(0.1, rel=0.01)
