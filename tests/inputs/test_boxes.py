from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio

from zoo.inputs import INPUTS
from zoo.inputs.boxes import BoxPreprocess, on_canvas

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_whole_image_is_stretched(interpolation: str):
    values = noise(30, 50)
    found = BoxPreprocess(size=16, interpolation=interpolation)(values)
    method = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(values).resize((16, 16), method)) / 255
    expected = (expected - BoxPreprocess.mean) / BoxPreprocess.std
    np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((30, 50), (24, 40)), ((50, 30), (40, 24)), ((40, 40), (40, 40)), ((31, 50), (25, 40)), ((7, 900), (1, 40))],
)
def test_the_longest_side_gets_the_size(shape: tuple[int, int], wanted: tuple[int, int]):
    prepare = BoxPreprocess(size=40, fit="pad")
    assert prepare(noise(*shape)).shape == (3, *wanted) and prepare.sides(*shape) == wanted


def test_an_image_of_the_size_stays_as_it_is():
    values = noise(16, 16)
    for fit in ("stretch", "pad"):
        found = BoxPreprocess(size=16, fit=fit, **PLAIN)(values)
        assert torch.equal((found * 255).round().byte().permute(1, 2, 0), torch.from_numpy(values))


def test_the_part_has_the_upright_size(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(20, 40)).save(tmp_path / "a.jpg", exif=exif)
    prepare = BoxPreprocess(size=32, fit="pad")
    (part,) = prepare.parts(tmp_path / "a.jpg")
    assert part.size == (40, 20) and part.image.shape == (3, 32, 16)
    assert torch.equal(part.image, prepare(str(tmp_path / "a.jpg")))


def test_it_is_stored_as_plain_fields():
    prepare = BoxPreprocess(size=320, fit="pad", channels=1, mean=(0.5,), std=(0.25,))
    assert INPUTS["boxes"].from_dict(prepare.to_dict()) == prepare and prepare(noise(8, 8)).shape == (1, 320, 320)
    assert "crop" not in prepare.to_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fit": "crop"}, "unknown fit 'crop'; allowed: stretch, pad"),
        ({"size": 0}, "size must be an integer from 1 to 8192"),
        ({"channels": 2}, "channels must be 3"),
        ({"mean": (0.5,)}, "mean has 1 values"),
        ({"crop": 0.9}, "unknown preprocess key crop"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict, words: str):
    with pytest.raises(ValueError, match=words):
        BoxPreprocess.from_dict(fields)


def test_images_on_one_canvas():
    small, wide = torch.full((1, 2, 3), 2.0), torch.full((1, 1, 5), 3.0)
    batch, mask = on_canvas([small, wide], multiple=4)
    assert batch.shape == (2, 1, 4, 8) and mask is not None and mask.dtype == torch.bool
    assert torch.equal(batch[:, 0] != 0, mask) and mask.sum((1, 2)).tolist() == [6, 5]
    assert torch.equal(batch[0, :, :2, :3], small) and torch.equal(batch[1, :, :1, :5], wide)
    batch, mask = on_canvas([small, small + 1])
    assert mask is None and torch.equal(batch, torch.stack([small, small + 1]))


@pytest.mark.parametrize("sides", [(480, 640), (427, 640), (640, 427), (300, 1200), (1200, 301), (33, 33), (5, 5000)])
def test_the_shortest_side_is_resized_as_in_transformers(sides):
    wanted = get_size_with_aspect_ratio(sides, 800, 1333)
    assert BoxPreprocess(size=800, fit="shortest").sides(*sides) == wanted
    assert max(wanted) <= 1333 and min(wanted) <= 800
