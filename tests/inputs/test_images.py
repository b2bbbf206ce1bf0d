"""Preparing images: how they are resized, cut and normalised, what may be given, and the fields."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from pictures import one_line, picture, pixels
from zoo.inputs.images import (
    INTERPOLATIONS,
    ImagePreprocess,
    UnreadableImage,
    convert_image,
    default_statistics,
)

PLAIN = ImagePreprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1), crop=1.0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_crop_and_normalisation(interpolation: str):
    """Against Pillow's own resize and a crop and normalisation written out."""
    source = picture(40, 60)
    prepare = ImagePreprocess(size=16, crop=0.8, interpolation=interpolation)
    resized = pixels(source.resize((30, 20), Image.Resampling[interpolation.upper()])) / 255
    expected = (resized[2:18, 7:23] - np.array(prepare.mean)) / np.array(prepare.std)
    result = prepare(source)
    assert result.dtype == torch.float32 and result.shape == (3, 16, 16)
    np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (61, 47), (224, 224), (255, 300), (33, 260), (256, 301)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_timm(shape: tuple[int, int], interpolation: str):
    """Bit for bit, at sizes of every parity."""
    source = picture(*shape)
    for size, crop in ((16, 0.875), (17, 0.9), (224, 0.95), (31, 1.0)):
        prepare = ImagePreprocess(size=size, crop=crop, interpolation=interpolation)
        options: dict[str, Any] = {"crop_pct": crop, "interpolation": interpolation}
        wanted: Any = create_transform(size, mean=prepare.mean, std=prepare.std, **options)
        assert torch.equal(prepare(source), wanted(source))


SHAPES = [(40, 60), (61, 47), (33, 260), (17, 23), (9, 5)]
MODES = {"crop": "center", "squash": "squash", "pad": "border"}


@pytest.mark.parametrize("fit", MODES)
@pytest.mark.parametrize("size", [17, (16, 31), (40, 24)])
def test_fits_equal_timm(fit: str, size: int | tuple[int, int]):
    """Bit for bit, in every crop_mode of timm, to a square and to rectangles."""
    for shape in SHAPES:
        for crop, channels in ((1.0, 3), (0.9, 3), (0.9, 1)):
            statistics = {"mean": (0.3, 0.5, 0.6)[:channels], "std": (0.2, 0.25, 0.3)[:channels]}
            prepare = ImagePreprocess(size=size, crop=crop, fit=fit, channels=channels, **statistics)
            source = convert_image(picture(*shape), channels)
            options: dict[str, Any] = {"crop_pct": crop, "crop_mode": MODES[fit], "interpolation": "bicubic"}
            wanted: Any = create_transform((3, *prepare.shape), **statistics, **options)
            assert torch.equal(prepare(source), wanted(source)), (shape, crop, channels)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_the_tensor_resizer_is_torchvision(interpolation: str):
    from torchvision.transforms import v2

    way = "nearest-exact" if interpolation == "nearest" else interpolation
    prepare = ImagePreprocess(size=(24, 17), crop=1.0, fit="squash", resizer="torch", interpolation=interpolation)
    for shape in SHAPES:
        source = picture(*shape)
        steps = [v2.PILToTensor(), v2.Resize((24, 17), v2.InterpolationMode(way)), v2.ToDtype(torch.float32, True)]
        wanted = v2.Compose([*steps, v2.Normalize([*prepare.mean], [*prepare.std])])(source)
        assert (prepare(source) - wanted).abs().max() < 1e-6
        grey = ImagePreprocess.from_dict(prepare.to_dict() | {"channels": 1, "mean": [0.0], "std": [1.0]})
        level = source.getchannel(0)
        assert (grey(level) - v2.Compose(steps)(level)).abs().max() < 1e-6


def test_longest_is_at_the_top_left_before_zeros():
    prepare = ImagePreprocess(size=(20, 16), crop=1.0, fit="longest")
    found = prepare(picture(40, 60))
    assert found.shape == (3, 20, 16) and not found[:, 10:].any()  # 16 / 60 of 40 rows is 10.67
    small = ImagePreprocess(size=(10, 16), crop=1.0, fit="squash")(picture(40, 60))
    assert torch.equal(found[:, :10], small)
    assert prepare.normalized([]).shape == (0, 3, 20, 16)


def test_where_the_centre_is_cut_out():
    source = picture(19, 16)  # 3 rows too many: 1.5 is rounded to 2, or down to 1
    for corner, top in (("round", 2), ("floor", 1)):
        prepare = ImagePreprocess(size=16, crop=1.0, corner=corner, mean=(0, 0, 0), std=(1, 1, 1))
        assert np.array_equal(np.asarray(prepare.cut(source)), np.asarray(source)[top : top + 16])


def test_fields_of_earlier_checkpoints():
    values = {"size": 8, "channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic", "crop": 1.0}
    assert ImagePreprocess.from_dict(values) == PLAIN
    assert ImagePreprocess(size=(8, 8)).size == 8  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(10, 200), (201, 11), (10, 81), (1, 300), (300, 1), (1, 301)])
def test_narrow_images_are_cut_before_they_are_resized(shape: tuple[int, int]):
    source = Image.fromarray(np.linspace(0, 255, max(shape)).astype(np.uint8)[:, None].repeat(min(shape), 1))
    source = source if shape[0] > shape[1] else source.transpose(Image.Transpose.TRANSPOSE)
    assert source.size == shape[::-1]
    wanted: Any = create_transform(16, crop_pct=0.8, interpolation="bicubic")
    prepare = ImagePreprocess(size=16, crop=0.8)
    assert (prepare(source) - wanted(source.convert("RGB"))).abs().max() < 0.05  # 3 of 255 levels


def test_memory_does_not_depend_on_the_shape():
    assert ImagePreprocess().cut(Image.new("L", (60_000, 1))).size == (224, 224)
    resized = []
    resize = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Image.Image, "resize", lambda self, size, *more: resized.append(size) or resize(self, size, *more)
        )
        for shape in ((60_000, 1), (1, 60_001), (2, 99), (640, 480)):
            ImagePreprocess()(Image.new("RGB", shape))
    assert len(resized) == 4 and all(wide * high <= 256 * 2400 for wide, high in resized)


def test_tensor_equals_picture():
    source = picture()
    tensor = torch.from_numpy(np.array(source))
    assert torch.equal(PLAIN(tensor), PLAIN(source))
    grey = ImagePreprocess(size=8, channels=1, mean=(0.5,), std=(0.5,))
    assert grey(source).shape == (1, 8, 8)
    assert torch.equal(grey(tensor[..., :1]), grey(source.getchannel(0)))
    clear = torch.cat([tensor, torch.zeros_like(tensor[..., :1])], dim=2)
    assert torch.equal(PLAIN(clear), torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(8, 8, 3), r"must be uint8 \[H, W\] or \[H, W, 1, 3 or 4\], got float32 \[8, 8, 3\]; scale it to"),
        (torch.zeros(8, 8, 3, dtype=torch.bfloat16), "got bfloat16"),
        (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            r"got uint8 \[3, 8, 8\]; move the channels last, with permute\(1, 2, 0\)",
        ),
        (np.zeros((1, 8, 8), np.uint8), r"move the channels last, with transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), r"got uint8 \[8, 8, 2\]$"),
        (np.zeros((0, 8, 3), np.uint8), r"must have pixels, got \[0, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got uint8 \[2, 8, 8, 3\]$"),
        (b"x.jpg", "an image must be a path, a PIL image, an array or a tensor, got bytes"),
        ([[0]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image(given: Any, words: str):
    with pytest.raises(ValueError, match=words) as error:
        PLAIN(given)
    one_line(error)


def test_paths_and_arrays(tmp_path: Path):
    source = picture()
    source.save(tmp_path / "a.png")
    values = np.asarray(source)
    for given in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        values,
        values[::-1][::-1],
        torch.from_numpy(values.copy()),
    ):
        assert torch.equal(PLAIN(given), PLAIN(source))
    for given in (values[..., 0], values[..., :1], torch.from_numpy(values[..., 0].copy())):
        assert torch.equal(PLAIN(given), PLAIN(source.getchannel(0)))
    with pytest.raises(UnreadableImage, match="nowhere.png: No such file"):
        PLAIN("nowhere.png")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(kind: torch.dtype):
    torch.set_default_dtype(kind)
    try:
        found = ImagePreprocess(size=17)(picture())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, ImagePreprocess(size=17)(picture()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": (0.5,)}, "mean has 1 values, but channels=3 needs 3"),
        ({"channels": 1}, "mean has 3 values, but channels=1 needs 1"),
        ({"channels": 4}, "channels must be"),
        ({"channels": True}, "channels must be"),
        ({"channels": 3.0}, r"channels must be 3 \(RGB\) or 1 \(grey\) for images, got 3.0"),
        ({"size": 10**30}, "size must be an integer from 1 to 8192, got an integer of 100 bits"),
        ({"size": 9000, "crop": 1.0}, "size must be"),
        ({"crop": 1e-7}, "size / crop must be <= 8192 pixels, got size=224, crop=1e-07"),
        ({"mean": (10**400, 0, 0)}, "mean must be a list of numbers within -1e6..1e6"),
        ({"mean": (1e30, 0, 0)}, "mean must be a list of numbers"),
        ({"std": (1e-30, 1, 1)}, "std must be >= 1e-6"),
        ({"std": (1, 1, 0)}, "std must be >= 1e-6"),
        ({"std": (1, 1, float("nan"))}, "std must be a list of numbers"),
        ({"mean": "abc"}, "mean must be a list of numbers"),
        ({"size": 0}, "size must be"),
        ({"size": 8.5}, "size must be"),
        ({"crop": 0}, "crop must be"),
        ({"crop": 1.1}, "crop must be"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; allowed: nearest"),
        ({"size": (8, 8.5)}, "size must be an integer from 1 to 8192, got 8.5"),
        ({"size": (8, 8, 8)}, r"size must be an integer from 1 to 8192, got \(8, 8, 8\)"),
        ({"size": ()}, "size must be"),
        ({"size": (8, 8000)}, r"size / crop must be <= 8192 pixels, got size=\(8, 8000\), crop=0.875"),
        ({"fit": "stretch"}, "unknown fit 'stretch'; allowed: crop, squash, pad, longest"),
        ({"fit": ["crop"]}, "unknown fit"),
        ({"resizer": "cv2"}, "unknown resizer 'cv2'; allowed: pil, torch"),
        ({"corner": "ceil"}, "unknown corner 'ceil'; allowed: round, floor"),
        ({"resizer": "torch", "interpolation": "lanczos"}, "resizer 'torch' has nearest, bilinear, bicubic, got 'lan"),
        ({"fit": "longest"}, "fit 'longest' cuts nothing, so crop must be 1.0, got 0.875"),
    ],
)
def test_bad_fields(fields: dict, words: str):
    with pytest.raises(ValueError, match=words) as error:
        ImagePreprocess(**fields)
    one_line(error)


def test_dict_survives_json():
    prepare = ImagePreprocess(size=9, channels=1, mean=(0.4,), std=(0.3,), crop=0.9)
    values = json.loads(json.dumps(prepare.to_dict()))
    assert values == prepare.to_dict()
    again = ImagePreprocess.from_dict(values)
    assert again == prepare and isinstance(again.mean, tuple) and hash(again) == hash(prepare)
    wide = ImagePreprocess(size=(9, 12), fit="pad", resizer="torch", corner="floor")
    again = ImagePreprocess.from_dict(json.loads(json.dumps(wide.to_dict())))
    assert again == wide and isinstance(again.size, tuple) and hash(again) == hash(wide)


def test_dict_with_unknown_key():
    with pytest.raises(ValueError, match="unknown preprocess key sizes; allowed: size, chan") as e:
        ImagePreprocess.from_dict({"sizes": 3})
    one_line(e)
    with pytest.raises(ValueError, match="must be a mapping, got list"):
        ImagePreprocess.from_dict([])  # pyright: ignore[reportArgumentType]


def test_pickles_after_use():
    PLAIN(picture())
    assert torch.equal(pickle.loads(pickle.dumps(PLAIN))(picture()), PLAIN(picture()))


def test_default_statistics():
    assert default_statistics(3) == (ImagePreprocess().mean, ImagePreprocess().std)
    for index in (0, 1):
        assert default_statistics(1)[index] == (pytest.approx(np.mean(default_statistics(3)[index]), abs=1e-3),)
