"""Reading images: colours, depths and orientations of files, and what is broken, too large or no image."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import one_line, picture, pixels
from zoo.inputs import images
from zoo.inputs.images import (
    EXTENSIONS,
    FORMATS,
    UnreadableImage,
    convert_image,
    image_size,
    read_image,
)


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
