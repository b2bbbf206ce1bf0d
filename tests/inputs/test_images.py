import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from zoo.inputs import images
from zoo.inputs.images import (
    EXTENSIONS,
    FORMATS,
    INTERPOLATIONS,
    ImagePreprocess,
    UnreadableImage,
    convert_image,
    default_statistics,
    image_size,
    read_image,
)

PLAIN = ImagePreprocess(size=8, mean=(0, 0, 0), std=(1, 1, 1), crop=1.0)


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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


def test_colour_and_grey(tmp_path: Path):
    source = picture()
    source.save(tmp_path / "colour.png")
    assert read_image(tmp_path / "colour.png").mode == "RGB"
    assert (pixels(read_image(tmp_path / "colour.png")) == pixels(source)).all()
    grey = read_image(str(tmp_path / "colour.png"), channels=1)
    assert grey.mode == "L" and (pixels(grey) == pixels(source.convert("L"))).all()
    grey.save(tmp_path / "grey.png")
    repeated = pixels(read_image(tmp_path / "grey.png", channels=3))
    assert (repeated == pixels(grey)[..., None]).all()
    with pytest.raises(ValueError, match="channels must be"):
        read_image(tmp_path / "grey.png", channels=2)


def test_bilevel(tmp_path: Path):
    source = picture().convert("1")
    source.save(tmp_path / "p.png")
    assert set(np.unique(pixels(read_image(tmp_path / "p.png")))) == {0, 255}


def test_transparency_is_laid_on_white(tmp_path: Path):
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0] = [[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]
    Image.fromarray(values).save(tmp_path / "p.png")
    expected = [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]
    assert pixels(read_image(tmp_path / "p.png")).tolist() == expected
    assert pixels(read_image(tmp_path / "p.png", channels=1)).tolist() == [[255, 76, 204]]
    Image.fromarray(values[..., 2:]).save(tmp_path / "la.png")
    assert pixels(read_image(tmp_path / "la.png", channels=1)).tolist() == [[255, 0, 204]]


def test_palette_with_transparency(tmp_path: Path):
    source = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode=None).convert("P")
    source.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    source.putdata([0, 1, 2])
    source.save(tmp_path / "p.png", transparency=1)
    expected = [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    assert pixels(read_image(tmp_path / "p.png")).tolist() == expected
    source.save(tmp_path / "opaque.png")
    assert pixels(read_image(tmp_path / "opaque.png"))[0, 1].tolist() == [0, 255, 0]


GRADIENT = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(4, 256)


@pytest.mark.parametrize("name", ["p.png", "p.tif", "big_endian.tif", "p.pgm"])
def test_16_bit_gradient(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "p.pgm":
        path.write_bytes(b"P5 256 4 65535\n" + GRADIENT.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.frombytes("I;16B", (256, 4), GRADIENT.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(GRADIENT).save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    expected = np.rint(GRADIENT / 257).astype(int)
    assert (pixels(read_image(path, channels=1)) == expected).all()
    assert (pixels(read_image(path)) == expected[..., None]).all()


def test_16_bit_transparency(tmp_path: Path):
    Image.fromarray(GRADIENT).save(tmp_path / "p.png", transparency=0)
    result = pixels(read_image(tmp_path / "p.png", channels=1))
    assert result[0, 0] == 255 and result[0, 1] == 0 and result[-1, -1] == 255


def test_16_bit_colour(tmp_path: Path):
    rows = GRADIENT[:, :, None].repeat(3, axis=2).astype(">u2")
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    (tmp_path / "p.png").write_bytes(png(256, 4, 16, 2, scanlines))
    assert np.abs(pixels(read_image(tmp_path / "p.png")) - rows / 257).max() <= 1


def test_values_of_unknown_range(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(UnreadableImage, match=r"wide\.tif: values .* do not fit in 16 bits") as error:
        read_image(tmp_path / "wide.tif")
    one_line(error)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match=r"float\.tif: the range of floating-point"):
        read_image(tmp_path / "float.tif")


def test_cmyk(tmp_path: Path):
    Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK").save(tmp_path / "p.jpg")
    colour = pixels(read_image(tmp_path / "p.jpg"))[8, 8]
    assert np.abs(colour - [200, 100, 50]).max() <= 3
    assert read_image(tmp_path / "p.jpg", channels=1).mode == "L"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path: Path, suffix: str):
    source = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    source.save(tmp_path / f"p.{suffix}", exif=exif)
    turned = source.transpose(Image.Transpose.ROTATE_270)
    assert (pixels(read_image(tmp_path / f"p.{suffix}")) == pixels(turned)).all()


def chunk(kind: bytes, body: bytes, checksum: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not checksum))


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        chunk(b"tEXt", b"a\0b", checksum=False),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22))),
        chunk(b"iCCP", b"x"),
        chunk(b"gAMA", b""),
        chunk(b"sRGB", b""),
        chunk(b"pHYs", b"1"),
        chunk(b"acTL", b"12"),
        chunk(b"tRNS", b"1", checksum=False),
    ],
    ids=lambda broken: broken[4:8].decode(),
)
def test_png_with_a_broken_chunk_beside_its_pixels(broken: bytes, tmp_path: Path):
    picture().save(tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    (tmp_path / "p.png").write_bytes(content[:33] + broken + content[33:])
    assert (pixels(read_image(tmp_path / "p.png")) == pixels(picture())).all()
    (tmp_path / "p.png").write_bytes(content[:33] + broken + content[33:-200])
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "p.png")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_broken_exif(suffix: str, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    broken = b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03"  # it ends within the orientation
    picture().save(tmp_path / f"p.{suffix}", exif=broken if suffix == "webp" else b"Exif\0\0" + broken)
    assert read_image(tmp_path / f"p.{suffix}").size == (30, 20) and not recwarn.list


def test_extensions_are_those_of_the_formats(tmp_path: Path):
    Image.init()
    for name, kind in Image.registered_extensions().items():
        read = kind in FORMATS or kind == "MPO"  # MPO files are JPEGs with more behind
        assert (name in EXTENSIONS) == (read and name != ".pfm"), name  # floats of no known range
    for extension in (".gif", ".avif", ".jp2", ".jfif", ".jpe", ".mpo", ".apng"):
        if Image.registered_extensions()[extension] in Image.SAVE:
            picture().save(tmp_path / f"a{extension}")
            assert read_image(tmp_path / f"a{extension}").size == (30, 20)


def test_large_images_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).integers(0, 65536, (50, 31), dtype=np.uint16)
    sources = [Image.fromarray(values), Image.fromarray(values.astype(np.int32)), picture().convert("RGBA")]
    sources[2].putalpha(picture().getchannel(1))
    sources.append(picture().convert("P"))
    sources[3].info["transparency"] = 7
    whole = [pixels(convert_image(source, channels)) for source in sources for channels in (1, 3)]
    monkeypatch.setattr(images, "STRIP", 100)
    for source, wanted in zip((source for source in sources for _ in range(2)), whole, strict=True):
        assert (pixels(convert_image(source, 1 if wanted.ndim == 2 else 3)) == wanted).all()


@pytest.mark.slow
def test_a_large_grey_image_of_16_bits_takes_little_memory(tmp_path: Path):
    Image.fromarray(np.zeros((13_300, 13_300), np.uint16)).save(tmp_path / "p.png")
    code = f"""
import resource
from zoo.inputs.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_image({str(tmp_path / "p.png")!r}, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 1000


def test_first_picture_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "p.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(read_image(tmp_path / "p.webp"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm"])
def test_truncated(tmp_path: Path, suffix: str):
    path = tmp_path / f"p.{suffix}"
    picture(64, 64).save(path)
    whole = path.read_bytes()
    for share in (0.05, 0.5, 0.97):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UnreadableImage) as error:
            read_image(path)
        assert one_line(error).startswith(f"{path}: ")


def test_no_picture(tmp_path: Path):
    contents = {
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"no image\nat all", "not an image"),
        "header.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), ""),
    }
    for name, (content, reason) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage) as error:
            read_image(tmp_path / name)
        assert one_line(error).startswith(f"{tmp_path / name}: {reason}")
    with pytest.raises(UnreadableImage, match="nowhere.png: No such file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(UnreadableImage, match="Is a directory"):
        read_image(tmp_path)


def test_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("two\nlines")

    picture().save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableImage, match=r"p\.png: two lines$"):
        read_image(tmp_path / "p.png")


def test_postscript_is_not_run(tmp_path: Path):
    picture().save(tmp_path / "p.eps")
    (tmp_path / "p.eps").rename(tmp_path / "p.jpg")
    with pytest.raises(UnreadableImage, match=r"not an image \(JPEG, PNG"):
        read_image(tmp_path / "p.jpg")


def test_decompression_bomb(tmp_path: Path):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000, 1, 0, bytes(100)))
    with pytest.raises(UnreadableImage, match=r"bomb\.png: .*decompression bomb") as error:
        read_image(tmp_path / "bomb.png")
    one_line(error)


def test_convert_image_keeps_its_input():
    source = picture()
    converted = convert_image(source, 3)
    converted.putpixel((0, 0), (1, 2, 3))
    assert (pixels(source) == pixels(picture())).all()


def png(width: int, height: int, depth: int, colour: int, scanlines: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    result = b"\x89PNG\r\n\x1a\n"
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(scanlines)), (b"IEND", b""))
    for kind, data in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        result += struct.pack(">I", len(data)) + kind + data + checksum
    return result


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_the_size_of_the_header_is_that_of_the_image(orientation: int | None, extension: str, tmp_path: Path):
    path, exif = tmp_path / f"a.{extension}", Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture(20, 30).save(path, exif=exif)
    image = read_image(path)
    assert image_size(path) == (image.height, image.width)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_the_size_next_to_broken_metadata(tmp_path: Path):
    picture(20, 30).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0broken")
    assert image_size(tmp_path / "a.jpg") == (20, 30)


def test_the_size_of_what_is_no_image(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="a.png: the file is empty"):
        image_size(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="b.png: No such file"):
        image_size(tmp_path / "b.png")
