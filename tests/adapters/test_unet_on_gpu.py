# SPDX-License-Identifier: Apache-2.0
"""A UNet in training on a GPU: the CPU's masks and gradients, autocast, checkpoints, folds."""

import functools

import pytest
import torch
from stamina_adapters import fold_stamina
from torch.utils.checkpoint import checkpoint
from unet_kit import train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _ieee_convolutions():
    """cuDNN rounds the operands of fp32 convolutions to tf32 unless told."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_close(got, expected, tolerance):
    """Relative, in the norm: fp32 sums of up to some thousand terms in another order."""
    assert (got[0] - expected[0]).norm() <= tolerance * expected[0].norm()
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_a_step_is_the_cpus(unet):
    expected = train_step(unet)
    assert_close(train_step(unet.cuda()), expected, 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(unet, reentrant):
    expected = train_step(unet.cuda())
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    assert_close(train_step(unet), expected, 1e-4)


def test_bf16_autocast(unet):
    expected = train_step(unet.cuda())

    def call(*arguments):
        with torch.autocast("cuda", torch.bfloat16):
            return unet(*arguments)

    output, gradients = train_step(unet, call)
    assert (output - expected[0]).norm() <= 0.05 * expected[0].norm()
    assert all(gradients[k].dtype == g.dtype for k, g in expected[1].items())


def test_a_compiled_step(unet):
    expected = train_step(unet.cuda())
    torch._dynamo.reset()
    assert_close(train_step(unet, torch.compile(unet, fullgraph=True)), expected, 1e-3)


def test_folding_is_the_cpus(stock_pipe, pipe_of, learn):
    """fp32 sums of a rank's products in another order, rounded once: an eps or two apart."""
    folded = []
    for device in ("cpu", "cuda"):
        pipe = pipe_of(stock_pipe)
        pipe.unet.to(device)
        for name in ("c0", "c1"):
            learn(pipe, name)
            fold_stamina(pipe)
        folded.append({k: v.cpu() for k, v in pipe.unet.state_dict().items()})
    assert any(not torch.equal(v, folded[0][k]) for k, v in stock_pipe.unet.state_dict().items())
    for name, expected in folded[0].items():
        torch.testing.assert_close(folded[1][name], expected, rtol=1e-6, atol=1e-6)
