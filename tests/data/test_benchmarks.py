"""Images to evaluate a classifier on, in the layouts of public data sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zoo.data.benchmarks import Benchmark

LABELS = ("goldfish, Carassius auratus", "tench, Tinca tinca", "sea lion", "kit fox, Vulpes macrotis")
WNIDS = ("n01443537", "n01440764", "n02077923", "n02119789")
NUMBERS = (1, 0, 150, 278)


def paint(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def folders(root: Path, *names: str) -> str:
    """Two images for each class."""
    for name in names:
        for index in range(2):
            paint(root / name / f"{index}.png")
    return str(root)


def flat(root: Path, number: int = 4) -> str:
    for index in range(number):
        paint(root / f"ILSVRC2012_val_{index + 1:08}.JPEG")
    return str(root)


def labels(data: Benchmark) -> list[tuple[str, int]]:
    source = data.source("val")
    return [(Path(source.name(i)).parent.name, int(label)) for i, label in enumerate(source.labels)]


@pytest.mark.parametrize("names", [LABELS, WNIDS, tuple(map(str, NUMBERS))], ids=["own", "synsets", "numbers"])
def test_folders_are_matched_by_name(names: tuple[str, ...], tmp_path: Path):
    """Their order on disk is another one than that of the outputs. Numbers are those of ImageNet-V2's folders."""
    data = Benchmark(LABELS, folders(tmp_path, *names))
    assert labels(data) == [(name, names.index(name)) for name in sorted(names) for _ in range(2)]
    assert data.part == "all" and data.allowed is None and data.classes == list(LABELS)
    assert data.named("top-1 accuracy") == "top-1 accuracy"


def test_a_subset_restricts_the_logits(tmp_path: Path):
    data = Benchmark(LABELS, folders(tmp_path, *WNIDS[1:3]))
    assert sorted({label for _, label in labels(data)}) == [1, 2]
    logits, wanted = data.judged(torch.tensor([[9.0, 1.0, 2.0, 8.0]]), torch.tensor([2]))
    assert logits.tolist() == [[-torch.inf, 1.0, 2.0, -torch.inf]] and wanted.tolist() == [2]
    assert data.named("top-1 accuracy") == "top-1 accuracy among 2 of 4 classes"


def test_the_folder_of_a_split(tmp_path: Path):
    folders(tmp_path / "val", *WNIDS)
    folders(tmp_path / "train", "other")
    assert Benchmark(LABELS, str(tmp_path)).part == "val"
    with pytest.raises(ValueError, match="has no folder test"):
        Benchmark(LABELS, str(tmp_path), split="test")
    with pytest.raises(ValueError, match="has no folder val or valid or validation"):
        (tmp_path / "val").rename(tmp_path / "other")
        Benchmark(LABELS, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", "".join(f"ILSVRC2012_val_{i + 1:08}.JPEG {number}\n" for i, number in enumerate(NUMBERS))),
        ("val.csv", "ImageId,label\n" + "".join(f"ILSVRC2012_val_{i + 1:08},{x}\n" for i, x in enumerate(WNIDS))),
        ("synsets.txt", "\n".join(WNIDS)),
        ("labels.json", json.dumps(LABELS)),
    ],
    ids=lambda each: each[:11],
)
def test_a_flat_folder_with_a_label_file(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    data = Benchmark(LABELS, flat(tmp_path / "val"), labels=str(tmp_path / name))
    assert [label for _, label in labels(data)] == [0, 1, 2, 3] and data.allowed is None


def test_the_ground_truth_of_the_development_kit(tmp_path: Path):
    """Its numbers have an order of their own, so they are refused without its names."""
    root, truth = flat(tmp_path / "val"), tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("2\n1\n1\n3\n")
    with pytest.raises(ValueError, match=r"line 1: numbers of the development kit; --names must give its meta.mat"):
        Benchmark(LABELS, root, labels=str(truth)).source("val")
    names = tmp_path / "map_clsloc.txt"
    names.write_text("n02119789 1 kit_fox\nn01440764 2 tench\nn01443537 3 goldfish\n")
    data = Benchmark(LABELS, root, labels=str(truth), names=str(names))
    assert [label for _, label in labels(data)] == [1, 3, 3, 0]


def test_real_accepts_any_label_of_a_set(tmp_path: Path):
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[1], [], [0, 150], [278]]))
    data = Benchmark(LABELS, folders_of_val(tmp_path), labels=str(real))
    places = [label for _, label in labels(data)]
    assert len(places) == 3 and data.accepted is not None
    assert [data.accepted[place].nonzero()[:, 0].tolist() for place in places] == [[1, 2], [3], [0]]
    best = torch.tensor([2, 1, 0])
    _, wanted = data.judged(torch.eye(4)[best], torch.tensor(places))
    assert (wanted == best).tolist() == [True, False, True]
    assert data.named("top-1 accuracy") == "ReaL accuracy" and data.named("top-5 accuracy") is None


def folders_of_val(root: Path) -> str:
    """The images of ImageNet's validation set in class folders, which ReaL does not need."""
    for index in range(4):
        paint(root / "val" / WNIDS[3 - index] / f"ILSVRC2012_val_{index + 1:08}.JPEG")
    return str(root)


def test_unknown_classes_may_be_skipped(tmp_path: Path):
    root = folders(tmp_path, *WNIDS[:2], "unicorn")
    with pytest.raises(ValueError, match="unicorn: the checkpoint knows no class 'unicorn'; it knows: goldfish"):
        Benchmark(LABELS, root).source("val")
    with pytest.warns(UserWarning, match="skipped 2 images of classes that the checkpoint does not know"):
        data = Benchmark(LABELS, root, skip_unknown=True)
        assert {label for _, label in labels(data)} == {0, 1}
    with (
        pytest.raises(ValueError, match="has no image of a class that the checkpoint knows"),
        pytest.warns(UserWarning),
    ):
        Benchmark(("a", "b"), root, skip_unknown=True).source("val")


def test_a_checkpoint_without_names_needs_them(tmp_path: Path):
    with pytest.raises(ValueError, match="--names FILE must list those of its outputs"):
        Benchmark(None, folders(tmp_path / "x", "cat", "dog"))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    data = Benchmark(None, str(tmp_path / "x"), names=str(tmp_path / "names.txt"))
    assert labels(data)[0] == ("cat", 1) and data.classes == ["dog", "cat"]


def test_digits_are_matched_by_name_too():
    data = Benchmark(tuple("9876543210"))
    plain = Benchmark(tuple("0123456789")).source("val")
    assert (data.source("val").labels == 9 - plain.labels).all() and data.part == "val"
    with pytest.raises(ValueError, match="knows no class '9'"):
        Benchmark(tuple("012345678")).source("val")


def write(root: Path, content: str) -> dict[str, Any]:
    (root / "labels.txt").write_text(content)
    return {"labels": str(root / "labels.txt")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0\n1\n1000\n1\n", "labels.txt, line 3: label 1000 is not from 0 to 999"),
        ("0\n1\n7\n1\n", "labels.txt, line 3: the checkpoint knows no class '7'"),
        ("n01440764\nn01443537\nunicorn\nn01440764\n", "line 3: the checkpoint knows no class 'unicorn'"),
        ("0\n1\n", "has labels of 2 images, but there is image 4"),
        ("ILSVRC2012_val_00000001.JPEG 0\n", "ILSVRC2012_val_00000002.JPEG (3 images in all)"),
    ],
    ids=str,
)
def test_labels_that_are_refused(content: str, message: str, tmp_path: Path):
    options = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        Benchmark(LABELS, flat(tmp_path / "val"), **options).source("val")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_need_names_where_imagenets_are_unknown(tmp_path: Path):
    options = write(tmp_path, "0\n1\n")
    paint(tmp_path / "val" / "a.png")
    paint(tmp_path / "val" / "b.png")
    with pytest.raises(ValueError, match="label 0 is a number; --names FILE must list the classes in their order"):
        Benchmark(("dog", "cat"), str(tmp_path / "val"), **options).source("val")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    data = Benchmark(("dog", "cat"), str(tmp_path / "val"), names=str(tmp_path / "names.txt"), **options)
    assert [label for _, label in labels(data)] == [1, 0]


def test_more_labels_than_images_are_reported(tmp_path: Path):
    root, options = flat(tmp_path / "val", 2), write(tmp_path, "0\n1\n150\n")
    with pytest.warns(UserWarning, match="has labels of 1 image more than"):
        assert [label for _, label in labels(Benchmark(LABELS, root, **options))] == [1, 0]


def test_folders_that_are_refused(tmp_path: Path):
    def refused(root: Path, **more: Any) -> str:
        with pytest.raises(ValueError) as error:
            Benchmark(LABELS, str(root), **more).source("val")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(tmp_path / "none").endswith("none is not a folder")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("empty has no images")
    folders(tmp_path / "same", "n01440764", "Tench")
    assert "classes 'Tench' and 'n01440764' are both 'tench, Tinca tinca'" in refused(tmp_path / "same")
    folders(tmp_path / "some", *WNIDS)
    (tmp_path / "some" / "n02012849").mkdir()
    assert "has class folders without images: n02012849" in refused(tmp_path / "some")
    assert "--labels FILE gives the labels" in refused(Path(flat(tmp_path / "flat")))
    with pytest.raises(ValueError, match="need --root"):
        Benchmark(LABELS, labels="x")
