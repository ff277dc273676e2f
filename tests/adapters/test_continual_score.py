# SPDX-License-Identifier: Apache-2.0
"""Scores, masks, pictures and memory against cases worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from stamina_adapters.continual.masks import mask_bits, overlaps, shared, union
from stamina_adapters.continual.memory import PeakMemory
from stamina_adapters.continual.rows import ConceptRow, LevelRow
from stamina_adapters.continual.score import (
    checkpoint_row,
    chosen_pairs,
    concept_scores,
    pair_row,
    summary_row,
)
from stamina_adapters.continual.thumbnails import SIDE, decode, encode
from stamina_adapters.evaluation.judge import Judge
from stamina_adapters.evaluation.kid import kid

AXES = torch.eye(4)
LABELS = {"method": "m", "seed": 0}


class Colours:
    """A picture's embedding is the axis that its red value names."""

    def embed(self, images):
        return torch.stack([AXES[image.getpixel((0, 0))[0]] for image in images])


def _pictures(*axes):
    return [Image.new("RGB", (2, 2), (axis, 0, 0)) for axis in axes]


@pytest.fixture
def judge():
    """Three concepts on the first three axes, a distractor on the fourth."""
    return Judge(Colours(), [_pictures(k, k) for k in range(3)], [_pictures(3, 3)])


def test_a_concept_is_scored_on_its_own_pictures(judge):
    assert judge.identities == 4
    shown = AXES[[0, 0, 3, 1]]
    found = concept_scores(judge, shown, 0)
    assert found["accuracy"] == 0.5
    assert found["cosine"] == pytest.approx(0.5)
    assert found["told"] == [(0, 2), (1, 1), (3, 1)]
    # kernel (x . y + 1)^3: 8 for equal axes, 1 otherwise. Real with itself: 8. Shown with itself:
    # of 16 pairs 4 + 1 + 1 are equal. Real with shown: half are equal
    assert found["mmd"] == pytest.approx(8 + (6 * 8 + 10) / 16 - 2 * (8 + 1) / 2)


def test_a_checkpoint_compares_with_real_and_with_then(judge):
    learned = [AXES[[0, 0]], AXES[[1, 1]], AXES[[2, 2]]]
    now = [AXES[[0, 0]], AXES[[1, 3]], AXES[[2, 2]]]
    row = checkpoint_row(judge, learned, now, seconds=1.0, **LABELS)
    assert row.after == 3
    assert row.accuracy == [1, 0.5, 1]
    assert row.confusion == [(1, 0, 2), (2, 1, 1), (2, 3, 1), (3, 2, 2)]
    # the second concept: 8 + (8 + 1 + 1 + 8) / 4 - 2 (8 + 1) / 2
    moved = 8 + 4.5 - 9
    assert row.f_mmd_each == pytest.approx([0, moved])
    assert row.f_mmd == pytest.approx(moved / 2)
    assert row.a_mmd_each == pytest.approx([0, moved, 0])
    assert row.a_mmd == pytest.approx(moved / 3, rel=1e-4)
    one = checkpoint_row(judge, learned[:1], now[:1], seconds=1.0, **LABELS)
    assert one.f_mmd is None and one.f_mmd_each == []


def _concept(task, accuracy, **changes):
    figures = {
        "task": task,
        "concept": f"c{task}",
        "token": f"<v{task}>",
        "family": "face",
        "accuracy": accuracy,
        "cosine": 0.5,
        "mmd": 0.1,
        "told": [],
        "loss_sampled": 0.1,
        "loss_committed": 0.1,
        "trained_percent": 2.0,
        "stored_percent": 0.01 * task,
        "carried_percent": 3.0 * task,
        "density": None,
        "overlap": None,
        "overlaps": [],
        "seconds": 10.0,
        "peak_mib": 5.0 * task,
    }
    return ConceptRow(**LABELS, **{**figures, **changes})


def _level(task, ceiling, family=0.25):
    return LevelRow(
        task=task,
        concept=f"c{task}",
        family="face",
        accuracy_family=family,
        accuracy_ceiling=ceiling,
        cosine_ceiling=None,
        mmd_ceiling=None,
        seconds=1,
    )


def test_a_summary_is_of_a_prefix(judge):
    learned = [AXES[[0, 0]], AXES[[1, 3]]]
    checkpoint = checkpoint_row(judge, learned, learned, seconds=1.0, **LABELS)
    concepts = [_concept(1, 1.0), _concept(2, 0.5), _concept(3, 0.0)]
    row = summary_row(concepts, checkpoint, [_level(1, 1.0), _level(2, 0.5)], 0.25)
    assert (row.concepts, row.accuracy_after_learning, row.accuracy_final) == (2, 0.75, 0.75)
    assert (row.accuracy_ceiling, row.accuracy_family, row.chance) == (0.75, 0.25, 0.25)
    assert (row.seconds, row.peak_mib, row.trained_percent) == (20, 10, 2)
    assert (row.stored_percent, row.carried_percent, row.density) == (0.02, 6, None)
    assert summary_row(concepts, checkpoint, [_level(1, 1.0)], 0.25).accuracy_ceiling is None


def test_pairs_are_spread_and_do_not_share_concepts(judge):
    assert chosen_pairs(50, 3) == [(0, 1), (16, 17), (32, 33)]
    assert chosen_pairs(5, 8) == [(0, 1), (2, 3)]
    assert chosen_pairs(1, 8) == [] and chosen_pairs(10, 0) == []
    row = pair_row(judge, AXES[[0, 1, 1, 3]], 0, 1, after=3, **LABELS)
    assert (row.first, row.second) == (1, 2)
    assert (row.share_first, row.share_second, row.share_either) == (0.25, 0.5, 0.75)


def test_kid_is_the_unbiased_double_sum():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, generator=generator) for _ in range(2))

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    def off_diagonal(z):
        return sum(kernel(z[i], z[j]) for i in range(5) for j in range(5) if i != j) / 20

    cross = sum(kernel(a, b) for a in x for b in y) / 25
    expected = off_diagonal(x) + off_diagonal(y) - 2 * cross
    # both in fp64: the order of about a hundred additions of numbers below 100
    assert kid(x, y) == pytest.approx(expected, abs=1e-11)
    state = torch.get_rng_state()
    assert kid(x, y[:4]) == kid(x, y[:4])
    assert torch.equal(torch.get_rng_state(), state)
    assert kid(x[:1], y) is None


def _packed(rows):
    """Rows of 0 and 1 as the library packs them: bit j of a word is column j."""
    return torch.tensor([[sum(bit << j for j, bit in enumerate(row))] for row in rows]).int()


def test_masks_overlap_by_counted_bits():
    one = {"a": _packed([[1, 1, 0], [0, 0, 1]]), "b": _packed([[1, 0, 0]])}
    two = {"a": _packed([[0, 1, 0], [0, 1, 1]]), "b": _packed([[0, 0, 0]])}
    three = {"a": _packed([[1, 0, 0], [0, 0, 0]])}
    assert shared(one, two) == 2 / 4
    assert shared(two, one) == 2 / 3
    assert overlaps(one, [two, three]) == [0.5, 0.25]
    assert shared(one, union([two, three])) == 0.75
    assert overlaps({}, [one]) == []
    assert shared({"b": two["b"]}, one) == 0
    full = {"a": torch.full((2, 3), -1, dtype=torch.int32)}
    assert shared(full, full) == 1
    assert mask_bits("no concept state") == {}
    packed = torch.tensor([[3]], dtype=torch.int32)
    found = mask_bits({"a.to_k.bits": packed, "a.to_k.A": AXES})
    assert list(found) == ["a.to_k"] and torch.equal(found["a.to_k"], packed)


def test_thumbnails_are_small_and_look_like_the_picture():
    picture = Image.linear_gradient("L").convert("RGB")
    (text,) = encode([picture])
    small = decode(text)
    assert small.size == (SIDE, SIDE) and len(text) < 4000
    wanted = np.asarray(picture.resize((SIDE, SIDE)), dtype=float)
    # lossy: a few of 255 steps on average
    assert np.abs(np.asarray(small, dtype=float) - wanted).mean() < 6


def test_peak_memory_sees_what_was_freed_again():
    if torch.cuda.is_available():
        pytest.skip("measures the GPU here")
    with PeakMemory() as peak:
        block = np.ones(1 << 27, dtype=np.uint8)
        del block
    if peak.mib is None:
        pytest.skip("the system does not tell")
    # the block is 128 MiB; pages of other things come and go
    assert 100 < peak.mib < 300
