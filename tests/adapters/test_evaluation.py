# SPDX-License-Identifier: Apache-2.0
"""Metrics against direct formulas, grids, sampling, cost."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from stamina_adapters.embedded import world
from stamina_adapters.evaluation.cost import (
    KeyValueShape,
    eager_masked_linear,
    measure_projections,
    saved_mib,
)
from stamina_adapters.evaluation.embedder import EncoderEmbedder
from stamina_adapters.evaluation.grid import image_grid
from stamina_adapters.evaluation.metrics import NearestCentroid, a_mmd, f_mmd, polynomial_mmd
from stamina_adapters.evaluation.sampling import generate_images
from stamina_adapters.training.data import ConceptDataset

from stamina_kernels import MaskedProjection


def _sets(*sizes, dim=7):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, dim, generator=generator) for size in sizes]


def _direct_mmd(x, y):
    """The double sums, one pair at a time, in Python floats."""

    def unit(row):
        norm = sum(v * v for v in row) ** 0.5
        return [v / norm for v in row]

    x, y = ([unit(row) for row in rows.tolist()] for rows in (x, y))

    def mean(a, b):
        values = [
            (sum(p * q for p, q in zip(r, s, strict=True)) + 1) ** 3
            for r, s in itertools.product(a, b)
        ]
        return sum(values) / len(values)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd_is_the_biased_double_sum():
    x, y = _sets(5, 8)
    # both in fp64: the difference is the order of 100 additions of numbers below 8
    assert polynomial_mmd(x, y) == pytest.approx(_direct_mmd(x, y), abs=1e-12)


def test_mmd_ignores_length_and_order_and_is_zero_for_equal_sets():
    x, y = _sets(5, 8)
    assert polynomial_mmd(4 * x, y.flip(0)) == pytest.approx(polynomial_mmd(x, y), abs=1e-12)
    assert polynomial_mmd(x, y) == pytest.approx(polynomial_mmd(y, x), abs=1e-12)
    assert polynomial_mmd(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    one = torch.eye(2)[:1]
    # k(a, a) + k(b, b) - 2 k(a, b) for opposite unit vectors: 8 + 8 - 0
    assert polynomial_mmd(one, -one) == 16


def test_a_and_f_mmd_average_over_the_right_concepts():
    real, learned, final = (_sets(*[4] * 3) for _ in range(3))
    learned = [t.roll(1, 1) for t in learned]
    expected = sum(_direct_mmd(x, y) for x, y in zip(real, final, strict=True)) / 3
    assert a_mmd(real, final) == pytest.approx(expected, abs=1e-12)
    expected = sum(_direct_mmd(x, y) for x, y in zip(learned[:2], final[:2], strict=True)) / 2
    assert f_mmd(learned, final) == pytest.approx(expected, abs=1e-12)


def test_metrics_refuse_what_they_cannot_compare():
    x, y = _sets(3, 3)
    with pytest.raises(ValueError, match="x and y must be non-empty"):
        polynomial_mmd(x, y[:0])
    with pytest.raises(ValueError, match="with one d"):
        polynomial_mmd(x, y[:, :2])
    with pytest.raises(ValueError, match="at least two concepts"):
        f_mmd([x], [y])
    with pytest.raises(ValueError, match="identities must be at least two"):
        NearestCentroid([x])


def test_nearest_centroid_tells_identities():
    axes = torch.eye(4)
    judge = NearestCentroid([5 * axes[k] + 0.1 * torch.randn(6, 4) for k in range(4)])
    shown = torch.stack([2 * axes[1], axes[1], axes[3], axes[0]])
    assert judge.predict(shown).tolist() == [1, 1, 3, 0]
    assert judge.accuracy(shown, 1) == 0.5


def test_a_grid_holds_every_picture_in_its_place():
    colours = ["red", "green", "blue", "white"]
    tiles = [Image.new("RGB", (10, 10), colour) for colour in colours]
    rows = [("one", [tiles[:2], tiles[2:3]]), ("two", [tiles[1:3], tiles[:1]])]
    grid = image_grid(rows, ("real", "made"), cell=20)
    counts = {colour: count for count, colour in grid.getcolors(1 << 16)}
    assert [counts[c] for c in ((255, 0, 0), (0, 128, 0), (0, 0, 255))] == [800, 800, 800]


def test_a_grid_shows_the_centre_of_a_picture_that_is_not_square():
    torch.manual_seed(0)
    pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
    square = Image.fromarray(pixels)
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste(square, (16, 0))
    grid = image_grid([("one", [[square], [wide]])], ("square", "wide"), cell=20)
    scaled = square.resize((20, 20), Image.Resampling.BICUBIC)
    left, top = grid.width - 28, grid.height - 28  # of the last tile, before two gaps
    assert grid.crop((150, top, 170, top + 20)).tobytes() == scaled.tobytes()
    # the filter mixes what was cut off into 4 pixels at most
    inner = grid.crop((left + 4, top, left + 16, top + 20))
    assert inner.tobytes() == scaled.crop((4, 0, 16, 20)).tobytes()


def test_a_ragged_grid_is_refused():
    tile = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="row 'two' must hold 1 blocks of"):
        image_grid([("one", [[tile]]), ("two", [[tile, tile]])], ("real",))
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid([], ())


def test_pictures_depend_on_their_own_seed_only(pipe):
    def draw(prompts, seeds, batch_size):
        return generate_images(
            pipe,
            prompts,
            seeds,
            num_inference_steps=2,
            guidance_scale=2.0,
            batch_size=batch_size,
        )

    counted = []
    together = generate_images(
        pipe,
        ["a photo"] * 3,
        [4, 5, 4],
        num_inference_steps=2,
        guidance_scale=2.0,
        batch_size=2,
        on_batch=counted.append,
    )
    assert counted == [2, 1]
    alone = draw(["a photo"], [5], 1)
    # a batch may round differently: one step of 8-bit colour
    for x, y in ((together[0], together[2]), (together[1], alone[0])):
        difference = [abs(a - b) for a, b in zip(x.tobytes(), y.tobytes(), strict=True)]
        assert max(difference) <= 1
    assert together[0].tobytes() != together[1].tobytes()
    with pytest.raises(ValueError, match="must pair up"):
        draw(["a", "b"], [1], 1)


def test_saved_memory_counts_each_storage_once():
    x = torch.randn(1024, 256, requires_grad=True)
    # exp saves its output, the product saves it again with x: 1 MiB besides x
    assert saved_mib(lambda: x.exp() * x, [x]) == 1.0
    assert saved_mib(lambda: x.exp() * x, []) == 2.0


def test_the_eager_rival_is_the_same_function():
    from stamina_kernels import masked_linear

    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    initial, change, x = draw(6, 5), draw(6, 5), draw(4, 5)
    # far from zero, so that every mask element is decided whatever the noise
    U, V = torch.sign(draw(6, 1)), 60 * torch.sign(draw(1, 5))
    p = MaskedProjection(
        weight=initial + change,
        weight_init=initial,
        A=draw(6, 2),
        B=draw(2, 5),
        U=U,
        V=V,
        b=torch.zeros(()),
        layer_id=0,
    )
    one, zero = torch.tensor(1.0), torch.tensor(0)
    ours = masked_linear(x, p, scale=one, tau=one, seed=zero, step=zero)
    y, forget, sparse = eager_masked_linear(x, p, change, one, one)
    torch.testing.assert_close(y, ours.y)
    torch.testing.assert_close(forget, ours.forget[0])
    torch.testing.assert_close(sparse, ours.sparse[0])


def test_our_projections_save_a_bit_where_eager_saves_matrices():
    cost = measure_projections([KeyValueShape(64, 96, 8)], rank=4, mask_rank=4, rounds=1)
    weights = 2 * 64 * 96
    assert cost.saved_mib_ours <= weights / 8 / 2**20
    assert cost.saved_mib_eager >= 3 * 4 * weights / 2**20
    assert min(cost.step_ms_ours, cost.step_ms_eager) > 0


class _Pixels:
    """An encoder whose vectors are the pixels it was given."""

    def embed(self, images):
        return torch.from_numpy(images)


def _noise(width, height):
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(("width", "height"), [(112, 64), (64, 80), (64, 64)])
def test_the_shipped_encoder_sees_the_centre_that_training_cuts_out(width, height):
    assert world.SIZE == 64
    wide = _noise(width, height)
    left, top = (width - 64) // 2, (height - 64) // 2
    centre = wide.crop((left, top, left + 64, top + 64))
    (found,) = EncoderEmbedder(_Pixels()).embed([wide])
    assert np.array_equal(found.numpy(), np.asarray(centre))
    pixels = ConceptDataset([wide]).pixels(64)
    assert torch.equal(found, ((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0))


@pytest.mark.parametrize("side", [48, 65, 128])
def test_square_pictures_are_scaled_whole(side):
    (found,) = EncoderEmbedder(_Pixels()).embed([_noise(side, side)])
    expected = _noise(side, side).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(found.numpy(), np.asarray(expected))
