"""Folders of images in ImageNet's layout: what is found, prepared, and skipped because it cannot be read."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from image_cases import PLAIN, image_of, whole
from zoo.data.images import ImageDataset, Images
from zoo.inputs.images import ImagePreprocess


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (24, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, format="PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures in each of three classes for training, one for validation."""
    for number, name in enumerate(("ant", "bee", "cat")):
        for index in range(3):
            write_picture(tmp_path / "train" / name / f"{index}.JPEG", 10 * number + index)
        write_picture(tmp_path / "val" / name / "v.png", 100 + number)
    return tmp_path


def folder(root: Path, **options: Any) -> Images:
    return Images(**{"dataset": "imagefolder", "root": str(root), "size": 16, "workers": 0, **options})


def test_evaluation_is_the_preprocess(root: Path):
    data = folder(root, crop=0.9, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert data.preprocess == ImagePreprocess(size=16, crop=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    batch = whole(data.val_dataloader())
    for index in range(3):
        expected = data.preprocess(data.source("val").image(index))
        assert torch.equal(batch.images[index], expected)
    assert batch.labels.tolist() == [0, 1, 2] and batch.labels.dtype == torch.int64


def test_whole_scale_cuts_the_centred_square(root: Path):
    data = folder(root, mean=[0.0] * 3, std=[1.0] * 3, **PLAIN)
    square = data.source("train").image(0).crop((3, 0, 27, 24)).resize((16, 16), Image.Resampling.BICUBIC)
    dataset = data.train_dataloader().dataset
    for epoch in range(5):
        image = image_of(dataset, epoch, 0).permute(1, 2, 0) * 255
        np.testing.assert_allclose(image.numpy(), np.asarray(square), atol=1e-3)


@pytest.mark.parametrize("dataset", ["digits", "synthetic", "imagefolder"])
def test_what_workers_get_pickles(dataset: str, root: Path):
    data = folder(root) if dataset == "imagefolder" else Images(dataset=dataset, channels=1)
    loader = data.train_dataloader()
    again, gather = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch, plain = gather(again.__getitems__([(1, 2), (1, 4)])), cast(Any, loader.dataset)
    assert torch.equal(batch.images, torch.stack([image_of(plain, 1, 2), image_of(plain, 1, 4)]))


def test_imagefolder(root: Path):
    write_picture(root / "train" / "bee" / "inner" / "deep.jpg")
    for hidden in ("train/bee/.hidden.png", "train/bee/.thumbs/x.png", "train/.git/x.png"):
        write_picture(root / hidden)
    (root / "train" / "bee" / "notes.txt").write_text("no picture")
    data = folder(root)
    assert data.classes == ["ant", "bee", "cat"]
    train = data.source("train")
    assert train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert [Path(train.name(i)).name for i in range(3)] == ["0.JPEG", "1.JPEG", "2.JPEG"]
    batch = whole(data.train_dataloader())
    assert batch.images.shape == (10, 3, 16, 16) and batch.skipped == ()


def test_imagefolder_below_a_hidden_folder(root: Path):
    place = root / ".cache"
    place.mkdir()
    for split in ("train", "val"):
        (root / split).rename(place / split)
    assert len(folder(place).source("train").labels) == 9


def test_imagefolder_test_split(root: Path):
    with pytest.raises(ValueError, match=r"has no test folder; `validate` measures .*/val$"):
        folder(root).setup("test")
    for name in ("ant", "bee", "cat"):
        write_picture(root / "test" / name / "t.png")
    assert folder(root).source("test").name(0) == str(root / "test" / "ant" / "t.png")
    assert len(whole(folder(root).test_dataloader()).labels) == 3


def test_other_classes_in_val(root: Path):
    (root / "val" / "cat").rename(root / "val" / "dog")
    with pytest.raises(ValueError, match=r"val differ .* without cat, with dog$") as error:
        folder(root).setup("fit")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="without cat"):
        _ = folder(root).classes
    for number in range(9):
        (root / "val" / f"extra{number}").mkdir()
    with pytest.raises(ValueError, match=r"extra3 and 5 more$"):
        folder(root).setup("validate")


def test_empty_class_folders(root: Path):
    for split in ("train", "val"):
        (root / split / "dodo").mkdir()
    (root / "train" / "dodo" / "notes.txt").write_text("no picture")
    write_picture(root / "train" / "dodo" / ".hidden.png")
    with pytest.raises(ValueError, match=r"train has class folders without .*: dodo$") as error:
        folder(root).setup("fit")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"val has class folders without .*: dodo$"):
        folder(root).setup("validate")


def test_missing_folders(root: Path, tmp_path: Path):
    layout = "the layout of an imagefolder is root/train/<class>"
    with pytest.raises(ValueError, match=f"nowhere/train is not a folder; {layout}"):
        folder(root / "nowhere").setup("fit")
    (root / "val").rename(root / "validation")
    with pytest.raises(ValueError, match=f"/val is not a folder; {layout}"):
        folder(root).setup("fit")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        folder(tmp_path / "flat").setup("fit")


def break_pictures(root: Path) -> Iterator[Path]:
    whole_file = (root / "train/ant/0.JPEG").read_bytes()
    for name, content in (("ant/0", whole_file[:300]), ("bee/1", b""), ("cat/2", b"text")):
        path = root / "train" / f"{name}.JPEG"
        path.write_bytes(content)
        yield path


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_skipped_and_named(root: Path, workers: int):
    broken = sorted(str(path) for path in break_pictures(root))
    (root / "val/cat/v.png").write_bytes(b"")
    data = folder(root, workers=workers, batch=9)
    (batch,) = data.train_dataloader()
    assert sorted(batch.skipped) == broken and isinstance(batch.skipped, tuple)
    assert batch.images.shape == (6, 3, 16, 16) and sorted(batch.labels) == [0, 0, 1, 1, 2, 2]
    batch = whole(data.val_dataloader())
    assert batch.labels.tolist() == [0, 1] and batch.skipped == (str(root / "val/cat/v.png"),)


def test_skipping_changes_no_other_picture(root: Path):
    before = folder(root).train_dataloader().dataset
    images = {index: image_of(before, 0, index) for index in range(9)}
    list(break_pictures(root))
    after: Any = folder(root).train_dataloader().dataset
    whole = [index for index in range(9) if index not in (0, 4, 8)]
    batch = after.__getitems__([(0, index) for index in range(9)])
    assert torch.equal(batch.images, torch.stack([images[index] for index in whole]))
    for index in range(9):
        assert bool(after[0, index].skipped) == (index not in whole)


def test_batch_of_unreadable_pictures_is_empty(root: Path):
    for path in (root / "train").glob("*/*"):
        path.write_bytes(b"")
    for channels in (1, 3):
        (batch,) = folder(root, channels=channels).train_dataloader()
        assert batch.images.shape == (0, channels, 16, 16) and batch.labels.shape == (0,)
        assert batch.labels.dtype == torch.int64 and batch.images.dtype == torch.float32
        assert len(batch.skipped) == 9


def test_other_errors_are_not_swallowed(root: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(index: int) -> Image.Image:
        raise ZeroDivisionError

    source = folder(root).source("train")
    monkeypatch.setattr(source, "image", fail)
    with pytest.raises(ZeroDivisionError):
        _ = ImageDataset(source, folder(root).preprocess.cut, folder(root).preprocess)[0, 0]
