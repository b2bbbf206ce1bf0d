"""`zoo evaluate`: the figures of a checkpoint are those of its task, in any batch, fused or not."""

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchmetrics.functional.text import char_error_rate, word_error_rate

import zoo
from box_cases import coco, write_coco
from detecting import saved
from generating import classifier, generator
from helpers import randomise
from zoo.__main__ import tasks
from zoo.inputs.audio import RECIPES
from zoo.inputs.images import ImagePreprocess
from zoo.outputs import greedy
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import train_characters
from zoo.tasks.evaluate.measure import evaluate
from zoo.tasks.intervals import wilson

DIGITS = tuple("0123456789")
FIELDS = {"data", "split", "metric", "value", "n", "interval", "command"}


def model_of(folder: Path, labels: tuple[str, ...] = DIGITS, fused: bool = False) -> str:
    """A classifier of 16 x 16 pixels with random weights and norms that can be fused."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "image": 16, "patch": 8, "norm": "prepbn"}
    model: Any = randomise(zoo.create_model("vit_micro", **fields, classes=len(labels))).eval()
    zoo.advance(model, 1.0)
    preprocess = ImagePreprocess(size=16, crop=1.0)
    return str(zoo.save_model(zoo.fuse(model) if fused else model, folder, preprocess=preprocess, labels=labels))


def measured(name: str, **given: Any) -> dict[str, Any]:
    return evaluate(tasks(), name, device="cpu", **given)


def values(result: dict[str, Any]) -> dict[str, float]:
    return {figure["metric"]: figure["value"] for figure in result["figures"]}


def validated(task: str, name: str, data: Any, **more: Any) -> dict[str, float]:
    """What `zoo TASK validate` logs."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, **quiet)
    return dict(trainer.validate(tasks()[task][0](weights=name, **more), datamodule=data, verbose=False)[0])


def test_digits(tmp_path: Path):
    """To the last digit those of `validate`, in batches of 1 and 64, fused and not; and those of a plain loop."""
    name = model_of(tmp_path / "model")
    found = measured(name)
    assert found["task"] == "classify" and found["device"] == "cpu" and found["precision"] == "32-true"
    assert found["name"] == name and found["seconds"] > 0
    logged = validated("classify", name, tasks()["classify"][1]())
    metrics = {
        "top-1 accuracy": "accuracy",
        "top-5 accuracy": "top5_accuracy",
        "balanced accuracy": "balanced_accuracy",
        "expected calibration error": "calibration_error",
    }
    by_class = {metric: value for metric, value in values(found).items() if metric.startswith("lowest recall: ")}
    assert values(found) == {metric: logged[f"val/{key}"] for metric, key in metrics.items()} | by_class
    assert values(measured(name, batch=1, workers=0)) == values(found)
    tested = measured(name, split="test")
    assert values(tested) == values(found) and tested["figures"][0]["split"] == "test"
    assert values(measured(model_of(tmp_path / "fused", fused=True))) == values(found)

    model = zoo.load_model(name)
    right, surest, hits = torch.zeros(2), list[float](), list[float]()
    by_label: dict[int, list[bool]] = {}
    with torch.inference_mode():
        for batch in tasks()["classify"][1](size=16, crop=1.0).val_dataloader():
            logits = model(batch.images)
            best = logits.topk(5).indices == batch.labels[:, None]
            surest += logits.softmax(1).amax(1).tolist()
            hits += best[:, 0].tolist()
            for label, hit in zip(batch.labels.tolist(), best[:, 0].tolist(), strict=True):
                by_label.setdefault(label, []).append(hit)
            right += torch.stack([best[:, 0].sum(), best.any(1).sum()])
    for figure, correct in zip(found["figures"], right.int().tolist(), strict=False):
        assert figure.keys() == FIELDS and figure["n"] == 360
        assert (figure["data"], figure["split"], figure["command"]) == ("digits", "val", f"zoo evaluate {name}")
        assert figure["value"] == pytest.approx(correct / 360, abs=1e-7)
        assert figure["interval"] == list(wilson(correct, 360))
    assert 0 < right[0] < right[1] < 360 and found["figures"][2]["interval"] is None
    bins, gaps = np.ceil(15 * np.array(surest)).astype(int), np.array(hits) - np.array(surest)
    error = sum(abs(gaps[bins == each].sum()) for each in range(1, 16)) / 360  # Guo et al. 2017, arXiv:1706.04599
    assert found["figures"][3]["value"] == pytest.approx(error, abs=1e-4) and error > 0.01
    recalls = sorted((np.mean(each), -len(each), f"lowest recall: {label}") for label, each in by_label.items())[:3]
    assert [(each["value"], -each["n"], each["metric"]) for each in found["figures"][4:]] == recalls
    assert json.loads(json.dumps(found)) == found


def test_top_5_differs_where_the_first_batch_is_all_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Metrics of equal state after the first batch stay apart."""
    name = model_of(tmp_path / "model")
    model: Any = zoo.load_model(name)
    task: Any = tasks()["classify"][0](weights=name)
    first, second = torch.eye(10)[:4], torch.tensor([[0.0, 5, 4, 3, 2, 1, 0, 0, 0, 0]])
    task.metrics.update(first, torch.arange(4))
    task.metrics.update(second, torch.tensor([2]))
    found = {key: float(value) for key, value in task.metrics.compute().items()}
    assert found["accuracy"] == pytest.approx(0.8) and found["top5_accuracy"] == 1.0
    assert model.config.classes == 10


def test_class_folders_in_another_order_and_a_subset(tmp_path: Path):
    """As if the logits of the other classes were not there."""
    names = ("n01443537", "n01440764", "n02077923", "n02119789")
    labels = ("goldfish", "tench", "sea lion", "kit fox")
    generator, images = np.random.default_rng(0), {}
    for wnid in names[1:]:
        for index in range(8):
            path = tmp_path / "imagenet-x" / wnid / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
            images[path] = names.index(wnid)
    name = model_of(tmp_path / "model", labels)
    found = measured(name, root=str(tmp_path / "imagenet-x"), workers=0)
    model: Any = zoo.load_model(name)
    with torch.inference_mode():
        logits = torch.cat([model(model.preprocess(str(path))[None]) for path in images])
    right = int((logits[:, 1:].argmax(1) + 1 == torch.tensor([*images.values()])).sum())
    assert right != int((logits.argmax(1) == torch.tensor([*images.values()])).sum())
    figure = found["figures"][0]
    assert figure["value"] == pytest.approx(right / 24) and figure["n"] == 24
    assert (figure["data"], figure["split"]) == ("imagenet-x", "all")
    assert figure["metric"] == "top-1 accuracy among 3 of 4 classes"
    named = measured(name, root=str(tmp_path / "imagenet-x"), data="ImageNet-X", workers=0)
    assert named["figures"][0]["data"] == "ImageNet-X"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("speech")
    torch.manual_seed(0)
    tokenizer = train_characters(["ABC "])
    choices = {"dim": 16, "depth": 2, "heads": 2, "vocabulary": tokenizer.vocabulary}
    model = randomise(zoo.create_model("squeezeformer_xs", **choices)).eval()
    name = str(zoo.save_model(model, root / "model", preprocess=RECIPES["nemo"], labels=tokenizer))
    for split, speakers in (("dev", (1, 2, 3)), ("other", (4,))):
        for speaker in speakers:
            chapter = root / "data" / split / str(speaker) / "7"
            chapter.mkdir(parents=True)
            lines = []
            for number in range(3):
                stem = f"{speaker}-7-000{number}"
                soundfile.write(chapter / f"{stem}.flac", 0.1 * torch.randn(6000 + 999 * number).numpy(), 16000)
                lines.append(f"{stem} {('ABC', 'A B', 'C')[number]}")
            (chapter / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")
    return name, root / "data"


def test_speech_by_split(spoken: tuple[str, Path]):
    name, root = spoken
    found = measured(name, root=str(root), splits=["dev", "other"], workers=0)
    assert [(each["split"], each["metric"], each["n"]) for each in found["figures"]] == [
        ("dev", "word error rate", 12),
        ("dev", "character error rate", 21),
        ("other", "word error rate", 4),
        ("other", "character error rate", 7),
    ]
    command = f"zoo evaluate {name} --root {root} --splits dev other"
    assert all(each["command"] == command and each["data"] == "data" for each in found["figures"])
    model: Any = zoo.load_model(name)
    said, wanted = [], []
    for path in sorted((root / "dev").glob("*/*/*.txt")):
        for line in path.read_text().splitlines():
            stem, _, text = line.partition(" ")
            features = model.preprocess(str(path.parent / f"{stem}.flac"))[None]
            with torch.inference_mode():
                said.append(model.labels.decode(greedy(*model(features, torch.tensor([features.shape[1]])))[0]))
            wanted.append(text)
    assert any(said)
    for figure, rate in zip(found["figures"], (word_error_rate, char_error_rate), strict=False):
        assert figure["value"] == pytest.approx(rate(said, wanted).item(), abs=1e-6)
        low, high = figure["interval"]
        assert low - 1e-6 <= figure["value"] <= high + 1e-6
    logged = validated("transcribe", name, tasks()["transcribe"][1]("librispeech", str(root), val="dev", workers=0))
    assert [each["value"] for each in found["figures"][:2]] == [logged["val/wer"], logged["val/cer"]]
    alone = measured(name, root=str(root), splits=["dev"], batch=1, workers=0)
    assert [(each["value"], each["interval"]) for each in alone["figures"]] == [
        (each["value"], each["interval"]) for each in found["figures"][:2]
    ]


def test_errors_are_counted_exactly_in_any_precision(spoken: tuple[str, Path], tmp_path: Path):
    """Sums in bf16 would stop at 256."""
    chapter = tmp_path / "long/1/2"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "1-2-0000.flac", np.full(6000, 0.1), 16000)
    soundfile.write(chapter / "1-2-0001.flac", np.full(6000, 0.2), 16000)
    (chapter / "1-2.trans.txt").write_text(f"1-2-0000 {'A ' * 301}\n1-2-0001 B C\n")
    with pytest.warns(UserWarning, match="fewer frames than its transcript needs|omitted from a loss"):
        found = measured(spoken[0], root=str(tmp_path), splits=["long"], workers=0, precision="bf16-true")
    words, letters, recall = found["figures"]
    assert (recall["metric"], recall["n"]) == ("lowest recall: A", 301)  # B and C are rare
    assert (words["n"], letters["n"]) == (303, 604)
    assert words["value"] * 303 == pytest.approx(round(words["value"] * 303), abs=1e-4)


def test_detection_by_the_names_of_categories(tmp_path: Path):
    """The order and the ids of the categories of the data do not matter."""
    name = saved(tmp_path / "model", LabelMap(("dog", "bird", "cat"), (1, 2, 3)), 64)
    write_coco(tmp_path / "data", split="val")
    found = measured(name, root=str(tmp_path / "data"), workers=0)
    assert [each["metric"] for each in found["figures"][:3]] == ["AP", "AP50", "AP75"] and found["figures"][0]["n"] == 3
    logged = validated("detect", name, tasks()["detect"][1]("auto", str(tmp_path / "data"), workers=0))
    by_category = {each["metric"]: each["value"] for each in found["figures"][3:]}
    assert [*by_category] == [f"lowest AP: {label}" for label in ("bird", "cat", "dog")]  # equal values: by name
    assert values(found) == {
        "AP": logged["val/ap"],
        "AP50": logged["val/ap50"],
        "AP75": logged["val/ap75"],
        **by_category,
    }
    assert np.mean([*by_category.values()]) == pytest.approx(logged["val/ap"], abs=1e-6)
    assert values(measured(name, root=str(tmp_path / "data"), workers=0, batch=1)) == values(found)

    write_coco(tmp_path / "other", coco(ids=(9, 4, 6)), split="val")
    assert values(measured(name, root=str(tmp_path / "other"), workers=0)) == values(found)
    other = saved(tmp_path / "wrong", LabelMap(("dog", "bird", "cow"), (1, 2, 3)), 64)
    with pytest.raises(ValueError, match="the checkpoint knows no category 'cat'"):
        measured(other, root=str(tmp_path / "data"), workers=0)


def test_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name, reader = generator(tmp_path / "dit"), classifier(tmp_path / "reader")
    options: dict[str, Any] = {"samples": 20, "features": reader, "guidance": 2.0, "steps": 2}
    found = measured(name, **options)
    logged = validated("generate", name, tasks()["generate"][1](), output=str(tmp_path / "x"), **options)
    got = values(found)
    assert got["loss"] == logged["val/loss"]
    assert got[f"Frechet distance (features of {reader}), guided samples"] == logged["val/frechet_guided"]
    assert got[f"kernel distance (features of {reader}), plain samples"] == logged["val/kernel_plain"]
    figure = next(each for each in found["figures"] if each["metric"].startswith("classifier agreement"))
    assert figure["n"] == 20 and figure["interval"] == list(wilson(round(figure["value"] * 20), 20))
    assert figure["command"] == f"zoo evaluate {name} --samples 20 --features {reader} --guidance 2.0 --steps 2"
    assert {path.name for path in tmp_path.iterdir()} == {"dit", "reader", "x"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"splits": ["dev"]},
            "--splits is not for a checkpoint of `zoo classify`, which takes: --root, --split, --labels",
        ),
        ({"samples": 4}, "--samples is not for a checkpoint of `zoo classify`"),
        ({"root": "/nowhere"}, "/nowhere is not a folder"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        measured(model_of(tmp_path / "model"), **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_checkpoints_that_cannot_be_measured(tmp_path: Path, spoken: tuple[str, Path]):
    with pytest.raises(ValueError, match="speech needs --root DIR and --splits NAME..."):
        measured(spoken[0])
    with pytest.raises(ValueError, match="folder 'test' not found"):
        measured(spoken[0], root=str(spoken[1]), splits=["test"], workers=0)
    model = zoo.create_model("vit_micro", dim=16, depth=1, heads=2, image=16, patch=8, classes=10)
    with pytest.raises(ValueError, match="has no preprocess"):
        measured(str(zoo.save_model(model, tmp_path / "bare", labels=DIGITS)))


def test_an_unreadable_image_is_named_and_not_counted(tmp_path: Path):
    for index in range(3):
        for label in "01":
            path = tmp_path / "data" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (80 * index, 0, 0)).save(path)
    (tmp_path / "data" / "1" / "2.png").write_bytes(b"no image")
    with pytest.warns(UserWarning) as seen:
        found = measured(model_of(tmp_path / "model", ("0", "1")), root=str(tmp_path / "data"), workers=0)
    assert any(str(each.message).endswith("1/2.png: cannot be read as an image") for each in seen)
    assert found["figures"][0]["n"] == 5
