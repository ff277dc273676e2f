# SPDX-License-Identifier: Apache-2.0
"""A concept that fails or is interrupted leaves pipeline and method as before."""

import copy

import pytest
import torch
from test_rivals import SETTINGS, _bits, _concept, _dataset, _trainer


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would stop the tests."""


def _interrupt(report):
    raise Interrupted


@pytest.mark.parametrize("name", SETTINGS)
def test_a_concept_that_fails_leaves_nothing_behind(pipe, name):
    """Before the first concept and after it: pipeline and state have the bits of before, and what
    is learned next those of never having tried."""
    other = copy.deepcopy(pipe)
    trainer, undisturbed = _trainer(pipe, name), _trainer(other, name)
    kinds = {path: type(module) for path, module in pipe.unet.named_modules()}
    for number in (1, 3):
        bits, state, words = _bits(pipe), trainer.method.state_dict(), len(pipe.tokenizer)
        with pytest.raises(Interrupted):
            trainer.learn(_concept(number + 1), _dataset(5), _interrupt)
        assert len(pipe.tokenizer) == words
        for found, expected in ((_bits(pipe), bits), (trainer.method.state_dict(), state)):
            wanted = {k: t for k, t in expected.items() if k != "weights"}
            assert found.keys() - {"weights"} == wanted.keys()
            assert all(torch.equal(found[k], t) for k, t in wanted.items())
        if number == 1:
            assert {path: type(module) for path, module in pipe.unet.named_modules()} == kinds
        for each in (trainer, undisturbed):
            each.learn(_concept(number), _dataset(number))
        after, never = _bits(pipe), _bits(other)
        assert after.keys() == never.keys()
        assert all(torch.equal(after[k], never[k]) for k in never)


@pytest.mark.parametrize("name", ["stamina", "lora", "lora-merge", "ablation-no-mask"])
def test_a_word_of_the_vocabulary_stays_where_a_concept_takes_it(pipe, name):
    trainer = _trainer(pipe, name)
    trainer.learn(_concept(1), _dataset())
    bits = _bits(pipe)
    with pytest.raises(ValueError, match="<v1>"):
        trainer.learn(_concept(1), _dataset())
    found = _bits(pipe)
    assert found.keys() == bits.keys()
    assert all(torch.equal(found[k], bits[k]) for k in bits)
