import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
