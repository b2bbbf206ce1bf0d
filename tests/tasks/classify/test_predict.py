"""What `zoo classify predict` writes, the picture that it draws, and which images it takes."""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from classifying import LABELS, PREPROCESS, break_pictures, failure, noise, predict, save
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess, read_image
from zoo.tasks.classify import answers
from zoo.tasks.classify.predict import FILES
from zoo.weights import load_model


@torch.no_grad()
def by_hand(model: str, path: str) -> torch.Tensor:
    return load_model(model)(PREPROCESS(read_image(path))[None])[0].softmax(-1)


# What is written


def test_answers_are_the_model_s(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    entries = predict(model, "images", "--top", 3)
    assert [entry["path"] for entry in entries] == images
    for entry in entries:
        wanted = by_hand(model, entry["path"])
        assert [best["index"] for best in entry["top"]] == wanted.topk(3).indices.tolist()
        assert [best["probability"] for best in entry["top"]] == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-6)
        assert [best["label"] for best in entry["top"]] == [LABELS[best["index"]] for best in entry["top"]]
        assert entry.keys() == {"path", "label", "index", "probability", "top"}
        assert {key: entry[key] for key in ("label", "index", "probability")} == entry["top"][0]
    assert len({entry["index"] for entry in entries}) > 1
    said = capsys.readouterr()
    for entry, line in zip(entries, said.out.splitlines(), strict=True):
        assert line.split() == [*entry["path"].split(), *entry["label"].split(), f"{entry['probability']:.1%}"]
    wrote = "wrote predictions.json, predictions.csv, predictions.png to runs/predict"
    assert said.err == f"zoo: 4 of 4 images done; {wrote}\n"


def test_csv_says_what_json_says(model: str, images: list[str]):
    comma = noise(Path('a, "b".png'), 6)
    entries = predict(model, comma, "images")
    with open("runs/predict/predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probability", "index", "error"]
    for entry, row in zip(entries, rows, strict=True):
        assert (row["path"], row["label"], row["error"]) == (entry["path"], entry["label"], "")
        assert (float(row["probability"]), int(row["index"])) == (entry["probability"], entry["index"])


@pytest.mark.parametrize("top", [5, 99])
def test_all_probabilities_sum_to_one(model: str, images: list[str], top: int):
    for entry in predict(model, *images, "--top", top):
        values = [best["probability"] for best in entry["top"]]
        assert len(values) == 5 and sum(values) == pytest.approx(1, abs=1e-6)
        assert values == sorted(values, reverse=True)


def test_batch_size_changes_nothing(model: str, images: list[str]):
    break_pictures()
    runs = []
    for batch in (1, 4, 32):
        with pytest.raises(SystemExit):
            predict(model, "images", "--batch", batch, "--output", batch)
        runs.append(json.loads(Path(str(batch), "predictions.json").read_text()))
    for run in runs[1:]:
        for entry, wanted in zip(run, runs[0], strict=True):
            assert entry.keys() == wanted.keys()
            for key in entry.keys() - {"top"}:
                same = pytest.approx(wanted[key], abs=1e-6) if key == "probability" else wanted[key]
                assert entry[key] == same


def test_bf16_is_near(model: str, images: list[str]):
    exact = predict(model, "images", "--top", 5)
    near = predict(model, "images", "--top", 5, "--precision", "bf16", "--device", "cpu")
    apart = 0.0
    for one, other in zip(exact, near, strict=True):
        values = [{best["index"]: best["probability"] for best in entry["top"]} for entry in (one, other)]
        apart = max(apart, *(abs(values[0][index] - values[1][index]) for index in range(5)))
    assert 0 < apart < 0.03


def test_grey_model_without_labels(images: list[str]):
    grey = ImagePreprocess(size=16, channels=1, mean=(0.5,), std=(0.5,))
    name = save(Path("checkpoints/grey"), channels=1, preprocess=grey, labels=None)
    entries = predict("grey", "images")
    assert len(entries) == 4 and Path(name).name == "grey"
    assert all(entry["label"] == f"class {entry['index']}" for entry in entries)


# The picture


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (4, 2), (40, 6)])
def test_picture_is_a_grid(model: str, tmp_path: Path, number: int, columns: int):
    for index in range(number):
        noise(tmp_path / f"{index:02}.png", index, size=(24, 8 + index))
    predict(model, tmp_path, "--output", tmp_path / "out")
    with Image.open(tmp_path / "out/predictions.png") as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        assert 200 * columns < width < 600 * columns and width < height < 1.4 * width
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)


def texts(entries: list[dict[str, Any]], shown: int) -> list[str]:
    picture = Image.new("L", (3, 2))
    figure = answers.draw(entries, [(entry, picture) for entry in entries if "error" not in entry][:shown])
    axes = [figure.axes[0].get_title("left"), figure.axes[0].get_title("right"), figure.axes[0].texts[0].get_text()]
    assert len(figure.axes) == min(shown, len([entry for entry in entries if "error" not in entry]))
    return [*axes, figure.texts[0].get_text()]


def test_picture_says_answer_and_what_is_left_out():
    entry = {"path": "a/b/" + "x" * 50 + "1.jpeg", "label": "a label that\nis long " * 3, "probability": 0.1234}
    entry["top"] = [{"label": label, "probability": p} for label, p in (("$a$", 0.1234), ("b", 0.1), ("c" * 20, 0.05))]
    label, probability, name, note = texts([entry] * 7 + [{"path": "c", "error": "broken"}] * 2, 3)
    assert label == "a label that\\nis …" and probability == "12.3%"
    assert name == "x" * 23 + "…" + "xx1.jpeg\nor b (10.0%), cccccccccc… (5.0%)"
    assert note == "and 4 more in predictions.json; 2 had an error"
    for sure in ({"probability": 0.61}, {"top": entry["top"][:1]}):
        label, _, name, note = texts([entry | {"path": "a/b.jpg", "label": "short"} | sure], 3)
        assert (label, name, note) == ("short", "b.jpg", "")


def test_a_white_image_has_a_frame():
    entry = {"path": "a", "label": "b", "probability": 0.9, "top": []}
    figure = answers.draw([entry], [(entry, Image.new("L", (40, 20), 255))])
    figure.canvas.draw()  # pyright: ignore[reportAttributeAccessIssue]
    frame = next(patch for patch in figure.axes[0].patches if patch.get_linewidth() > 0)
    left, bottom, right, top = frame.get_window_extent().extents
    assert (right - left, top - bottom) == pytest.approx((3.6 * 120, 3.6 * 60))


def test_only_small_pictures_are_kept(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for index in range(5):
        noise(tmp_path / f"{index}.png", index, size=(700, 400))
    sizes = []
    monkeypatch.setattr(answers, "SHOWN", 3)
    draw = answers.draw

    def note(entries: list[dict[str, Any]], shown: list[Any]) -> Any:
        sizes.extend(image.size for _, image in shown)
        return draw(entries, shown)

    monkeypatch.setattr(answers, "draw", note)
    main(["classify", "predict", model, str(tmp_path), "--output", str(tmp_path / "out"), "--batch", "2"])
    assert sizes == [(320, 183)] * 3


# Which images


def test_named_files_are_tried_whatever_they_are_called(model: str, images: list[str]):
    named = [noise(Path("images/.hidden.png"), 4), str(Path("odd.name"))]
    Path(images[1]).rename(named[1])
    entries = predict(model, *named, "--top", 1, "images/rgba.png", "images", named[0])
    rest = ["images/b/deep/RGB.JPG", "images/deep.png"]
    assert [entry["path"] for entry in entries] == [*named, "images/rgba.png", *rest]


def test_its_own_picture_is_left_out(model: str, images: list[str]):
    other = noise(Path("images/b/predictions.png"), 7)
    first = predict(model, "images", "--output", "images")
    assert [entry["path"] for entry in first] == sorted([*images, other])
    assert predict(model, "images", "--output", "images/../images") == first


def test_links_are_followed_but_not_in_circles(model: str, images: list[str]):
    noise(Path("elsewhere/e.png"), 8)
    os.symlink(Path("elsewhere").resolve(), "images/link")
    os.symlink(Path("images").resolve(), "elsewhere/back")
    found = [entry["path"] for entry in predict(model, "images")]
    assert found == sorted([*images, "images/link/e.png"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_odd_names_stay_in_one_line(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    odd = os.fsdecode(b"line\nbreak \x1b[31m \xff.png")
    os.rename(noise(Path("odd.png"), 9), odd)
    (entry,) = predict(model, odd)
    assert entry["path"] == odd
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(r"line\nbreak \x1b[31m \udcff.png")
    Path(odd).write_bytes(b"")
    assert r"zoo: line\nbreak \x1b[31m \udcff.png: the file is empty" in failure(capsys, model, odd)
