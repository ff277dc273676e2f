# SPDX-License-Identifier: Apache-2.0
"""Mask generators: size, statistics at the start, precision."""

import math

import pytest
import torch
from pydantic import ValidationError
from stamina_adapters import StaminaConfig
from stamina_adapters.evaluation.cost import saved_mib
from stamina_adapters.masks import EmbeddingMLP, make_mask_generator
from torch import nn
from torch.nn import functional as F

GENERATORS = ("embedding_mlp", "constant_mlp", "free")


def make(kind, rows=96, columns=128, seed=0, **settings):
    config = StaminaConfig(mask_generator=kind, **settings)
    return make_mask_generator(rows, columns, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("rows, columns, rank", [(320, 768, 16), (31, 257, 7), (128, 64, 76)])
def test_parameter_budget_and_shapes(kind, rows, columns, rank):
    module = make(kind, rows, columns, mask_rank=rank)
    assert sum(p.numel() for p in module.parameters()) <= 2 * (rows + columns) * rank + 10_000
    U, V, b = module()
    assert (U.shape, V.shape, b.shape) == ((rows, rank), (rank, columns), ())


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("density", [0.3, 0.7])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_logits_at_the_start(kind, density, std):
    U, V, b = make(kind, density_init=density, logit_std=std, mask_rank=24)()
    product = (U @ V).double()
    # 96 + 128 factor rows of rank 24: the spread of the sample deviation is about 5%
    assert product.std().item() == pytest.approx(std, rel=0.15)
    assert abs(product.mean().item()) < 0.1 * std
    assert b.item() == pytest.approx(math.log(density / (1 - density)), rel=1e-6)
    kept = (product + b > 0).double().mean().item()
    gaussian = 0.5 * (1 + math.erf(b.item() / std / math.sqrt(2)))
    assert kept == pytest.approx(gaussian, abs=0.06)
    assert 0.02 < kept < 0.98


@pytest.mark.parametrize("kind", GENERATORS)
def test_fp32_under_autocast_and_every_parameter_learns(kind):
    module = make(kind)
    plain = module()
    with torch.autocast("cpu", torch.bfloat16):
        cast = module()
    assert all(
        torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True)
    )
    (plain[0].square().sum() + plain[1].square().sum() + plain[2]).backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("kind", GENERATORS)
def test_seeded_without_the_global_stream_and_without_linears(kind):
    state = torch.get_rng_state()
    first, same, other = make(kind), make(kind), make(kind, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first(), same(), strict=True))
    assert not torch.equal(first()[0], other()[0])
    assert not any(isinstance(m, nn.Linear) for m in first.modules())


def test_single_row_stays_finite():
    assert all(t.isfinite().all() for t in make("embedding_mlp", rows=1)())


@pytest.mark.parametrize(
    "field, value",
    [
        ("r", 0),
        ("alpha", -1.0),
        ("alpha", 1e300),
        ("alpha", 1e-300),
        ("mask_rank", 257),
        ("target_modules", ()),
        ("mask_generator", "dense"),
        ("density_init", 1.0),
        ("logit_std", 1e300),
        ("tau", 0.0),
        ("tau", 1e-300),
        ("sparse_kind", "l0"),
        ("seed", -1),
        ("rank", 4),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValidationError, match=field):
        StaminaConfig(**{field: value})


def test_config_scale_and_frozen():
    assert StaminaConfig(r=8).scale == 1.0
    assert StaminaConfig(r=8, alpha=4).scale == 0.5
    with pytest.raises(ValidationError, match="frozen"):
        StaminaConfig().r = 3


@pytest.mark.parametrize("kind", GENERATORS)
def test_states_whose_b_has_no_dimension_load(kind):
    state = make(kind, density_init=0.3).state_dict()
    module = make(kind, seed=1)
    module.load_state_dict(state | {"b": state["b"].squeeze()})
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", ["embedding_mlp", "free"])
def test_no_activation_is_kept_for_the_backward(kind):
    module = make(kind)
    outputs = []
    assert saved_mib(lambda: outputs.extend(module()), list(module.parameters())) == 0
    (outputs[0].square().sum() + outputs[1].square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in module.named_parameters() if name != "b")


def test_the_recomputed_backward_is_autograds():
    mlp = EmbeddingMLP(7, 3, 0.5, torch.Generator().manual_seed(1)).double()
    inputs = (mlp.embedding, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2)
    mlp.bias1.data.normal_(generator=torch.Generator().manual_seed(2))
    upstream = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    hidden = F.silu(F.linear(mlp.embedding, mlp.weight1, mlp.bias1))
    plain = F.linear(hidden, mlp.weight2, mlp.bias2)
    expected = torch.autograd.grad(plain, inputs, upstream)
    assert torch.equal(mlp(), plain)
    for found, wanted in zip(torch.autograd.grad(mlp(), inputs, upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
