"""The `zoo` command with images that cannot be read, and checkpoints that differ from the data or the config."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import zoo
from training import PLAIN_FLAGS, SHORT, TINY, command, difference, fit, images, refused, said, state
from zoo.__main__ import main
from zoo.data.images import Images
from zoo.tasks.classify.train import Classify
from zoo.weights import load_checkpoint, save_model

pytestmark = pytest.mark.usefixtures("elsewhere")


# Images


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(value).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven and seven images in two classes, and three and three to validate; one of each part is broken."""
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "dog")):
        for index in range(7):
            paint(root / "train" / name / f"{index}.png", 100 * label + index)
        for index in range(3):
            paint(root / "val" / name / f"{index}.png", 100 * label + 50 + index)
    for path in (root / "train/cat/3.png", root / "val/dog/1.png"):
        path.write_bytes(path.read_bytes()[:200])
    return root


def folder_flags(root: Path) -> list[str]:
    flags = [
        f"--data.root={root}",
        "--data.batch=7",
        "--data.workers=0",
        "--model.backbone.classes=2",
        "--trainer.max_epochs=2",
    ]
    return [*flags, "--trainer.num_sanity_val_steps=0", *PLAIN_FLAGS]


@pytest.mark.parametrize("mixed", [True, False])
def test_unreadable_images_are_named_once_and_counted(mixed: bool, folder: Path, tmp_path: Path):
    """Batches of 7 with mixup, too, which takes pairs."""
    flags = folder_flags(folder) + ([] if mixed else ["--model.mixup=0", "--model.cutmix=0"])
    with pytest.warns(UserWarning) as seen:
        fit(tmp_path / "run", *flags, data="imagefolder")
    messages = [str(each.message) for each in seen]
    found = [message for message in messages if "skipped" in message]
    broken = [f"skipped {folder}/{part}: cannot be read as an image" for part in ("train/cat/3.png", "val/dog/1.png")]
    counts = [
        f"unreadable images skipped in the {stage} of epoch {epoch}: 1"
        for epoch in range(2)
        for stage in ("training", "validation")
    ]
    assert sorted(found) == sorted(broken + counts)
    assert load_checkpoint(tmp_path / "run" / "last", check=True).labels == ("cat", "dog")


def test_images_that_are_all_unreadable(folder: Path, tmp_path: Path):
    """In training such batches change nothing; without one image to validate there is nothing to say."""
    for path in folder.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", *folder_flags(folder), "--trainer.num_sanity_val_steps=2", data="imagefolder")
    assert said(stop.value) == "no image of the validation set could be read"


def test_folders_that_are_not_as_they_should_be(folder: Path, tmp_path: Path):
    flags = ["--data.dataset=imagefolder", f"--data.root={folder}", "--model.backbone.classes=2"]
    (folder / "val" / "ox").mkdir()
    assert "differ from those of" in refused(*TINY, *flags) and "ox" in refused(*TINY, *flags)
    (folder / "train" / "ox").mkdir()
    assert f"{folder}/train has class folders without images of their own" in refused(
        *TINY, *flags, "--model.backbone.classes=3"
    )


# Checkpoints


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    found: list[str] = []
    for module in ("tasks.task", "data.loading"):
        monkeypatch.setattr(f"zoo.{module}.rank_zero_info", found.append)
    yield found


def kept_with(run: Path, folder: Path, labels: list[str]) -> Path:
    kept = load_checkpoint(run / "last")
    return save_model(kept.model, folder, preset="vit_micro", preprocess=kept.preprocess, labels=labels)


def test_classes_that_differ_from_those_of_the_checkpoint(run: Path, lines: list[str], tmp_path: Path):
    names = images().classes
    folder = kept_with(run, tmp_path / "other", [names[0], "a fish", *names[2:]])
    flags = ["--data.dataset=synthetic", "--data.size=16", f"--model.weights={folder}", "--trainer.logger=false"]
    where = "it has 'a fish' where the data has '30 degrees'"
    message = refused("classify", "validate", *flags, "--trainer.accelerator=cpu")
    assert message == f"the classes of the checkpoint differ from those of the data: {where}"
    flags += [*SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}/run"]
    command("fit", *flags)
    number = len(load_checkpoint(folder).model.state_dict()) - 2
    assert f"started   from {folder}: {number} tensors taken; resized: head.weight, head.bias" in lines
    assert load_checkpoint(tmp_path / "run" / "last").labels == tuple(names)


def test_a_new_head(run: Path, lines: list[str]):
    old = zoo.load_model(run / "last").state_dict()
    task = Classify({"classes": 9, "drop_path": 0.2}, weights=str(run / "last"))
    new = task.model.state_dict()
    assert lines == [f"started   from {run}/last: {len(new) - 2} tensors taken; new: head.weight, head.bias"]
    assert new["head.weight"].shape == (9, 16) and task.config.drop_path == 0.2 and task.preset == "vit_micro"
    body = {key for key in old if not key.startswith("head")}
    assert difference({key: old[key] for key in body}, {key: new[key] for key in body}) is None


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"name": "vit_tiny"}, "was made from vit_micro, not from model.backbone.name=vit_tiny"),
        ({"dim": 32}, "has dim '16', not '32'; to allow it, list it in model.fresh"),
        ({"depth": 1}, "list it in model.fresh, as in model.fresh=['depth']"),
        ({"mixer": "sla"}, "has mixer 'softmax', not 'sla'; to allow it"),
        ({"depht": 1}, "/last 'depht'; did you mean depth?"),
        ({"classes": 1}, "model.backbone.classes must be >= 2"),
    ],
    ids=str,
)
def test_a_backbone_that_the_checkpoint_does_not_fit(backbone: dict[str, Any], words: str, run: Path):
    with pytest.raises(ValueError) as error:
        Classify(backbone, weights=str(run / "last"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_preprocessing_than_that_of_the_checkpoint(
    run: Path, lines: list[str], capsys: pytest.CaptureFixture[str]
):
    flags = ["--data.dataset=synthetic", f"--model.weights={run}/last"]
    capsys.readouterr()
    for more in ([], ["--data.size=16"], ["--data.size=24", "--data.crop=0.5"]):
        command("validate", *flags, *more)
    assert lines == ["measured with the preprocessing of the checkpoint: size 16 (not 24), crop 0.875 (not 0.5)"]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and len(set(shown)) == 1 and shown[0].startswith("accuracy 0.")


def test_a_fused_checkpoint_cannot_be_trained(run: Path, tmp_path: Path):
    kept = load_checkpoint(run / "last")
    folder = save_model(zoo.fuse(kept.model), tmp_path / "fused", preprocess=kept.preprocess, labels=kept.labels)
    flags = [flag for flag in TINY[2:] if "backbone" not in flag]
    message = refused("classify", "fit", *flags, f"--model.weights={folder}", f"--trainer.default_root_dir={tmp_path}")
    assert message == "a fused model is for inference only; train the unfused one"
    more = ["--model.backbone.classes=9", f"--model.weights={folder}"]
    assert "is fused, so its config cannot change" in refused("classify", "fit", *flags, *more)


def test_a_folder_that_holds_a_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]):
    before = (run / "best/model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main([*TINY, f"--trainer.default_root_dir={run}"])
    assert "already holds a run" in str(ended.value) and "--ckpt_path" in str(ended.value)
    assert (run / "best/model.safetensors").read_bytes() == before


def test_there_is_no_best_while_a_norm_blends(tmp_path: Path):
    fit(tmp_path, *SHORT, "--model.backbone.norm=prepbn(until=0.7)", "--trainer.max_epochs=4")
    zoo.fuse(zoo.load_model(tmp_path / "best"))
    kept = zoo.load_model(tmp_path / "best").state_dict()
    assert all(value.item() == 0 for key, value in kept.items() if key.endswith("blend"))


def test_measuring_needs_no_training_images(tmp_path: Path):
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "val" / name / "1.png")
    data = Images(dataset="imagefolder", root=str(tmp_path), size=16)
    assert data.classes == ["a", "b"] and len(data.source("val").labels) == 2
    with pytest.raises(ValueError, match="train is not a folder"):
        data.source("train")


# The config of a run, taken from its folder


def test_a_run_resumes_with_its_own_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "a run"
    flags = ["--model.backbone.norm=prepbn", "--model.average=0.5", "--data.seed=3"]
    fit(run, *SHORT, *flags, "--trainer.max_epochs=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    command("fit", "--ckpt_path", run)
    shown = capsys.readouterr().err
    assert "changed " not in shown and "nothing left to train: raise --trainer.max_epochs" in shown
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    command("fit", "--ckpt_path", run, "--trainer.max_epochs=2", "--model.warmup=0.5")
    shown = capsys.readouterr().err
    assert "changed   trainer.max_epochs 2 (was 1), model.warmup 0.5 (was 1.0)\n" in shown
    assert "resumed   at epoch 2, step 3\n" in shown and "epoch 1/2" not in shown and "epoch 2/2" in shown
    assert state(run / "resume/last.ckpt")["global_step"] == 6
    kept = load_checkpoint(run / "last")
    assert kept.config["source"].endswith("epoch 2, step 6") and kept.config["model"]["norm"] == "prepbn"
    before, after = (yaml.safe_load(text) for text in (before[run / "config.yaml"], (run / "config.yaml").read_text()))
    assert after["model"]["warmup"] == 0.5 and after["trainer"]["max_epochs"] == 2 and after["data"] == before["data"]


def test_what_is_kept_is_measured_without_a_config(run: Path, capsys: pytest.CaptureFixture[str]):
    for flags in ([f"--model.weights={run}/last"], [f"--ckpt_path={run}"], [f"--ckpt_path={run}/resume/last.ckpt"]):
        capsys.readouterr()
        command("validate", *flags)
        shown = capsys.readouterr().out
        assert "n = 128" in shown and shown.count("\n") == 1  # all of it, whatever limit_val_batches the run had
