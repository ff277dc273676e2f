# SPDX-License-Identifier: Apache-2.0
"""Settings, concept lists and folders of images: what is refused, and with which words."""

import json

import pytest
import torch
from PIL import Image
from stamina_adapters.training.config import ConceptSpec, TrainingConfig, load_concepts_list
from stamina_adapters.training.data import ConceptDataset, to_tensor
from stamina_adapters.training.errors import InputError


def _entry(**changes):
    return {"instance_prompt": "a photo of <v1>", "instance_data_dir": "d", **changes}


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_concept_list_in_the_custom_diffusion_spelling(tmp_path):
    entries = [_entry(), _entry(instance_prompt="<v2> at night", token="<v2>")]
    concepts = load_concepts_list(_write(tmp_path / "c.json", entries))
    assert [c.token for c in concepts] == ["<v1>", "<v2>"]
    assert [c.name for c in concepts] == ["v1", "v2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ([], "with at least one concept"),
        ({"a": 1}, "must be a JSON list"),
        (["x"], "entry 0 must be an object"),
        ([_entry(class_prompt="a face")], "entry 0: unknown key 'class_prompt'; remove it"),
        ([{"instance_prompt": "a <v1>"}], "entry 0: key 'instance_data_dir' is missing"),
        ([_entry(instance_prompt="a photo")], "holds 0 words like <v1>"),
        ([_entry(instance_prompt="<a> and <b>")], "holds 2 words like <v1>"),
        ([_entry(instance_prompt=" ")], "words like <v1>"),
        ([_entry(token="<v9>")], "token '<v9>' is not a word of instance_prompt"),
        ([_entry(instance_prompt="a <v1>, by day")], "with a space on either side, before a comma"),
        ([_entry(instance_prompt="a <>", token="<>")], "token '<>' is nothing but brackets"),
        ([_entry(), _entry()], "entry 1: token '<v1>' is used twice"),
        ([_entry(), _entry(instance_prompt="<V1>")], "entry 1: token '<V1>' is used twice"),
        (
            [_entry(), _entry(instance_prompt="a photo of v1", token="v1")],
            "entry 1: name 'v1' is used twice",
        ),
    ],
)
def test_a_faulty_concept_list_is_refused(tmp_path, content, message):
    with pytest.raises(InputError) as caught:
        load_concepts_list(_write(tmp_path / "c.json", content))
    assert message in str(caught.value)
    assert str(caught.value).startswith("--concepts_list")
    assert "\n" not in str(caught.value)


def test_a_missing_concept_list_is_refused(tmp_path):
    with pytest.raises(InputError, match="--concepts_list .*No such file"):
        load_concepts_list(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_train_steps": 0},
        {"learning_rate": 0.0},
        {"target_density": 1.0},
        {"sparse_start": 0.6, "sparse_end": 0.5},
        {"min_density": 0.4, "target_density": 0.3},
        {"unknown": 1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainingConfig(**settings)


def test_seeds_differ_between_concepts_and_runs():
    first, second = (
        ConceptSpec(instance_prompt=f"a <v{k}>", instance_data_dir=".") for k in (1, 2)
    )
    assert first.seed(0) == first.seed(0)
    assert len({first.seed(0), second.seed(0), first.seed(1)}) == 3


def _picture(path, size=(24, 20)):
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)


def test_png_and_jpeg_are_read_in_order_and_made_square(tmp_path):
    _picture(tmp_path / "b.jpg")
    _picture(tmp_path / "a.PNG", (20, 40))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    dataset = ConceptDataset.from_folder(tmp_path)
    assert [image.size for image in dataset.images] == [(20, 40), (24, 20)]
    pixels = dataset.pixels(16, hflip=True)
    assert pixels.shape == (4, 3, 16, 16)
    assert torch.equal(pixels[2], pixels[0].flip(-1))
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_pixel_values_are_mapped_linearly():
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 255, 51), (255, 0, 204)])
    expected = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]], [[-0.6, 0.6]]])
    torch.testing.assert_close(to_tensor(image), expected, rtol=0, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert ConceptDataset.from_folder(tmp_path).images[0].size == (4, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode):
    hidden, shown = (0, 255) if mode in ("L", "LA") else ((0, 0, 0), (200, 100, 50))
    picture = Image.new(mode.removesuffix("A") if mode != "P" else "RGB", (2, 1), hidden)
    picture.putpixel((1, 0), shown)
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", (2, 1), 0)
        alpha.putpixel((1, 0), 255)
        picture.putalpha(alpha)
        picture.save(tmp_path / "a.png")
    elif mode == "P":
        indexed = picture.quantize(2)
        alphas = bytes(0 if colour == hidden else 255 for colour in indexed.palette.colors)
        indexed.save(tmp_path / "a.png", transparency=alphas)
    else:
        picture.save(tmp_path / "a.png", transparency=hidden)
    (image,) = ConceptDataset.from_folder(tmp_path).images
    expected = shown if isinstance(shown, tuple) else (shown,) * 3
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), expected]


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_kept(tmp_path):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    picture.putpixel((1, 0), (1, 2, 3, 255))
    picture.save(tmp_path / "a.png")
    (image,) = ConceptDataset.from_folder(tmp_path).images
    assert [image.getpixel((x, 0)) for x in range(2)] == [(127, 127, 127), (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.filterwarnings("error")
def test_damaged_exif_says_nothing_and_changes_nothing(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / name, exif=exif.tobytes()[:-6])
    assert ConceptDataset.from_folder(tmp_path).images[0].size == (8, 4)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match="instance_data_dir .*no such folder"):
        ConceptDataset.from_folder(tmp_path / "absent")
    with pytest.raises(InputError, match="is empty; put at least one"):
        ConceptDataset.from_folder(tmp_path)
    _picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="is not a folder"):
        ConceptDataset.from_folder(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"'notes.txt' is not a PNG or JPEG file"):
        ConceptDataset.from_folder(tmp_path)


@pytest.mark.parametrize("look", ["exists", "iterdir", "is_file"])
def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch, look):
    """A parent of mode 000, a folder of mode 000, one of mode 444; root would be let in."""
    _picture(tmp_path / "a.png")

    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(f"pathlib.Path.{look}", denied)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); check its"):
        ConceptDataset.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", "truncated", "gif"])
def test_a_corrupt_image_is_refused_by_name(tmp_path, content):
    _picture(tmp_path / "a.png")
    bad = tmp_path / "b.png"
    if content == "gif":
        _picture(tmp_path / "b.gif")
        (tmp_path / "b.gif").rename(bad)
    else:
        whole = (tmp_path / "a.png").read_bytes()
        bad.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(InputError, match=r"image '.*b\.png' cannot be decoded") as caught:
        ConceptDataset.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
