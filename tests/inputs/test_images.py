import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.inputs.images import (
    INTERPOLATIONS,
    ImagePreprocess,
    UnreadableImage,
    convert_image,
    default_statistics,
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
    "tensor",
    [
        torch.zeros(8, 8, 3),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_tensor_of_wrong_kind(tensor: torch.Tensor):
    with pytest.raises(ValueError, match="must be uint8") as error:
        PLAIN(tensor)
    one_line(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": (0.5,)}, "mean has 1 values, but channels=3 needs 3"),
        ({"channels": 1}, "mean has 3 values, but channels=1 needs 1"),
        ({"channels": 4}, "channels must be"),
        ({"channels": True}, "channels must be"),
        ({"std": (1, 1, 0)}, "std must be above 0"),
        ({"std": (1, 1, float("nan"))}, "std must be a list of numbers"),
        ({"mean": "abc"}, "mean must be a list of numbers"),
        ({"size": 0}, "size must be"),
        ({"size": 8.5}, "size must be"),
        ({"crop": 0}, "crop must be"),
        ({"crop": 1.1}, "crop must be"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; allowed: nearest"),
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


def test_dict_with_unknown_key():
    with pytest.raises(ValueError, match="unknown preprocess key sizes; allowed: size, chan") as e:
        ImagePreprocess.from_dict({"sizes": 3})
    one_line(e)
    with pytest.raises(ValueError, match="must be a mapping, not list"):
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
    with pytest.raises(UnreadableImage, match=r"wide\.tif: values .* do not fit 16 bits") as error:
        read_image(tmp_path / "wide.tif")
    one_line(error)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match=r"float\.tif: floating-point"):
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
        "text.png": (b"not a picture\nat all", "not a picture"),
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

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableImage, match=r"p\.png: two lines$"):
        read_image(tmp_path / "p.png")


def test_postscript_is_not_run(tmp_path: Path):
    picture().save(tmp_path / "p.eps")
    (tmp_path / "p.eps").rename(tmp_path / "p.jpg")
    with pytest.raises(UnreadableImage, match=r"not a picture \(JPEG, PNG"):
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
