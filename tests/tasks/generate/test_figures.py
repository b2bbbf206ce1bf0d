"""Samples beside real images, by the command: what is drawn, compared, printed, written and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

import zoo
from generating import DIGITS, classifier, generator
from training import refused
from zoo.__main__ import main
from zoo.data.generation import WholeImages
from zoo.outputs.samplers import Guidance, sample
from zoo.tasks.generate.features import features_of
from zoo.tasks.generate.figures import Evaluator, Figures
from zoo.tasks.generate.images import to_bytes
from zoo.tasks.generate.metrics import frechet_distance, kernel_distance, near_copies, neighbour_accuracy, spread
from zoo.tasks.generate.train import Generate

FAST = ["--trainer.accelerator=cpu", "--data.workers=0", "--data.batch=200", "--model.steps=2"]
NUMBER = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return generator(folder / "generator"), classifier(folder / "classifier")


def measure(verb: str, model: str, output: Path, *flags: str) -> dict[str, Any]:
    main(["generate", verb, f"--model.weights={model}", *FAST, *flags, f"--model.output={output}"])
    return json.loads((output / "figures.json").read_text())


def bytes_in(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    source = WholeImages("digits", size=8, channels=1).source(split)
    values = [torch.from_numpy(np.array(source.image(index)))[..., None] for index in range(len(source.labels))]
    return torch.stack(values), torch.from_numpy(source.labels)


def test_figures_are_those_of_the_metrics(models, tmp_path, capsys):
    model, judge = models
    found = measure("test", model, tmp_path, f"--model.samples={NUMBER}", f"--model.features={judge}")
    said = capsys.readouterr().out
    training, held = bytes_in("train"), bytes_in("test")
    labels = held[1].sort().values[spread(NUMBER, 360)]
    checkpoint: Any = zoo.load_checkpoint(model)
    reader: Any = zoo.load_checkpoint(judge)
    features = features_of(judge)
    columns = {"guided": (Guidance(scale=2.0), 6), "plain": (Guidance(), 3)}
    assert found["evaluations"] == {column: number for column, (_, number) in columns.items()}
    real, unseen = features(training[0]), features(held[0])
    known = torch.cat([real, features(training[0].flip(2))])
    for column, (guidance, _) in columns.items():
        x = sample(checkpoint.model, labels, range(NUMBER), (8, 8), steps=2, guidance=guidance).x
        values = to_bytes(x, checkpoint.preprocess)
        seen = features(values)
        logits = reader.model(torch.stack([reader.preprocess(each.numpy()) for each in values]))
        wanted = {
            "agreement": float((logits.argmax(1) == labels).double().mean()),
            "neighbours": neighbour_accuracy(seen, labels, unseen, held[1]),
            "frechet": frechet_distance(seen, unseen),
            "kernel": kernel_distance(seen, unseen),
            "near_copies": near_copies(seen, known, unseen),
        }
        for metric, value in wanted.items():
            assert found["figures"][metric][column] == pytest.approx(value, rel=1e-4, abs=1e-6), (metric, column)
        with Image.open(tmp_path / f"{column}.png") as image:
            assert image.size == (10 * 34 + 2, NUMBER // 10 * 34 + 2)
    chosen = spread(NUMBER, len(training[1]))
    assert found["figures"]["frechet"]["real"] == pytest.approx(frechet_distance(real[chosen], unseen), rel=1e-4)
    wanted = neighbour_accuracy(real[chosen], training[1][chosen], unseen, held[1])
    assert found["figures"]["neighbours"]["real"] == pytest.approx(wanted)
    assert found["figures"]["near_copies"]["real"] == pytest.approx(near_copies(unseen, known, unseen))
    assert (found["samples"], found["held_out"], found["training"]) == (NUMBER, 360, 1437) and not found["omitted"]
    assert found["mirrored"] and found["all"] == {"held_out": 360, "training": 1437} and found["size"] == [8, 8]
    assert f"{NUMBER} samples: heun, 2 steps, seed 0, guidance 2\n" in said
    (row,) = (line for line in said.splitlines() if line.startswith(f"classifier agreement ({judge})"))
    assert [float(each) for each in row.split()[-3:]] == pytest.approx(
        [found["figures"]["agreement"][each] for each in ("guided", "plain", "real")], abs=1e-4
    )
    assert f"\nFrechet distance (features of {judge})" in said and "FID" not in said


def test_mirror_images_of_training_images_are_copies_where_training_flips(models):
    mirrored = bytes_in("train")[0][spread(100, 1437)].flip(2)
    for flip, share in ((0.5, 1.0), (0.0, 0.0)):
        evaluator = Evaluator(20, 1, 0, Guidance(), None, None, DIGITS)
        data = WholeImages("digits", size=8, channels=1, batch=200, workers=0, flip=flip)
        data.preprocess = zoo.load_checkpoint(models[0]).preprocess  # pyright: ignore[reportAttributeAccessIssue]
        training, held = (evaluator.real(data, each, 100, lambda: None) for each in ("train", "val"))
        drawn = evaluator.see(mirrored, training.labels, 200)
        figures = evaluator.compare(Figures({}), {"plain": drawn}, training, held, labelled=False)
        assert figures.values["near_copies"]["plain"] == pytest.approx(share, abs=0.05)
        assert ("mirror images" in figures.titles["near_copies"]) == bool(flip)


def test_only_as_many_images_as_fit_are_read(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zoo.tasks.generate.figures.MEMORY", 4 * 64 * 50)  # 50 images of 64 pixels
    found = measure("validate", models[0], tmp_path, "--model.samples=20", "--data.flip=0")
    assert (found["held_out"], found["training"], found["all"]["training"]) == (50, 50, 1437)
    said = capsys.readouterr().out
    assert "real: the 50 of 360 held-out images, in place of samples, or 20 of the 50 of 1437 training images" in said
    assert "near copies of training images (pixels)" in said


def test_nothing_is_drawn_from_the_generators_and_values_are_logged(models, tmp_path):
    task = Generate(weights=models[0], steps=1, samples=20, features=models[1], output=str(tmp_path))
    data = WholeImages("digits", size=8, channels=1, batch=200, workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    (logged,) = trainer.validate(task, data, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    found = json.loads((tmp_path / "figures.json").read_text())
    for metric, values in found["figures"].items():
        for column, value in values.items():
            assert logged[f"val/{metric}_{column}"] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert "val/loss" in logged and found["split"] == "val"


def test_pixels_have_no_distances_and_a_classifier_of_its_own_reads(models, tmp_path, capsys):
    model, judge = models
    flags = ["--model.samples=10", f"--model.classifier={judge}", "--model.guidance=1"]
    found = measure("validate", model, tmp_path, *flags)
    assert found["figures"].keys() == {"agreement", "neighbours", "near_copies"} and found["features"] == "pixels"
    assert found["figures"]["neighbours"].keys() == {"plain", "real"}
    assert "10 samples: heun, 2 steps, seed 0\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "plain.png"}


def test_a_generator_without_classes(models, tmp_path):
    model = generator(tmp_path / "model", classes=0)
    flags = ["--model.samples=20", f"--model.features={models[1]}"]
    found = measure("test", model, tmp_path / "out", *flags)
    assert found["figures"].keys() == {"frechet", "kernel", "near_copies"} and not found["omitted"]
    assert found["figures"]["frechet"].keys() == {"plain", "real"}


def test_features_of_other_classes_read_none(models, tmp_path, capsys):
    other = classifier(tmp_path / "other", (*DIGITS[:9], "nine"))
    flags = ["--model.samples=20", f"--model.features={other}"]
    found = measure("test", models[0], tmp_path / "out", *flags)
    assert "unknown class '9'" in found["omitted"]["agreement"] and "agreement" not in found["figures"]
    assert "classifier agreement: omitted; classifier" in capsys.readouterr().out


def test_too_few_images_omit_the_frechet_distance(models, tmp_path, capsys):
    root = tmp_path / "data"
    for split, each in (("train", 3), ("val", 1)):
        for number in range(10 * each):
            folder = root / split / str(number % 10)
            folder.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(values).save(folder / f"{number}.png")
    (root / "train" / "0" / "broken.png").write_text("text")
    flags = ["--model.samples=10", f"--model.features={models[1]}", "--data.dataset=imagefolder", f"--data.root={root}"]
    found = measure("validate", models[0], tmp_path / "out", *flags)
    assert "16 features needs more than 16 images of each kind, got 10" in found["omitted"]["frechet"]
    assert found["figures"]["kernel"].keys() == {"guided", "plain", "real"} and found["training"] == 30
    assert "Frechet distance" in capsys.readouterr().out


def test_distances_of_timm_are_not_called_fid(models):
    evaluator = Evaluator(20, 1, 0, Guidance(), models[1], None, DIGITS)
    evaluator.features.name = "timm:inception_v3.tf_in1k"
    data = WholeImages("digits", size=8, channels=1, batch=200, workers=0)
    data.preprocess = zoo.load_checkpoint(models[0]).preprocess  # pyright: ignore[reportAttributeAccessIssue]
    held = evaluator.real(data, "val", 360, lambda: None)
    figures = evaluator.compare(Figures({}), {"plain": held}, held, held, labelled=False)
    assert figures.titles["frechet"] == "Frechet distance (features of timm:inception_v3.tf_in1k)"  # and not FID
    assert figures.values["near_copies"]["plain"] == 1.0  # the images are the training images


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.samples=9"], "model.samples must be 0 or at least 10, one of each class, got 9"),
        (["--model.samples=-1"], "model.samples must be 0 or at least 10"),
        (["--model.samples=16", "--model.features=JUDGE"], "model.samples must be > 16 for the Frechet distance"),
        (["--model.features=JUDGE"], "set model.samples to their number"),
        (["--model.samples=20", "--model.features=nothing"], "'nothing' not found"),
        (["--model.samples=20", "--model.features=MODEL"], "model.features: must be an image classifier"),
        (["--model.samples=20", "--model.classifier=MODEL"], "model.classifier: must be an image classifier"),
        (["--model.samples=20", "--model.classifier=OTHER"], "does not fit: unknown class '9'"),
        (["--model.samples=20", "--model.steps=0"], "steps must be from 1 to 10000, got 0"),
    ],
)
def test_refused_figures(models, flags, message, tmp_path):
    names = {"JUDGE": models[1], "MODEL": models[0], "OTHER": str(tmp_path / "other")}
    classifier(tmp_path / "other", (*DIGITS[:9], "nine"))
    for name, path in names.items():
        flags = [flag.replace(name, path) for flag in flags]
    output = tmp_path / "out"
    arguments = ["generate", "test", f"--model.weights={models[0]}", *FAST, f"--model.output={output}", *flags]
    assert message in refused(*arguments) and not output.exists()


def test_data_of_other_classes_is_refused(models, tmp_path):
    for split in ("train", "val"):
        for name in (*DIGITS[:9], "nine"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    flags = ["--data.dataset=imagefolder", f"--data.root={tmp_path}"]
    found = refused("generate", "validate", f"--model.weights={models[0]}", *FAST, *flags)
    assert "the classes of the checkpoint differ from those of the data: it has '9' where the data has 'nine'" in found
