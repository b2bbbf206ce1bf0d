"""Training a detector by the command: what a run leaves, resuming, batches without objects, fine-tuning, precision."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from detecting import TINY, TRUNK, command, fit
from helpers import randomise
from training import difference, refused, state
from zoo.data.boxes import Batch, Boxes
from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs.boxes import Truth, best
from zoo.outputs.label_map import LabelMap
from zoo.tasks.detect import train
from zoo.tasks.detect.train import Detect, Detections, blank
from zoo.weights import load_checkpoint, save_model

NAMES = ("rectangle", "ellipse", "triangle")


def detector(backbone: dict[str, Any] | None = None, **options: Any) -> Detect:
    task = Detect({**TINY, "classes": 3} if backbone is None else backbone, **options)
    task._trainer = SimpleNamespace(  # pyright: ignore
        current_epoch=0, global_rank=0, global_step=0, training=True, log=lambda *given: None
    )
    task.log = task.log_dict = lambda *given, **more: None  # pyright: ignore
    return task


def batch_of(objects: list[int]) -> Batch:
    """Random images with so many objects each."""
    most = max(objects)
    valid = torch.arange(most) < torch.tensor(objects)[:, None]
    boxes = torch.rand(len(objects), most, 4) * 0.4 + 0.2
    truth = Truth(torch.randint(0, 3, (len(objects), most)), boxes * valid[..., None], valid)
    sizes = torch.full((len(objects), 2), 64)
    return Batch(torch.randn(len(objects), 3, 64, 64), None, truth, torch.arange(len(objects)), sizes, ())


# A run


def logged(root: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with open(root / "csv/version_0/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    fit(root, logs=True)
    return root


def test_a_run_leaves_checkpoints_with_categories_and_preprocessing(run: Path):
    for name in ("best", "last"):
        model, preprocess, labels, config = load_checkpoint(run / name, check=True)
        assert preprocess == BoxPreprocess(size=64) and labels == LabelMap(NAMES, (1, 2, 3))
        assert config["preset"] == "rtdetr_micro" and model.config.classes == 3
    rows = logged(run)
    assert any(row.get("val/ap50") for row in rows) and any(row.get("train/noised_giou") for row in rows)


def test_validate_says_what_fit_measured(run: Path, capsys: pytest.CaptureFixture[str]):
    command("validate", f"--model.weights={run / 'last'}", "--trainer.limit_val_batches=2", "--data.batch=4")
    lines = capsys.readouterr().out.splitlines()
    said = re.fullmatch(r"AP (\S+), AP50 (\S+) \(n = \d+ objects in 8 images, 95 % interval \S+ to \S+\)", lines[-1])
    assert said and [line.split()[0] for line in lines[1:4]] == list(NAMES)
    rows = logged(run)
    kept = next(row for row in rows if row.get("val/ap50"))
    assert float(said[1]) == pytest.approx(float(kept["val/ap"]), abs=1e-4)


def test_the_answer_of_a_checkpoint(run: Path, tmp_path: Path):
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(tmp_path / "black.png")
    found = load_checkpoint(run / "last")(tmp_path / "black.png")
    assert 0 < len(found) <= 100 and {each.label for each in found} <= set(NAMES)
    assert all(0 <= each.box[0] <= each.box[2] <= 70 and 0 <= each.box[1] <= each.box[3] <= 50 for each in found)


@pytest.mark.daily(2)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path):
    random = ["--data.mosaic=0.5", "--data.mixup=0.5", "--data.turn=0.5", "--model.average=0.9"]
    random += ["--trainer.limit_val_batches=1", "--trainer.max_epochs=2"]
    fit(tmp_path / "whole", *random)
    fit(tmp_path / "parts", *random, "--trainer.max_epochs=1")
    last = tmp_path / "parts/resume/last.ckpt"
    fit(tmp_path / "parts", *random, f"--ckpt_path={last}")
    whole, parts = (state(tmp_path / name / "resume/last.ckpt")["state_dict"] for name in ("whole", "parts"))
    assert difference(whole, parts) is None


@pytest.mark.daily(2)
def test_a_resumed_run_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lower score after it resumes leaves `best` as it is, a higher one replaces it."""
    scores = iter((0.5, 0.3, 0.7))
    measure = train.average_precision
    monkeypatch.setattr(train, "average_precision", lambda *given: measure(*given)._replace(ap=next(scores)))
    kept = []
    for epochs in (1, 2, 3):
        resumed = [f"--ckpt_path={tmp_path}/resume/last.ckpt"] if epochs > 1 else []
        fit(tmp_path, "--trainer.num_sanity_val_steps=0", f"--trainer.max_epochs={epochs}", *resumed)
        kept.append((tmp_path / "best/model.safetensors").read_bytes())
    assert kept[0] == kept[1] != kept[2]
    assert next(scores, None) is None


# Steps


@pytest.mark.parametrize("objects", [[2, 0, 3], [0, 0]])
@pytest.mark.parametrize("denoising", [20, 0])
def test_images_without_objects_leave_no_parameter_without_a_gradient(objects: list[int], denoising: int):
    task = detector(denoising=denoising)
    loss = task.training_step(batch_of(objects), 0)
    loss.backward()
    assert loss.isfinite()
    assert [name for name, each in task.model.named_parameters() if each.grad is None and each.requires_grad] == []
    assert all(bool(each.grad.isfinite().all()) for each in task.model.parameters() if each.grad is not None)


def test_a_batch_of_unreadable_images_has_no_loss():
    task = detector()
    batch = batch_of([1])._replace(skipped=("a.jpg",))
    empty = batch._replace(images=batch.images[:0], truth=Truth(*(each[:0] for each in batch.truth)))
    with pytest.warns(UserWarning, match="unreadable image a.jpg"):
        loss = task.training_step(empty, 0)
    loss.backward()
    assert loss == 0 and all(each.grad is not None for each in task.model.parameters())


@pytest.mark.parametrize("trunk", [TRUNK, "timm:resnet18"])
def test_a_blank_image_changes_no_statistics(trunk: str):
    """It stands for a batch of unreadable images where other ranks have some; alone, it must not leave NaN either."""
    task = detector({**TINY, "classes": 3, "trunk": trunk})
    before = {name: each.clone() for name, each in task.model.named_buffers() if "running" in name}
    losses = task.losses(blank(batch_of([1])))
    (losses["total"] * 0.0).backward()
    assert losses["total"].isfinite() and len(before) > 10
    assert all(torch.equal(each, before[name]) for name, each in task.model.named_buffers() if name in before)
    assert all(bool(each.grad.isfinite().all()) for each in task.model.parameters() if each.grad is not None)


def test_the_trunk_learns_at_its_own_rate():
    task = detector(trunk_rate=0.25, weight_decay=0.1)
    groups, trunk = task.groups(), {id(each) for each in task.model.trunk.parameters()}
    seen = [id(each) for group in groups for each in group["params"]]
    assert sorted(seen) == sorted(id(each) for each in task.model.parameters())
    for group in groups:
        inside = {id(each) in trunk for each in group["params"]}
        assert inside == {group["lr_scale"] == 0.25} and group["lr_scale"] in (0.25, 1.0)
        assert {each.ndim > 1 for each in group["params"]} == {group["weight_decay"] == 0.1}


def test_the_rate_is_flat_and_then_half_a_cosine():
    task = detector(rate=1.0, final_rate=0.1, warmup=2.0, flat=0.5)
    rates = [task.factor(step, 10, 100) for step in range(100)]
    assert rates[:3] == [1 / 21, 2 / 21, 3 / 21] and rates[20:51] == [1.0] * 31
    assert rates[75] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=2e-3)
    assert rates[50:] == sorted(rates[50:], reverse=True)


# Assignment by overlap (DETA)

NMS = ("proposal_nms", "detection_nms")
DETA = {**TINY, "classes": 3, "proposal_nms": 0.9, "detection_nms": 0.7}


@pytest.mark.parametrize("objects", [[2, 0, 3], [0, 0]])
def test_assignment_by_overlap_leaves_no_parameter_without_a_gradient(objects: list[int]):
    """More queries than an image has tokens, too."""
    for queries in (12, 100):
        task = detector(assigner="iou", backbone={**DETA, "queries": queries})
        terms = task.losses(batch_of(objects))
        assert "proposals_class" in terms
        terms["total"].backward()
        assert terms["total"].isfinite() and all(each.grad is not None for each in task.model.parameters())


def test_a_run_by_overlap_keeps_its_suppression_in_the_checkpoint(tmp_path: Path):
    fit(tmp_path, "--model.assigner=iou", *(f"--model.backbone.{each}={DETA[each]}" for each in NMS))
    model = load_checkpoint(tmp_path / "last", check=True).model
    assert [getattr(model.config, each) for each in NMS] == [0.9, 0.7]
    found = Detections()
    logits, boxes = torch.zeros(1, 12, 3), torch.full((1, 12, 4), 0.5)
    found.update(torch.tensor([7]), *best(logits, boxes, torch.tensor([[64, 64]]), 3, 100, model.config.detection_nms))
    assert found.compute()[0][:, :2].tolist() == [[7, 0], [7, 1], [7, 2]]


def test_assignment_by_overlap_without_suppression_is_refused():
    with pytest.raises(ValueError, match="^model.assigner: iou gives an object several queries; set model.backbone.d"):
        detector(assigner="iou")


# Precision


def test_precision_does_not_depend_on_the_batch():
    """Images of several sizes with padding, in batches of 1, 2 and 8."""
    model: Any = randomise(zoo.create_model(**TINY, classes=3)).eval()
    data = Boxes("shapes", size=64, fit="pad")
    results = []
    for batch in (1, 2, 8):
        found = Detections()
        data.batch = batch
        for each in data.val_dataloader():
            with torch.no_grad():
                output = model(each.images, each.mask)
            found.update(each.ids, *best(output["logits"], output["boxes"], each.sizes, 3))
        results.append(found.compute()[0])
    for other in results[1:]:
        assert other.shape == results[0].shape
        assert (other[:, 2] - results[0][:, 2]).abs().max() < 1e-4
        near = torch.cdist(other[:, 3:], results[0][:, 3:]) + 1e6 * (other[:, None, 0] != results[0][:, 0])
        assert near.min(1).values.max() < 0.05  # in pixels; near ties may change places


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_detections_are_joined_on_their_own_device():
    """Meta tensors stand for those of a GPU."""
    found = Detections().to("meta")
    found.rows.append(torch.zeros(6, 7, dtype=torch.float64, device="meta"))
    found.images.append(torch.zeros(2, dtype=torch.int64, device="meta"))
    assert [(each.device.type, len(each)) for each in found.compute()] == [("meta", 6), ("meta", 2)]


def test_a_validation_set_without_objects_ends_in_one_line(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / split / "a.png")
    written: dict[str, Any] = {"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}]}
    written |= {"categories": [{"id": 5, "name": "cell"}, {"id": 9, "name": "dust"}]}
    box = {"id": 1, "image_id": 1, "category_id": 9, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    (tmp_path / "annotations").mkdir()
    for split, annotations in (("train", [box]), ("val", [])):
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(written | {"annotations": annotations}))
    root = tmp_path / "run"
    backbone = [f"--model.backbone.{field}={value}" for field, value in TINY.items()]
    flags = ["--data.dataset=coco", f"--data.root={tmp_path}", "--data.size=64", "--data.workers=0"]
    flags += ["--trainer.max_epochs=1", f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu"]
    flags += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert "no objects to find" in refused("detect", "fit", *backbone, *flags)


# Checkpoints


def test_fine_tuning_on_other_categories(run: Path, tmp_path: Path):
    """From three to two, and the last one can be found."""
    task = Detect({"classes": 2}, weights=str(run / "last"))
    model, kept = task.model, load_checkpoint(run / "last").model
    assert model.config.classes == 2
    assert torch.equal(model.box.layers[0].weight, kept.box.layers[0].weight)  # pyright: ignore
    assert model.score.weight.shape == (2, 16)  # pyright: ignore
    with torch.no_grad():
        model.scores[-1].bias.copy_(torch.tensor([-9.0, 9.0]))  # pyright: ignore
    best = model.eval()(torch.randn(1, 3, 64, 64))["logits"].argmax(-1)
    assert bool((best == 1).all())


def test_a_trunk_starts_from_a_classifier(tmp_path: Path):
    sizes = {"dim": (8, 8, 16, 16), "depth": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}
    classifier: Any = randomise(zoo.create_model("flash_internimage_t", classes=5, image=64, **sizes))
    folder = str(save_model(classifier, tmp_path / "classifier", preset="flash_internimage_t"))
    trunk = detector(trunk_weights=folder).model.trunk.model  # pyright: ignore
    assert (
        difference(dict(trunk.state_dict()), {key: classifier.state_dict()[key] for key in trunk.state_dict()}) is None
    )
    other = str(save_model(zoo.create_model("vit_micro", classes=3, dim=16, depth=1, heads=2), tmp_path / "other"))
    with pytest.raises(ValueError, match=f"the weights of {re.escape(other)} do not fit trunk '{re.escape(TRUNK)}'"):
        detector(trunk_weights=other)


def test_what_cannot_be_is_one_line(run: Path, tmp_path: Path):
    message = refused("detect", "fit", "--model.backbone.name=vit_micro", "--data.dataset=shapes")
    assert message == "`zoo detect` cannot train this model.backbone; use `zoo classify`"
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    assert "use `zoo detect predict`" in refused("classify", "predict", run / "last", image)
    message = refused("detect", "fit", "--model.backbone.name=rtdetr_micro", "--model.loss=vlf")
    assert message.startswith("model.loss: unknown name 'vlf'; did you mean vfl?")
    for option in ("trunk_rate=2", "flat=-1", "denoising=-1", "label_noise=3", "box_noise=-1"):
        assert "\n" not in refused("detect", "fit", "--model.backbone.name=rtdetr_micro", f"--model.{option}")
