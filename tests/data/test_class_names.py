"""Names of classes: files that list them, and the outputs that they mean."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from zoo.data.class_names import Classes, Names, imagenet, read_names

TABLE = imagenet()
WNIDS = [names[0] for names in TABLE.classes]


def test_the_classes_of_imagenet():
    assert len(TABLE.classes) == 1000 and sorted(WNIDS) == WNIDS
    assert TABLE.classes[0][:3] == ("n01440764", "tench, Tinca tinca", "tench")
    assert TABLE.classes[150][0] == "n02077923" and "sea lion" in TABLE.classes[150]


@pytest.mark.parametrize("spelling", [0, 1, 2], ids=["synsets", "all names", "first names"])
def test_outputs_are_found_by_any_name(spelling: int):
    """Also where two classes have the same first name, crane and maillot."""
    labels = [names[min(spelling, len(names) - 1)] for names in TABLE.classes]
    found = Classes(labels, [TABLE])
    assert [found.find(wnid) for wnid in WNIDS] == list(range(1000))
    assert found.numbers == {number: number for number in range(1000)}
    assert found.find("Sea_Lion") == 150 and found.find("unicorn") is None


def test_outputs_in_another_order_and_fewer():
    found = Classes(["sea lion", "goldfish, Carassius auratus", "my cat"], [TABLE])
    assert [found.find(name) for name in ("n01443537", "n02077923", "my cat", "MY CAT")] == [1, 0, 2, 2]
    assert found.find("n01440764") is None
    assert {number: output for number, output in found.numbers.items() if output is not None} == {1: 1, 150: 0}


def test_a_name_of_two_classes_is_refused():
    labels = [names[2 if len(names) > 2 else 1] for names in TABLE.classes]
    with pytest.raises(ValueError, match=r"class 'crane' may be outputs 134 \(crane\) and 517 \(crane\)"):
        Classes(labels, [TABLE]).find("crane")
    assert Classes(["crane", "duck"], [TABLE]).find("n02012849") is None  # which crane it is, nothing says


def test_own_labels_come_first():
    """Digits are not numbers of ImageNet's classes."""
    found = Classes(list("210"), [TABLE])
    assert [found.find(name) for name in "012"] == [2, 1, 0] and found.numbers == {}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CLASSES = [("n01440764", "tench"), ("n01443537", "goldfish")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}),
        ("b.json", [["n01440764", "tench"], ["n01443537", "goldfish"]]),
        ("c.json", {"n01440764": "tench", "n01443537": "goldfish"}),
        ("d.txt", "n01440764 tench, Tinca tinca\n\nn01443537 goldfish, Carassius auratus\n"),
        ("e.txt", "\ufeffn01440764\ttench\r\nn01443537\tgoldfish\r\n"),
    ],
    ids=str,
)
def test_files_with_names(name: str, content: object, tmp_path: Path):
    found = read_names(write(tmp_path / name, content))
    assert [each[0] for each in found.classes] == [each[0] for each in CLASSES] and not found.ids
    assert all(pair[1] in each for pair, each in zip(CLASSES, found.classes, strict=True))
    classes = Classes(["goldfish", "tench"], [found])
    assert classes.find("n01440764") == 1 and classes.numbers == {0: 1, 1: 0}


def test_lists_of_names(tmp_path: Path):
    for name, content in (("a.txt", "cat\nblack dog\n"), ("a.json", ["cat", "black dog"])):
        assert read_names(write(tmp_path / name, content)) == Names([("cat",), ("black dog",)])
    assert read_names(write(tmp_path / "b.json", {"0": "cat", "1": "black dog"})).classes[1] == ("black dog",)


def test_numbers_of_the_development_kit(tmp_path: Path):
    """Its order is not that of the synsets; classes above 1000 are parents."""
    text = "n02119789 1 kit_fox\nn01440764 2 tench\nn01443537 3 goldfish\n"
    rows = [(1, "n02119789", "kit fox"), (2, "n01440764", "tench"), (3, "n01443537", "gold"), (1001, "n00001740", "x")]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", int), ("WNID", object), ("words", object)])
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    for path in (write(tmp_path / "map_clsloc.txt", text), tmp_path / "meta.mat"):
        names = read_names(path)
        assert names.ids == {1: "n02119789", 2: "n01440764", 3: "n01443537"}
        found = Classes(["tench, Tinca tinca", "kit fox, Vulpes macrotis"], [names, TABLE])
        assert found.numbers == {1: 1, 2: 0, 3: None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "Expecting property name"),
        ("a.json", 3, "must be a list of names, or names by number"),
        ("a.json", {"0": "cat", "2": "dog"}, "the numbers of 2 classes must be 0 to 1"),
        ("a.json", ["cat", 3], "the names of class 1 must be strings, got 3"),
        ("a.json", ["cat", ""], "the names of class 1 must be strings, got ''"),
        ("a.txt", "\n", "lists no classes"),
        ("a.txt", "n02119789 1 kit_fox\nn01440764 1 tench\n", "a number names two classes"),
        ("a.mat", "no", "not the meta.mat of ILSVRC2012"),
        ("missing.txt", None, "No such file or directory"),
    ],
    ids=str,
)
def test_what_is_refused(name: str, content: object, message: str, tmp_path: Path):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError) as error:
        read_names(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_names(tmp_path / "b.txt")
