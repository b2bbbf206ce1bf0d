import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.benchmarks import Benchmark
from zoo.data.images import Images
from zoo.inputs.images import EXTENSIONS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def count(root: Path, split: str = "train") -> list[int]:
    source = Images(dataset="imagefolder", root=str(root)).source(split)
    assert len(source.classes) == 2
    return np.bincount(source.labels, minlength=2).tolist()


def test_links_do_not_multiply_the_set(root: Path):
    os.symlink("..", root / "train/ant/up")
    os.symlink(".", root / "train/bee/self")
    os.symlink("../..", root / "train/bee/root")
    os.symlink("../ant/0.png", root / "train/bee/again.png")
    os.symlink("..", root / "train/back")  # is no class
    with pytest.warns(UserWarning, match=r"train: omitted 5 links to files already used \(such as .*train/ant/up\)$"):
        assert count(root) == [3, 3]
    assert count(root, "val") == [3, 3]


def test_classes_and_images_may_be_links_to_a_pool(root: Path):
    (root / "val/bee").rename(root / "pool")
    os.symlink("../pool", root / "val/bee")
    Image.new("RGB", (8, 8)).save(root / "lone.png")
    os.symlink("../../lone.png", root / "val/ant/lone.png")
    assert count(root, "val") == [4, 3]


def test_every_format_that_is_read_is_found(root: Path):
    for extension in EXTENSIONS:
        (root / "train/ant" / f"x{extension.upper()}").touch()
    assert count(root) == [3 + len(EXTENSIONS), 3]


def test_images_without_class_folders(tmp_path: Path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train/0.png")
    with pytest.raises(
        ValueError, match=r"train has no class folders; put the images of each class into .*train/<class>"
    ):
        count(tmp_path)


def test_a_class_folder_that_links_to_another_class(root: Path):
    for split in ("train", "val"):
        os.symlink("ant", root / split / "cat")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"class folders without images of their own .*: cat$"),
    ):
        count(root)


def test_control_characters_of_names_are_escaped(root: Path):
    os.symlink("..", root / "train/ant/\x1b[31m")
    with pytest.warns(UserWarning, match=r"\\x1b\[31m") as said:
        count(root)
    assert all(str(warning.message).isprintable() for warning in said)


# Fashion-MNIST

SIZES = {"train": 5003, "t10k": 7}


def idx(values: np.ndarray) -> bytes:
    """A file of MNIST's format."""
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


@pytest.fixture(params=["plain", "gzipped"])
def fashion(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for part, number in SIZES.items():
        images = np.arange(number)[:, None, None] % 251 + np.zeros((1, 4, 4))
        for name, values in {"images-idx3": images, "labels-idx1": np.arange(number) % 10}.items():
            path, data = tmp_path / f"{part}-{name}-ubyte", idx(values)
            if request.param == "plain":
                path.write_bytes(data)
            else:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data, 1))
    return tmp_path


def test_fashion_mnist(fashion: Path):
    """The last 5,000 training images are for validation; the test images are those of the other files."""
    data = Images(dataset="fashion_mnist", root=str(fashion), channels=1, size=4)
    for split, first, number in (("train", 0, 3), ("val", 3, 5000), ("test", 0, 7)):
        source = data.source(split)
        assert len(source.labels) == number and len(source.classes) == 10
        for index in (0, number - 1):
            assert np.asarray(source.image(index)).tolist() == [[(first + index) % 251] * 4] * 4
            assert source.labels[index] == (first + index) % 10
    assert data.classes[:2] == ["T-shirt/top", "Trouser"]


def test_fashion_mnist_is_measured(fashion: Path):
    """Classes are matched by name, whatever their order in the checkpoint."""
    known = [*Images(dataset="fashion_mnist", root=str(fashion)).classes][::-1]
    for split, number in (("val", 5000), ("test", 7)):
        data = Benchmark(known, str(fashion), split)
        assert data.part == split and len(data.source(split).labels) == number
    assert data.source("test").labels.tolist() == [9, 8, 7, 6, 5, 4, 3]
    with pytest.raises(ValueError, match="omit --labels"):
        Benchmark(known, str(fashion), labels="labels.txt")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t10k-labels-idx1", b"", "is not a file of MNIST's format"),
        ("t10k-labels-idx1", idx(np.zeros(6)), "7 images and 6 labels"),
        ("t10k-labels-idx1", idx(np.full(7, 10)), "does not hold Fashion-MNIST"),
        ("t10k-images-idx3", idx(np.zeros((7, 4, 4)))[:-1], "truncated"),
        ("t10k-images-idx3", idx(np.zeros((7, 4, 4))) + b"0", "is not a file of MNIST's format"),
        ("t10k-images-idx3", b"\0\0\x0d\x03" + bytes(12), "is not a file of MNIST's format"),
        ("t10k-images-idx3", b"\0\0\x08\xff", "is not a file of MNIST's format"),
        ("t10k-images-idx3", idx(np.zeros(7)), "does not hold Fashion-MNIST"),
        ("t10k-images-idx3", None, "cannot read .*t10k-images-idx3-ubyte.gz"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else str(value),
)
@pytest.mark.parametrize("fashion", ["plain"], indirect=True)
def test_damaged_fashion_mnist(fashion: Path, name: str, data: bytes | None, words: str):
    path = fashion / f"{name}-ubyte"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        Images(dataset="fashion_mnist", root=str(fashion)).source("test")


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(bytes(100), mtime=0)[:-9]], ids=["no gzip", "cut off"])
def test_a_damaged_gzip(tmp_path: Path, data: bytes):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot read {re.escape(str(tmp_path))}"):
        Images(dataset="fashion_mnist", root=str(tmp_path)).source("val")


@pytest.mark.parametrize("fashion", ["gzipped"], indirect=True)
def test_fashion_mnist_without_images_or_of_any_size(fashion: Path, monkeypatch: pytest.MonkeyPatch):
    for name, values in {"images-idx3": np.zeros((20, 4, 4)), "labels-idx1": np.zeros(20)}.items():
        (fashion / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx(values)))
    data = Images(dataset="fashion_mnist", root=str(fashion), channels=1, size=4)
    assert len(data.source("val").labels) == 20
    with pytest.raises(ValueError, match="holds 20 images of Fashion-MNIST, too few for the split train"):
        data.source("train")
    monkeypatch.setattr("zoo.data.image_sources._LARGEST", 100)
    with pytest.raises(ValueError, match="is not a file of MNIST's format"):
        data.source("test")
