"""`zoo detect predict`: COCO's JSON, CSV, an image, lines, and images that cannot be read."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detecting import saved
from training import refused
from zoo.__main__ import main
from zoo.outputs.label_map import LabelMap
from zoo.tasks.detect.answers import summary
from zoo.weights import load_checkpoint

LABELS = LabelMap(("cat", "dog", "a very long name of a category"), (7, 3, 90))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("checkpoint") / "model", LABELS, 64)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images of several sizes below ./images, of which one is broken; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    generator = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (90, 40), "b.jpg": (30, 70), "d.png": (64, 64)}.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(Path("images", name))
    Path("images/c.png").write_bytes(b"not an image")
    return ["images/a.png", "images/b.jpg", "images/d.png"]


def predict(*arguments: Any) -> None:
    main(["detect", "predict", *map(str, arguments), "--device", "cpu"])


def test_what_is_written(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    message = refused("detect", "predict", model, "images", "--output", "out", "--threshold", "0.2", "--device", "cpu")
    assert message == "1 of 4 images had an error"
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == images
    assert "images/c.png" in shown.err and "Traceback" not in shown.err
    found = json.loads(Path("out/detections.json").read_text())
    assert found["categories"] == [{"id": id, "name": name} for name, id in LABELS]
    names = {each["id"]: each["file_name"] for each in found["images"]}
    assert list(names.values()) == ["images/a.png", "images/b.jpg", "images/c.png", "images/d.png"]
    assert "error" in found["images"][2] and (found["images"][0]["width"], found["images"][0]["height"]) == (90, 40)
    with open("out/detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(not row["error"] for row in rows) == len(found["annotations"]) > 3
    checkpoint = load_checkpoint(model)
    for path in images:
        wanted = [each for each in checkpoint(path) if each.score >= 0.2]
        got = [each for each in found["annotations"] if names[each["image_id"]] == path]
        assert [each["score"] for each in got] == pytest.approx([each.score for each in wanted], abs=1e-5)
        for one, other in zip(got, wanted, strict=True):
            left, top, width, height = one["bbox"]
            assert (left, top, left + width, top + height) == pytest.approx(other.box, abs=0.05)
            assert dict(LABELS)[other.label] == one["category_id"]
    with Image.open("out/detections.png") as drawn:
        assert drawn.width > 600


def test_a_threshold_of_one_finds_nothing(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    predict(model, images[0], "--output", "out", "--threshold", "1")
    assert "no objects" in capsys.readouterr().out
    assert json.loads(Path("out/detections.json").read_text())["annotations"] == []
    with pytest.raises(SystemExit):
        predict(model, images[0], "--threshold", "1.5")


def test_objects_are_counted_by_category():
    assert summary([{"label": "ray"}, {"label": "fish"}, {"label": "fish"}]) == "2 fish, 1 ray"
    assert summary([]) == "no objects"
