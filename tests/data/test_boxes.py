"""Batches of images with objects: preprocessing, scales and epochs, faults, and the options of the data module."""

import inspect
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning
import pytest
import torch

from box_cases import OFF, coco, drawn, shapes, write_coco, write_voc, write_yolo
from zoo.data.boxes import Batch, BoxDataset, Boxes
from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs.label_map import LabelMap

ALL: dict[str, Any] = {"flip": 0.5, "turn": 0.5, "mosaic": 0.5, "mixup": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("set")
    for split in ("train", "val"):
        write_coco(place, split=split)
    return place


def files(root: Path, **options: Any) -> Boxes:
    return Boxes(**{"dataset": "coco", "root": str(root), "size": 32, "workers": 0, **options})


def same(one: Batch, other: Batch) -> bool:
    masks = (one.mask is None and other.mask is None) or bool((one.mask == other.mask).all())  # pyright: ignore
    pairs = zip((one.images, *one.truth, one.ids), (other.images, *other.truth, other.ids), strict=True)
    return masks and all(torch.equal(a, b) for a, b in pairs)


# Batches


def test_evaluation_is_the_preprocess_and_boxes_are_relative(root: Path):
    data = files(root, batch=3)
    (batch,) = data.val_dataloader()
    source = data.source("val")
    assert batch.images.shape == (3, 3, 32, 32) and batch.mask is None and batch.skipped == ()
    for index in range(3):
        assert torch.equal(batch.images[index], data.preprocess(source.image(index)))
    assert batch.ids.tolist() == [10, 20, 30] and batch.sizes.tolist() == [[20, 40], [30, 24], [16, 16]]
    truth = batch.truth
    assert truth.labels.tolist() == [[0, 2], [1, 0], [0, 0]]
    assert truth.valid.tolist() == [[True, True], [True, False], [False, False]]  # without the crowd
    wanted = torch.tensor([[9 / 40, 7 / 20, 10 / 40, 10 / 20], [0.75, 0.5, 0.5, 1.0]])
    torch.testing.assert_close(truth.boxes[0], wanted)
    torch.testing.assert_close(truth.boxes[1, 0], torch.tensor([6 / 24, 3 / 30, 12 / 24, 6 / 30]))
    assert not truth.boxes[~truth.valid].any()
    assert (truth.labels.dtype, truth.boxes.dtype, batch.ids.dtype) == (torch.int64, torch.float32, torch.int64)


def test_padding_keeps_the_aspect_and_is_zero(root: Path):
    data = files(root, fit="pad", size=40, batch=3)
    (batch,) = data.val_dataloader()
    assert batch.images.shape == (3, 3, 64, 64)
    for index, (height, width) in enumerate([(20, 40), (40, 32), (40, 40)]):
        real = torch.zeros(64, 64, dtype=torch.bool)
        real[:height, :width] = True
        assert torch.equal(batch.mask[index], real) and not batch.images[index][:, ~real].any()
        alone = data.preprocess(data.source("val").image(index))
        assert torch.equal(batch.images[index, :, :height, :width], alone) and alone.shape == (3, height, width)
    stretched = next(iter(files(root, batch=3).val_dataloader()))
    assert torch.equal(batch.truth.boxes, stretched.truth.boxes)  # relative to the image, not to the canvas


def test_the_canvas_is_the_least_that_holds_the_images(root: Path):
    widths = [batch.images.shape[2:] for batch in files(root, fit="pad", batch=1).val_dataloader()]
    assert widths == [(32, 32), (32, 32), (32, 32)]
    dataset: Any = files(root, fit="pad", size=70).val_dataloader().dataset
    assert dataset[0, 0].images.shape == (1, 3, 64, 96) and dataset[0, 2].images.shape == (1, 3, 96, 96)


def test_a_batch_is_what_its_images_are_alone():
    dataset = shapes(**ALL, photometric=0.5, zoom=0.5, iou_crop=0.5)
    keys = [(1, 5), (1, 0), (1, 7)]
    batch = dataset.__getitems__(keys)
    for row, key in enumerate(keys):
        image, boxes, labels = drawn(dataset, *key)
        valid = batch.truth.valid[row]
        assert torch.equal(batch.images[row], image) and torch.equal(batch.truth.boxes[row][valid], boxes)
        assert batch.truth.labels[row][valid].tolist() == labels


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_depend_on_seed_epoch_and_index_alone(channels: int):
    options = ALL | {"photometric": 0.5, "zoom": 0.5, "iou_crop": 0.5, "channels": channels, "mean": None, "std": None}
    one, cached = shapes(**options, cache=0), shapes(**options)
    first = [one[0, index] for index in range(6)]
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    for _ in range(2):  # the second time from memory
        assert all(same(cached[0, index], first[index]) for index in reversed(range(6)))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert not same(one[1, 0], first[0]) and not same(shapes(**options, seed=1)[0, 0], first[0])
    for batch in first:
        boxes, valid = batch.truth.boxes, batch.truth.valid
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
        assert valid.all() and corners.min() >= -1e-5 and corners.max() <= 1 + 1e-5 and (boxes[..., 2:] > 0).all()
        assert batch.images.shape == (1, channels, 64, 64) and batch.images.isfinite().all()


def test_workers_change_nothing(root: Path):
    options = ALL | {"batch": 2, "scales": [32, 64]}
    one, two = (list(files(root, **options, workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(one) == len(two) == 2 and all(map(same, one, two))


def test_nothing_is_kept_beyond_the_memory(root: Path):
    dataset: Any = files(root, cache=0).val_dataloader().dataset
    _ = dataset[0, 0]
    assert not dataset.cache
    dataset.free = 2400 + 100
    _ = dataset.__getitems__([(0, 0), (0, 1)])
    assert list(dataset.cache) == [0] and dataset.free == 100


def test_large_images_are_shrunk_in_training_only(root: Path):
    data = files(root, size=8, **OFF)
    train: Any = data.train_dataloader().dataset
    val: Any = data.val_dataloader().dataset
    assert train.sample(0).image.shape == (8, 16, 3) and val.sample(0).image.shape == (20, 40, 3)
    torch.testing.assert_close(train[0, 0].truth.boxes, val[0, 0].truth.boxes)


# Scales and epochs


def test_a_batch_has_one_of_the_scales_and_epochs_differ(root: Path):
    data = Boxes(size=64, scales=[32, 48, 64], batch=64, **OFF)
    loader: Any = data.train_dataloader()
    sides = []
    for epoch in range(6):
        loader.batch_sampler.sampler.set_epoch(epoch)
        sides.append([{side for _, _, side in keys} for keys in loader.batch_sampler])
    assert all(len(each) == 1 for epoch in sides for each in epoch)
    assert {side for epoch in sides for each in epoch for side in each} == {32, 48, 64}
    assert len({str(epoch) for epoch in sides}) == 6
    batch = loader.dataset.__getitems__([(0, 0, 48), (0, 1, 48)])
    assert batch.images.shape == (2, 3, 64, 64) and batch.mask.sum() == 2 * 48 * 48


def test_a_resumed_epoch_has_the_same_scales():
    loader: Any = Boxes(size=64, scales=[32, 48, 64], batch=32).train_dataloader()
    whole = list(loader.batch_sampler)
    loader.batch_sampler.skip = 3
    assert list(loader.batch_sampler) == whole[3:]


def test_ranks_draw_the_same_scales(monkeypatch: pytest.MonkeyPatch):
    from zoo.data import sampling

    sides = []
    for rank in (0, 1):
        monkeypatch.setattr(sampling, "rank_and_world", lambda rank=rank: (rank, 2))
        loader: Any = Boxes(size=64, scales=[32, 48, 64], batch=16).train_dataloader()
        keys = [keys[0] for keys in loader.batch_sampler]
        sides.append(([side for _, _, side in keys], [index for _, index, _ in keys]))
    assert sides[0][0] == sides[1][0] and sides[0][1] != sides[1][1]


def test_the_last_epochs_are_plain():
    data = Boxes(size=64, scales=[32], plain_epochs=2, mosaic=1.0, mixup=1.0, **(OFF | {"photometric": 1.0}))
    data.trainer = lightning.Trainer(max_epochs=5, logger=False, enable_checkpointing=False, accelerator="cpu")
    loader: Any = data.train_dataloader()
    evaluated: Any = data.val_dataloader().dataset
    evaluated.source = data.source("train")
    for epoch, side in ((2, 32), (3, 64), (4, 64)):
        loader.batch_sampler.sampler.set_epoch(epoch)
        key = next(iter(loader.batch_sampler))[0]
        assert key[2] == side
        assert same(loader.dataset[key], evaluated[0, key[1]]) == (epoch >= 3)
    data.trainer.fit_loop.max_epochs = -1
    with pytest.raises(ValueError, match="plain_epochs needs trainer.max_epochs"):
        data.train_dataloader()


# Faults


def test_unreadable_images_are_omitted_and_listed(tmp_path: Path):
    write_coco(tmp_path)
    data = files(tmp_path, batch=3, **ALL)
    loader = data.train_dataloader()
    (tmp_path / "images/train/b.png").write_bytes(b"")
    (batch,) = loader
    assert batch.skipped == (str(tmp_path / "images/train/b.png"),) and sorted(batch.ids.tolist()) == [10, 30]
    assert len(batch.images) == len(batch.truth.labels) == len(batch.sizes) == 2
    for name in "ac":
        (tmp_path / f"images/train/{name}.png").write_bytes(b"")
    (batch,) = data.train_dataloader()
    assert len(batch.skipped) == 3 and batch.images.shape == (0, 3, 32, 32) and batch.truth.boxes.shape == (0, 0, 4)
    assert batch.ids.shape == (0,) and batch.sizes.shape == (0, 2)
    dataset = BoxDataset(data.source("train"), BoxPreprocess(size=50))  # no multiple of 32
    batch = dataset[0, 0]
    assert batch.images.shape == (0, 3, 50, 50) and batch.images.dtype == torch.float32 and batch.mask is None


def test_a_batch_without_objects(root: Path):
    dataset: Any = files(root).val_dataloader().dataset
    truth = dataset[0, 2].truth
    assert truth.labels.shape == (1, 0) and truth.boxes.shape == (1, 0, 4) and truth.valid.shape == (1, 0)
    everything: Any = files(root, **ALL, photometric=1.0, zoom=1.0, iou_crop=1.0).train_dataloader().dataset
    assert everything[0, 2].images.isfinite().all()


def test_splits_must_have_the_same_categories(tmp_path: Path):
    write_coco(tmp_path)
    write_coco(tmp_path, coco((1, 2, 4)), split="val")
    data = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"categories of .*val.json differ .*: without 'dog' \(id 3\), with 'dog' \(id 4\)"
    ):
        data.find("fit")
    assert files(tmp_path).labels.ids == (1, 2, 4)  # validation alone needs no training set


def test_a_training_set_needs_objects(tmp_path: Path):
    for split in ("train", "val"):
        write_coco(tmp_path, coco() | {"annotations": []}, split=split)
    with pytest.raises(ValueError, match=r"instances_train.json has no objects to train on"):
        files(tmp_path).find("fit")


# Options


def test_what_it_says_of_itself(root: Path, tmp_path: Path):
    data = files(root)
    assert (
        data.described()
        == "coco: 3 images with 4 objects to train on, 3 images with 4 objects to validate, 3 categories"
    )
    assert data.labels.names == ("bird", "cat", "dog") and data.labelled == 3
    (image,), text = data.example()
    assert image.shape == (1, 3, 32, 32) and text == "an image of 3 x 32 x 32"
    write_voc(tmp_path / "voc")
    write_yolo(tmp_path / "yolo")
    for name in ("voc", "yolo"):
        assert Boxes.measuring(None, root=str(tmp_path / name))["val"].dataset == name
    assert Boxes.measuring(None, split="test")["test"].dataset == "shapes"
    assert Boxes.measuring(None, root=str(root))["val"].labelled == 3


def test_categories_are_those_of_the_checkpoint_by_name(root: Path):
    """In its order, with others that the data lacks; ids stay those of the data."""
    data, plain = files(root), files(root).source("val")
    known = LabelMap(("dog", "fish", "cat", "bird"), (0, 1, 2, 3))
    data.follow(SimpleNamespace(preprocess=None, labels=known), "validate")
    found = data.source("val")
    assert found.labels.names == known.names and dict(plain.labels).items() <= dict(found.labels).items()
    for index in range(len(plain)):
        names = [[each.labels.names[label] for label in each.objects(index).labels] for each in (plain, found)]
        assert names[0] == names[1]
    data.follow(SimpleNamespace(preprocess=None, labels=LabelMap(("dog", "cat"), (1, 2))), "test")
    with pytest.raises(ValueError, match="the checkpoint knows no category 'bird'; it knows: dog, cat"):
        data.source("val")
    data = files(root)
    data.follow(SimpleNamespace(preprocess=None, labels=known), "fit")  # training takes its own categories
    assert data.source("train").labels.names == plain.labels.names


def test_the_preprocessing_of_a_checkpoint_is_taken():
    base = BoxPreprocess(size=96, fit="pad", mean=(0.1, 0.2, 0.3), interpolation="bicubic")
    assert Boxes().prepared(base) == base and Boxes(size=64).prepared(base) == BoxPreprocess.from_dict(
        base.to_dict() | {"size": 64}
    )
    assert Boxes(channels=1).prepared(base).mean == (0.449,) and Boxes().preprocess == BoxPreprocess()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"dataset": "voc2012"},
            "unknown dataset 'voc2012'; allowed: auto, coco, coco_export, yolo, voc, shards, shapes",
        ),
        ({"dataset": "coco"}, "'coco' needs root"),
        ({"root": "somewhere"}, "'shapes' is generated and takes no root; for your own images set dataset to auto"),
        ({"dataset": "auto"}, "'auto' needs root"),
        ({"dataset": "auto", "root": "nowhere"}, "folder not found: nowhere"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"workers": -1}, "workers must be >= 0"),
        ({"cache": -1}, "cache must be >= 0"),
        ({"plain_epochs": -1}, "plain_epochs must be >= 0"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"mosaic": -0.5}, "mosaic must be a probability"),
        ({"zoom": float("nan")}, "zoom must be a probability"),
        ({"size": 0}, "size must be"),
        ({"fit": "crop"}, "unknown fit 'crop'; allowed: stretch, pad"),
        ({"scales": []}, "scales must have at least one"),
        ({"scales": [0]}, "size must be an integer"),
        ({"mean": [0.5]}, "mean has 1 values"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words) as error:
        Boxes(**options)
    assert "\n" not in str(error.value)


def test_options_are_documented_flags():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Boxes, "data")
    text = parser.format_help()
    for name in inspect.signature(Boxes).parameters:
        (action,) = (a for a in parser._actions if a.dest == f"data.{name}")
        assert action.help and len(action.help) > 20, name
        assert f"--data.{name}" in text
    data = parser.instantiate_classes(parser.parse_args(["--data.scales=[32,64]", "--data.mean=[0.1,0.2,0.3]"])).data
    assert data.scales == [32, 64] and data.preprocess.mean == (0.1, 0.2, 0.3)
