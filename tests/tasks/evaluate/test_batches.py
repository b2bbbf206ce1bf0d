"""Every checkpoint of the repository on a small data set: its figures do not depend on the batch or on `zoo.fuse`, and
are those of the task's `validate` and `test`, to the last digit. Some checkpoints, others each day, are in the quick
tests.

What a figure is measured against comes from the checkpoint's own answers, some of them changed: it is never all right
or all wrong.
"""

import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.datasets import load_digits

import zoo
from zoo.__main__ import tasks
from zoo.models import FAMILIES
from zoo.tasks.evaluate.measure import evaluate
from zoo.weights import Checkpoint, load_checkpoint
from zoo.weights.files import record

FOLDER = Path(__file__).parents[3] / "checkpoints"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
SPLITS = ("val", "test")
LOGGED = {"top-1 accuracy": "accuracy", "top-5 accuracy": "top5_accuracy", "balanced accuracy": "balanced_accuracy"}
LOGGED |= {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "word error rate": "wer", "character error rate": "cer"}
LOGGED |= {"loss": "loss", "expected calibration error": "calibration_error"}
TASKS: Any = tasks()
TASK_OF = {name: FAMILIES[json.loads((FOLDER / name / "config.json").read_text())["family"]].task for name in NAMES}


def picture(number: int, classes: int) -> Image.Image:
    """A handwritten digit if there are ten classes of them, among other sides and colours each time."""
    digits = load_digits()
    values = (digits.images[np.flatnonzero(digits.target == number % classes)[number // classes]] * 15).astype(np.uint8)
    tint = np.random.default_rng(number).uniform(0.3, 1.0, 3)
    return Image.fromarray((values[..., None] * tint).astype(np.uint8)).resize((20 + number % 7, 28 - number % 5))


def write_classes(root: Path, found: Checkpoint) -> None:
    assert isinstance(found.labels, tuple)
    for number in range(max(40, 2 * len(found.labels))):
        for split in SPLITS:
            folder = root / split / found.labels[number % len(found.labels)]
            folder.mkdir(parents=True, exist_ok=True)
            picture(number, 10).save(folder / f"{number}.png")


def write_objects(root: Path, found: Checkpoint) -> None:
    """Blots on noise; the truth is what the checkpoint sees best there, but for every third object."""
    labels, images, annotations = found.labels, [], []
    categories = [{"id": id, "name": name} for name, id in labels]  # pyright: ignore
    for number in range(6):
        generator = np.random.default_rng(number)
        height, width = 150 + 20 * (number % 4), 260 - 30 * (number % 3)
        values = generator.integers(90, 200, (height, width, 3))
        for _ in range(12):
            y, x, side = *generator.integers(0, (height - 40, width - 40)), generator.integers(12, 40)
            values[y : y + side, x : x + side] = generator.integers(0, 256, 3)
        picture = Image.fromarray(values.astype(np.uint8))
        for split in SPLITS:
            (root / "images" / split).mkdir(parents=True, exist_ok=True)
            picture.save(root / "images" / split / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": height, "width": width})
        for place, each in enumerate(found(root / "images/val" / f"{number}.png")[:9]):
            left, top, right, bottom = each.box
            left = left + 0.3 * (place % 3) * (right - left)
            box = [left, top, right - left, bottom - top]
            id = next(one["id"] for one in categories if one["name"] == each.label)
            if place % 3 != 1:
                facts = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": id, "iscrowd": 0}
                annotations.append(facts | {"bbox": box, "area": box[2] * box[3]})
    assert len(annotations) > 20
    written = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "annotations").mkdir()
    for split in SPLITS:
        (root / "annotations" / f"instances_{split}.json").write_text(written)


def write_speech(root: Path, found: Checkpoint) -> None:
    """Sine sweeps of several lengths; every third reference text is a word that the checkpoint does not output."""
    for split in SPLITS:
        chapter = root / split / "1" / "2"
        chapter.mkdir(parents=True)
        lines = []
        for number in range(20):
            generator = np.random.default_rng(number)
            time = np.arange(5000 + 900 * number) / 16000
            pitch = generator.uniform(150, 2500) + generator.uniform(-800, 800) * time
            wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.02 * generator.standard_normal(len(time))
            stem = f"1-2-{number:04d}"
            soundfile.write(chapter / f"{stem}.flac", wave, 16000)
            said = found(chapter / f"{stem}.flac")
            lines.append(f"{stem} {said if said and number % 3 else 'SEVEN'}\n")
        (chapter / "1-2.trans.txt").write_text("".join(lines))


def data_of(name: str, root: Path) -> dict[str, Any]:
    """Arguments of `evaluate` for a checkpoint's data, written below a folder if need be."""
    if name == "vit_micro.digits":  # the digits that the card is about
        return {"workers": 0}
    write = {"classify": write_classes, "generate": write_classes, "detect": write_objects, "transcribe": write_speech}
    write[str(TASK_OF[name])](root, load_checkpoint(FOLDER / name))
    return {"root": str(root), "workers": 0}


def measured(name: str, **given: Any) -> list[tuple[str, float, Any, int]]:
    found = evaluate(TASKS, name, device="cpu", **given)
    return [(each["metric"], each["value"], each["interval"], each["n"]) for each in found["figures"]]


def logged(task: str, name: str, split: str, **given: Any) -> dict[str, float]:
    """What `zoo TASK validate` or `zoo TASK test` logs for the same data."""
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, **quiet)
    kinds = {
        "classify": "imagefolder" if "root" in given else "digits",
        "generate": "imagefolder",
        "detect": "auto",
        "transcribe": "librispeech",
    }
    if task == "transcribe":
        given |= {"val": ["val"], "test": ["test"]}
    run = trainer.validate if split == "val" else trainer.test
    data = TASKS[task][1](dataset=kinds[task], **given)
    return dict(run(TASKS[task][0](weights=name), datamodule=data, verbose=False)[0])


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_their_hashes(name: str):
    found = load_checkpoint(FOLDER / name, check=True)
    files = found.config["files"]
    assert len(files) == 2 and all(record(FOLDER / name / file) == each for file, each in files.items())


def test_checkpoints_are_small():
    sizes = {name: sum(path.stat().st_size for path in (FOLDER / name).iterdir()) for name in NAMES}
    assert max(sizes.values()) <= 12e6 and sum(sizes.values()) <= 100e6, sizes


@pytest.mark.daily(8)
@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if name != "caformer_micro.fashion_mnist"],  # "T-shirt/top" is no name of a folder
)
def test_figures_do_not_depend_on_the_batch_or_on_fusion(name: str, tmp_path: Path):
    given = data_of(name, tmp_path / "data")
    model: Any = zoo.load_model(FOLDER / name)
    fused = str(zoo.save_model(zoo.fuse(model), tmp_path / "fused"))
    assert load_checkpoint(fused).config["fused"]
    speech = TASK_OF[name] == "transcribe"
    by_split = {split: given | ({"splits": [split]} if speech else {"split": split}) for split in SPLITS}
    wanted = measured(str(FOLDER / name), **by_split["val"])
    assert len({value for _, value, *_ in wanted} - {0.0, 1.0}) >= 1
    for more in ({"batch": 1}, {"batch": 64}):
        assert measured(str(FOLDER / name), **by_split["val"], **more) == wanted
        assert measured(fused, **by_split["val"], **more) == wanted
    assert measured(str(FOLDER / name), **by_split["test"]) == wanted
    for split in SPLITS:
        found = logged(str(TASK_OF[name]), str(FOLDER / name), split, **given)
        by_metric = {metric: value for metric, value, *_ in wanted if not metric.startswith("lowest ")}
        assert {metric: found[f"{split}/{LOGGED[metric]}"] for metric in by_metric} == by_metric
