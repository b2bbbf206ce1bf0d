"""`zoo generate predict`: noise of the asked times, images restored from there, and what is written and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from generating import generator
from training import refused
from zoo.__main__ import main
from zoo.outputs.samplers import Noise, sample
from zoo.tasks.generate.images import to_bytes

FAST = ["--steps=2", "--sampler=euler", "--device=cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return generator(tmp_path_factory.mktemp("generator") / "model")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        values = np.random.default_rng(ord(name)).integers(0, 256, (10, 8, 3))
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def predict(*arguments: Any) -> dict[str, Any]:
    main(["generate", "predict", *map(str, arguments)])
    return json.loads(Path(arguments[arguments.index("--output") + 1], "restored.json").read_text())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_images_are_noised_and_restored(model, images, tmp_path, capsys):
    output = tmp_path / "out"
    facts = predict(
        model, images, "--times=0.5,0.25,1", *FAST, "--seed=7", "--classes=3", "--guidance=2", "--output", output
    )
    said = capsys.readouterr()
    assert said.out.count("rms difference") == said.out.count("\n") == 3 and "3 of 3 images done" in said.err
    assert {key: facts[key] for key in ("sampler", "steps", "guidance", "seed", "checkpoint")} == {
        "sampler": "euler",
        "steps": 2,
        "guidance": 2.0,
        "seed": 7,
        "checkpoint": model,
    }
    found: Any = zoo.load_checkpoint(model)
    for index, (entry, name) in enumerate(zip(facts["samples"], "abc", strict=True)):
        assert entry["path"] == str(images / f"{name}.png") and entry["index"] == index
        assert (entry["class"], entry["label"]) == ("3", 3)
        original = found.preprocess(entry["path"])[None]
        assert [each["time"] for each in entry["restored"]] == [0.5, 0.25, 1.0]
        for each in entry["restored"]:
            time, noise = each["time"], Noise(7, [index], (1, 8, 8))()
            noised = (1 - time) * original + time * noise
            assert np.abs(pixels(output / each["noised"]) - bytes_of(noised, found)).max() <= 1
            x, steps = noised, (time, time / 2, 0.0)
            for now, then in zip(steps, steps[1:], strict=False):
                times, label = torch.full((1,), now), torch.tensor([3])
                with torch.no_grad():
                    given, null = found.model(x, times, label), found.model(x, times)
                x = x + (then - now) * (null + 2 * (given - null))
            restored = pixels(output / each["file"])
            assert np.abs(restored - bytes_of(x, found)).max() <= 1
            wanted = np.sqrt(np.mean((restored - bytes_of(original, found)) ** 2))
            assert each["difference"] == pytest.approx(wanted, abs=1e-3) and each["evaluations"] == 4
            with Image.open(output / each["file"]) as image:
                text: Any = image
                own = json.loads(text.text["zoo"])
                assert own["time"] == time and own["path"] == entry["path"] and own["label"] == 3
    with Image.open(output / "restored.png") as image:
        assert image.size == (7 * 34 + 2, 3 * 34 + 2)
        row = np.asarray(image)[36:68:4, 2:34:4]
        assert np.array_equal(row, bytes_of(found.preprocess(str(images / "b.png"))[None], found))


def bytes_of(x: torch.Tensor, found: Any) -> np.ndarray:
    return to_bytes(x, found.preprocess)[0, :, :, 0].numpy().astype(int)


def test_an_image_is_the_same_in_any_batch(model, images, tmp_path):
    for name, batch in (("one", 1), ("all", 8)):
        predict(model, images, *FAST, "--times=0.6", f"--batch={batch}", "--output", tmp_path / name)
    for index in range(3):
        files = [pixels(tmp_path / name / f"{index:05d}_0.6.png") for name in ("one", "all")]
        assert np.abs(files[0] - files[1]).max() <= 1


def test_no_class_is_the_null_class(model, images, tmp_path):
    facts = predict(model, images / "a.png", *FAST, "--times=1", "--output", tmp_path / "out")
    assert "class" not in facts["samples"][0] and facts["samples"][0]["restored"][0]["evaluations"] == 2
    found: Any = zoo.load_checkpoint(model)
    x = sample(found.model, None, [0], (8, 8), steps=2, sampler="euler").x  # from noise alone at time 1
    assert np.abs(pixels(tmp_path / "out" / "00000_1.png") - bytes_of(x, found)).max() <= 1


def test_a_class_for_each_image(model, images, tmp_path):
    facts = predict(model, images, *FAST, "--times=1", "--classes=4,4,9", "--output", tmp_path / "out")
    assert [each["label"] for each in facts["samples"]] == [4, 4, 9]


def test_a_schedule_of_steps(images, tmp_path):
    model = generator(tmp_path / "ddpm", schedule="ddpm", prediction="noise")
    facts = predict(model, images, "--steps=3", "--times=0.0001,0.5", "--device=cpu", "--output", tmp_path / "out")
    assert facts["sampler"] == "ddim"
    assert [each["evaluations"] for each in facts["samples"][0]["restored"]] == [1, 3]


@pytest.mark.parametrize(("until", "steps"), [(False, 25), (True, 1)])
def test_steps_by_default_are_those_that_fit_the_model(until, steps, images, tmp_path):
    name = generator(tmp_path / "model", until=until)
    found = predict(name, images / "a.png", "--device=cpu", "--output", tmp_path / "out")
    assert found["steps"] == steps
    assert {each["steps"] for each in found["samples"][0]["restored"]} == {steps}


def test_another_run_replaces_the_images_of_the_first(model, images, tmp_path):
    output = images / "out"
    predict(model, images, *FAST, "--times=0.5,0.75", "--output", output)
    (output / "mine.png").write_bytes((images / "a.png").read_bytes())
    facts = predict(model, images, *FAST, "--times=0.5", "--output", output)
    assert [Path(each["path"]).name for each in facts["samples"]] == ["a.png", "b.png", "c.png", "mine.png"]
    made = {f"{index:05d}_0.5{end}.png" for index in range(4) for end in ("", "_noised")}
    assert {path.name for path in output.iterdir()} == made | {"mine.png", "restored.png", "restored.json"}
    own = output / "00000_0.5.png"
    assert "written by an earlier run" in refused("generate", "predict", model, own, *FAST, "--output", output)
    (output / "mine.png").unlink()
    assert "no image found, except" in refused("generate", "predict", model, output, *FAST, "--output", output)


def test_an_image_that_cannot_be_read(model, images, tmp_path, capsys):
    (images / "b.png").write_text("text")
    output = tmp_path / "out"
    arguments = ["generate", "predict", model, images, *FAST, "--times=0.5", "--classes=1,2,3", "--output", output]
    assert "1 of 3 images had an error" in refused(*arguments)
    entries = json.loads((output / "restored.json").read_text())["samples"]
    assert "not an image" in entries[1]["error"] and "restored" not in entries[1]
    assert [each["label"] for each in entries] == [1, 2, 3] and (output / "00002_0.5.png").is_file()
    for name in "ac":
        (images / f"{name}.png").write_text("text")
    (output / "restored.json").unlink()
    assert "no prediction for any of the 3 images; nothing was written" in refused(*arguments)
    assert not (output / "restored.json").exists() and not list(output.glob(".restored-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=11"], "--classes: unknown class '11'"),
        (["--classes=1,2"], "--classes: give one class for all images, or one for each of the 3, got 2"),
        (["--guidance=2"], "--guidance needs --classes"),
        (["--sampler=ddm"], "sampler: unknown name 'ddm'"),
        (["--steps=20000"], "steps must be from 1 to 10000"),
        (["--guidance=2", "--classes=3", "--weak=nothing"], "'nothing' not found"),
        (["nothing.png"], "file or folder not found: 'nothing.png'"),
    ],
)
def test_refused_predictions(model, images, tmp_path, arguments, message):
    output = tmp_path / "out"
    found = refused("generate", "predict", model, images, "--device=cpu", "--output", output, *arguments)
    assert message in found and not list(output.glob("*"))


@pytest.mark.parametrize("times", ["0", "1.5", "-0.5", "nan", "", "a,b", "0.00001"])
def test_refused_times(model, images, times, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "predict", model, str(images), f"--times={times}"])
    assert stop.value.code == 2 and "must be numbers > 0 and <= 1" in capsys.readouterr().err


def test_a_classifier_is_refused(images):
    assert "use `zoo classify predict`" in refused("generate", "predict", "vit_micro.digits", images)
