import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from helpers import randomise
from zoo import weights
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess, read_image
from zoo.tasks.classify import answers
from zoo.tasks.classify.predict import FILES
from zoo.weights import load_checkpoint, load_model, save_model

LABELS = ["ant", "bee", "a cat, or whatever else purrs at home", "$dog_", "猫"]
PREPROCESS = ImagePreprocess(size=16)


def save(folder: Path, **more: Any) -> str:
    given = {"classes": 5, "channels": 3, "preprocess": PREPROCESS, "labels": LABELS} | more
    small = {key: given.pop(key) for key in ("classes", "channels")}
    torch.manual_seed(0)  # a fixture of the session comes before the test's own seed
    model: Any = randomise(zoo.create_model("vit_micro", dim=32, depth=1, heads=2, image=16, patch=8, **small))
    for parameter in model.head.parameters() if small["classes"] else ():
        parameter.data *= 3.0 if parameter.ndim == 2 else 0.0  # so that images differ in their answers
    return str(save_model(model, folder, preset="vit_micro", **given))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("checkpoint") / "model")


def noise(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> str:
    """A picture whose colours depend on the seed, so that answers differ."""
    generator = np.random.default_rng(seed)
    depth = {"L": (), "RGB": (3,), "RGBA": (4,)}.get(mode, ())
    values = generator.integers(0, 256, depth) * 0.7 + generator.integers(0, 77, (size[1], size[0], *depth))
    kind = np.uint16 if mode == "I;16" else np.uint8
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values * (257 if mode == "I;16" else 1)).astype(kind)).save(path)
    return str(path)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pictures of every kind below ./images, which is sorted; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    made = [noise(folder / "b/deep/RGB.JPG", 0, size=(96, 80)), noise(folder / "b/grey.png", 1, "L")]
    made += [noise(folder / "deep.png", 2, "I;16"), noise(folder / "rgba.png", 3, "RGBA", (40, 9))]
    noise(folder / ".hidden.png", 4)
    noise(folder / "b/.hidden/inside.png", 5)
    (folder / "notes.txt").write_text("no picture")
    return made


def break_pictures() -> list[str]:
    whole = Path("images/b/deep/RGB.JPG").read_bytes()
    Path("images/c.jpg").write_bytes(whole[: len(whole) // 2])
    Path("images/text.jpg").write_text("text")
    return ["images/c.jpg", "images/text.jpg"]


def predict(*arguments: object) -> list[dict[str, Any]]:
    main(["classify", "predict", *map(str, arguments)])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs/predict"
    return json.loads(Path(str(output), "predictions.json").read_text(encoding="utf-8"))


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", *map(str, arguments)])
    sys.stderr.write(str(exit.value.code) if isinstance(exit.value.code, str) else "")
    text = capsys.readouterr().err
    assert exit.value.code == 2 or text.splitlines()[-1].startswith("zoo: error: ")
    return text


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


# What is wrong


def test_unreadable_pictures_stop_no_other(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    good = predict(model, "images", "--output", "good")
    broken = break_pictures()
    capsys.readouterr()
    text = failure(capsys, model, "images").splitlines()
    assert [line.split(": ")[:2] for line in text[:2]] == [["zoo", path] for path in broken]
    assert text[-1] == "zoo: error: 2 of 6 images had an error" and len(text) == 4
    entries = json.loads(Path("runs/predict/predictions.json").read_text())
    assert [entry["path"] for entry in entries] == sorted([*images, *broken])
    failed = [entry for entry in entries if "error" in entry]
    assert [entry["path"] for entry in failed] == broken
    assert all(entry.keys() == {"path", "error"} for entry in failed)
    assert failed[0]["error"].startswith("image file is truncated") and failed[1]["error"].startswith("not an image")
    rest = [entry for entry in entries if "error" not in entry]
    assert [entry["label"] for entry in rest] == [entry["label"] for entry in good]
    with open("runs/predict/predictions.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows[broken[0]]["error"] == failed[0]["error"] and rows[broken[0]]["label"] == ""


def test_nothing_readable_writes_nothing(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    before = predict(model, "images")
    broken = break_pictures()
    text = failure(capsys, model, *broken)
    assert text.endswith("error: no prediction for any of the 2 images; nothing was written to runs/predict")
    assert json.loads(Path("runs/predict/predictions.json").read_text()) == before
    failure(capsys, model, *broken, "--output", "fresh")
    assert os.listdir("fresh") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "nowhere"], "file or folder not found: 'nowhere'"),
        (["MODEL", ""], "file or folder not found: ''"),
        (["MODEL", "images", "empty"], "no image in folder 'empty' (.jpg .jpeg"),
        (["nowhere", "images"], "checkpoint 'nowhere' not found"),
        (["plain", "images"], "plain has no preprocess in its config.json"),
        (["backbone", "images"], "backbone is a backbone without a head"),
        (
            ["MODEL", "images", "--output", "images/deep.png"],
            "--output must be a folder; images/deep.png is a file",
        ),
        (["MODEL", "images", "--top", "0"], "must be an integer from 1 to 999999999, got '0'"),
        (["MODEL", "images", "--batch", "1.5"], "must be an integer from 1 to 999999999, got '1.5'"),
        (["MODEL", "images", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["MODEL", "images", "--prec", "bf16"], "unrecognized arguments: --prec"),
        (["MODEL"], "required: PATH (see --help)"),
        ([], "required: NAME, PATH (see --help)"),
        (["run", "images"], "run is a run, not a checkpoint; did you mean run/best?"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: list[str], words: str, model: str, images: list[str], capsys: pytest.CaptureFixture[str]
):
    Path("empty/.hidden").mkdir(parents=True)
    if "plain" in arguments:
        save(Path("plain"), preprocess=None)
    if "run" in arguments:
        save(Path("run/best"))
    if "backbone" in arguments:
        save(Path("backbone"), classes=0, labels=None)
    capsys.readouterr()
    text = failure(capsys, *(model if word == "MODEL" else word for word in arguments))
    assert words in text and not Path("runs").exists()
    assert len(text.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    assert "no CUDA device found" in failure(capsys, model, "images", "--device", "cuda")


class Odd(torch.nn.Module):
    """A model that answers a white image with NaN, and refuses a black one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.mean((1, 2, 3))
        if (level < -1.95).any():
            raise RuntimeError("too dark\nfor a model")
        return self.model(images).where((level < 2)[:, None], float("nan"))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_fault_of_one_image_ends_no_other(
    batch: int, model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    good = predict(model, *images)
    for name, level in (("white", 255), ("black", 0)):
        Image.new("RGB", (9, 9), (level, level, level)).save(f"{name}.png")
    loaded = load_checkpoint(model)
    odd: Any = Odd(loaded.model)
    monkeypatch.setattr(weights, "load_checkpoint", lambda name: loaded._replace(model=odd))
    prepare = ImagePreprocess.__call__

    def strange(self: ImagePreprocess, image: Any) -> torch.Tensor:
        if image.size == (7, 5):
            raise KeyError("no such thing")
        return prepare(self, image)

    monkeypatch.setattr(ImagePreprocess, "__call__", strange)
    Image.new("RGB", (7, 5)).save("strange.png")
    capsys.readouterr()
    text = failure(capsys, model, "white.png", images[0], "black.png", "strange.png", *images[1:], "--batch", batch)
    assert "zoo: white.png: the model's output is NaN or infinite" in text
    assert "zoo: black.png: RuntimeError: too dark for a model" in text
    assert "zoo: strange.png: KeyError: 'no such thing'" in text
    assert text.splitlines()[-1] == "zoo: error: 3 of 7 images had an error"
    entries = json.loads(Path("runs/predict/predictions.json").read_text())
    assert [entry["path"] for entry in entries if "error" in entry] == ["white.png", "black.png", "strange.png"]
    answered = [entry for entry in entries if "error" not in entry]
    assert [entry["label"] for entry in answered] == [entry["label"] for entry in good]


def test_answers_that_are_all_nan(images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    broken = load_model(save(Path("broken")))
    list(broken.parameters())[-1].data.fill_(float("nan"))
    loaded = load_checkpoint("broken")._replace(model=broken)
    monkeypatch.setattr(weights, "load_checkpoint", lambda name: loaded)
    text = failure(capsys, "broken", "images")
    assert text.count("the model's output is NaN or infinite") == 4
    assert text.endswith("no prediction for any of the 4 images; nothing was written to runs/predict")
    assert os.listdir("runs/predict") == []


def test_a_figure_that_cannot_be_drawn_costs_no_answers(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def odd(*given: object) -> None:
        raise KeyError("a font")

    monkeypatch.setattr(answers, "draw", odd)
    assert len(predict(model, "images")) == 4 and sorted(os.listdir("runs/predict")) == sorted(FILES[:2])
    assert "zoo: predictions.png could not be drawn: 'a font'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_nobody_reads_on(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Answers that are read no further, or cannot be printed at all, are written."""
    reading, writing = os.pipe()
    os.close(reading)
    full = "zoo: standard output: No space left on device\n"
    for stream, said in ((os.fdopen(writing, "w"), ""), (open("/dev/full", "w"), full), (None, "")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        entries = predict(model, "images", "--batch", 1)
        end = "zoo: 4 of 4 images done; wrote predictions.json, predictions.csv, predictions.png to runs/predict\n"
        assert len(entries) == 4 and capsys.readouterr().err == said + end
        Path("runs/predict/predictions.json").unlink()
        if stream is not None:
            stream.write("what Python flushes at its end")
            stream.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_pipe_into_head(model: str, images: list[str]):
    environment = os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    command = f"{sys.executable} -m zoo classify predict {model} images --batch 1 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stderr.splitlines()[0].startswith("zoo: 4 of 4 images done")
    assert len(json.loads(Path("runs/predict/predictions.json").read_text())) == 4


def test_help_needs_no_heavy_library():
    code = "import sys, zoo.__main__ as z\ntry: z.main(['TASK', 'VERB', '-h'])\nfinally: print(*sys.modules)"
    for task, verb in (("classify", "predict"), ("transcribe", "predict"), ("transcribe", "stream")):
        lines = code.replace("TASK", task).replace("VERB", verb)
        done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
        *text, modules = done.stdout.splitlines()
        assert text[0].startswith(f"usage: zoo {task} {verb}") and len(text) <= 32 and max(map(len, text)) < 82
        assert text[-2] == "example:" and not {"torch", "numpy", "PIL", "tqdm"} & set(modules.split())


def test_full_disk_leaves_the_files_before_whole(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = predict(model, "images")

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers, "draw", full)
    text = failure(capsys, model, "images/b")
    assert text.endswith("zoo: error: cannot write to runs/predict: No space left on device")
    assert sorted(os.listdir("runs/predict")) == sorted(FILES)
    assert json.loads(Path("runs/predict/predictions.json").read_text()) == before


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and text.startswith("usage: zoo classify predict")
    for flag in ("NAME", "PATH", "--output", "--top", "--device"):
        assert flag in text
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", "--help-all"])
    whole = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("--batch", "--precision"):
        assert flag in whole and flag not in text
