"""Files that give the labels of images."""

import json
from pathlib import Path

import pytest

from zoo.data.label_files import read_labels

IMAGES = ["root/x/a.JPEG", "root/b.v2.png", "root/c d.jpg"]


def read(path: Path, content: object):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_labels(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", "val/a.JPEG 65\n\nb.v2.png 970\nc d.jpg n01440764\n"),
        ("val.csv", "ImageId,label\na,65\nb.v2,970\nc d,n01440764\n"),
        (
            "a.csv",
            "\ufeffId, PredictionString\r\nb.v2,970 1 2 3 4 970 5 6 7 8 \r\na,65 1 2 3 4\r\nc d,n01440764 0 0 1 1\r\n",
        ),
        ("b.csv", 'split,filename,label\nval,"x/a.JPEG",65\nval,b.v2.png,970\nval,c d.jpg,n01440764\n'),
        ("c.json", {"a.JPEG": 65, "b.v2": "970", "c d": "n01440764"}),
        ("d.txt", "65\n970\nn01440764\n"),
        ("e.json", [65, 970, "n01440764"]),
    ],
    ids=lambda each: each if isinstance(each, str) and "." in each[:6] else "",
)
def test_the_usual_files(name: str, content: object, tmp_path: Path):
    found = read(tmp_path / name, content)
    assert not found.sets
    assert [each and each.labels for each in found.of(IMAGES)] == [("65",), ("970",), ("n01440764",)]


def test_sets_of_labels(tmp_path: Path):
    """As in real.json, where an image may have none; images are found by their numbers."""
    found = read(tmp_path / "real.json", [[1], [], [970, 795]])
    images = [f"val/ILSVRC2012_val_0000000{number}.JPEG" for number in (3, 1)]
    assert found.sets and [each and each.labels for each in found.of(images)] == [("970", "795"), ("1",)]
    with pytest.raises(ValueError, match="has labels of 3 images, but there is image 4"):
        found.of(["ILSVRC2012_val_00000004.JPEG"])


def test_an_image_without_a_label_is_none(tmp_path: Path):
    found = read(tmp_path / "val.txt", "a.png 1\n").of(["a.png", "b.png"])
    assert found[0] is not None and found[0].line == "line 1" and found[1] is None
    with pytest.raises(ValueError, match=r"two images are called a, so .*val.txt cannot tell them apart"):
        read_labels(tmp_path / "val.txt").of(["x/a.png", "y/a.png"])
    with pytest.raises(ValueError, match="has 2 labels, but there are 1 images"):
        read(tmp_path / "val.txt", "1\n2\n").of(["a.png"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no labels"),
        ("a.txt", "a.png 1\n2\n", ", line 2: must be like the first line, got '2'"),
        ("a.txt", "1\na.png 2\n", ", line 2: must be like the first line, got 'a.png 2'"),
        ("a.txt", "a.png 1\nx/a.png 2\n", ", line 2: x/a.png has a label already"),
        ("a.csv", "a,1\nb,2\n", "the header must name image and label, such as ImageId,label; got 'a,1'"),
        ("a.csv", "", "the header must name image and label"),
        ("a.csv", "image,label\na\n", ", line 2: must have an image and a label, got 'a'"),
        ("a.csv", "image,label\na,\n", ", line 2: must have an image and a label, got 'a,'"),
        ("a.csv", f"image,label\na,{'x' * 200_000}\n", "field larger than field limit"),
        ("a.json", "[", "not JSON"),
        ("a.json", "3", "must be a list with the labels of each image, or an object by image"),
        ("a.json", "[1, 2.5]", ", entry 1: labels must be numbers or names, got 2.5"),
        ("a.json", '{"a": 1, "a": 2}', "key 'a' appears twice"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_what_is_refused(name: str, content: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, content)
    assert str(error.value).startswith(str(tmp_path / name)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ValueError, match="none.txt: No such file"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_labels(tmp_path / "b.csv")
