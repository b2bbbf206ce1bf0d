"""Augmentation of uint8 batches: the operations of timm on single images, the same choices, trainings."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from training import classifier, fit, state, trainer
from zoo.data.device_augment import OPERATIONS, DeviceAugment, _moved
from zoo.data.images import Batch, Images, Pixels
from zoo.inputs.images import ImagePreprocess

FILL = (124, 116, 104)
COLOURS = {
    "AutoContrast": [()],
    "Equalize": [()],
    "Invert": [()],
    "Posterize": [(1,), (4,), (8,)],
    "Solarize": [(0,), (100,), (256,)],
    "SolarizeAdd": [(0,), (70,), (110,)],
    "Color": [(0.1,), (1.0,), (1.9,)],
    "Contrast": [(0.1,), (1.0,), (1.9,)],
    "Brightness": [(0.1,), (1.0,), (1.9,)],
    "Sharpness": [(0.1,), (1.0,), (1.9,)],
}
MOVES = {
    "Rotate": [(-30.0,), (0.0,), (17.0,)],
    "ShearX": [(-0.3,), (0.2,)],
    "ShearY": [(-0.2,), (0.3,)],
    "TranslateXRel": [(-0.45,), (0.3,)],
    "TranslateYRel": [(-0.3,), (0.45,)],
}


def smooth_images(number: int, height: int = 40, width: int = 56) -> Tensor:
    """Smooth random images, uint8 [B, 3, H, W], dark, bright and colourful."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, 6, 8, generator=draw)
    coarse = coarse * torch.rand(number, 3, 1, 1, generator=draw) + 0.3 * torch.rand(number, 3, 1, 1, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (255 * smooth).clamp(0, 255).to(torch.uint8)


def by_timm(name: str, image: Tensor, strength: tuple[Any, ...]) -> Tensor:
    made = Image.fromarray(image.permute(1, 2, 0).numpy())
    changed = auto_augment.NAME_TO_OP[name](made, *strength, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def ours(name: str, images: Tensor, strengths: list[tuple[Any, ...]]) -> Tensor:
    numbers = torch.tensor([(each or (0.0,))[0] for each in strengths], dtype=torch.float32)
    return OPERATIONS[name](images, numbers[:, None, None, None], FILL, "bilinear")


@pytest.mark.parametrize("name", [*COLOURS, *MOVES])
def test_each_operation_is_that_of_timm(name: str):
    """Values within one of 255 for colours; within two for moves, except where an edge of the image cuts a pixel."""
    strengths = (COLOURS | MOVES)[name]
    images = smooth_images(4).repeat_interleave(len(strengths), 0)
    wanted = torch.stack([by_timm(name, image, strengths[row % len(strengths)]) for row, image in enumerate(images)])
    found = ours(name, images, strengths * 4)
    assert found.dtype == torch.uint8
    apart = (found.int() - wanted.int()).abs()
    if name in COLOURS:
        assert apart.max() <= 1 and abs((found.int() - wanted.int()).float().mean()) < 0.05
    else:
        assert apart.float().quantile(0.98) <= 2 and (found != images).any()


def test_operations_know_all_of_timms_lists():
    for description in ("rand-m9-mstd0.5-inc1", "rand-m7-n3", "v0", "v0r", "original", "originalr"):
        data = Images(dataset="synthetic", size=16, randaugment=description, augment="device", batch=8, workers=0)
        batch = next(iter(data.train_dataloader()))
        assert isinstance(batch, Pixels) and batch.images.dtype == torch.uint8
        assert data.on_after_batch_transfer(batch, 0).images.shape == (8, 3, 16, 16)


@pytest.mark.parametrize("description", ["augmix-m3-w3", "3a"])
def test_what_is_for_single_images_is_refused(description: str):
    data = Images(dataset="synthetic", size=16, randaugment=description, augment="device")
    with pytest.raises(ValueError, match="is for single images; use data.augment=workers$"):
        data.train_dataloader()


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match="^augment must be workers or device, got 'gpu'$"):
        Images(augment="gpu")  # pyright: ignore[reportArgumentType]


def batches(data: Images) -> list[Batch]:
    loader: Any = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(3)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


PLAIN: dict[str, Any] = {"dataset": "synthetic", "size": 16, "batch": 16, "randaugment": None, "erasing": 0.0}


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_are_those_of_workers(channels: int):
    """The same values, to the last bit, where nothing else is done."""
    one, other = (
        batches(Images(**PLAIN, channels=channels, augment=place, workers=workers))  # pyright: ignore[reportArgumentType]
        for place, workers in (("workers", 0), ("device", 2))
    )
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_the_same_rectangles_are_erased():
    plain, one, other = (
        batches(Images(**PLAIN | {"erasing": erasing}, augment=place))  # pyright: ignore[reportArgumentType]
        for place, erasing in (("device", 0.0), ("workers", 0.5), ("device", 0.5))
    )
    noise = []
    for without, first, second in zip(plain, one, other, strict=True):
        changed = (second.images != without.images).any(1)
        assert torch.equal(changed, (first.images != without.images).any(1)) and changed.any() and not changed.all()
        noise.append(second.images.permute(0, 2, 3, 1)[changed])
    assert abs(float(torch.cat(noise).mean())) < 0.05 and abs(float(torch.cat(noise).std()) - 1) < 0.05


def plans(data: Images, number: int) -> list[list[tuple[str, float]]]:
    data.items("train")
    assert data.finish is not None
    return data.finish.plan([(0, index) for index in range(number)], (16, 16)).steps


def test_choices_are_as_often_as_timms():
    """Each of 15 operations is drawn twice and done in half of all cases; strengths follow mstd."""
    found = plans(Images(**PLAIN | {"randaugment": "rand-m9-mstd0.5-inc1"}, augment="device"), 3000)
    counts = Counter(name for plan in found for name, _ in plan)
    assert len(counts) == 15 and all(abs(count / 200 - 1) < 0.3 for count in counts.values())
    turns = torch.tensor([strength for plan in found for name, strength in plan if name == "Rotate"]).abs() / 3
    assert abs(turns.mean() - 9) < 0.15 and 0.3 < turns.std() < 0.6


def test_jitter_is_as_strong_as_asked():
    found = plans(Images(**PLAIN, jitter=0.4, augment="device"), 300)
    assert all(sorted(name for name, _ in plan) == ["Brightness", "Color", "Contrast"] for plan in found)
    assert len({tuple(name for name, _ in plan) for plan in found}) == 6
    strengths = [strength for plan in found for _, strength in plan]
    assert 0.59 < min(strengths) < 0.62 and 1.38 < max(strengths) < 1.41


def test_an_image_does_not_depend_on_its_batch():
    data = Images(**PLAIN | {"randaugment": "rand-m9-mstd0.5-inc1"}, jitter=0.3, augment="device")
    dataset = data.items("train")
    keys = [(2, index) for index in range(9)]
    together = data.on_after_batch_transfer(dataset.__getitems__(keys), 0).images
    alone = [data.on_after_batch_transfer(dataset.__getitems__([key]), 0).images for key in keys]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_workers_draw_what_the_device_does(precision: str, monkeypatch: pytest.MonkeyPatch):
    """And it arrives as it was drawn: Lightning rounds the floats of a batch."""
    plain, plan, own = DeviceAugment.__call__, DeviceAugment.plan, os.getpid()
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for workers, images in found.items():
        data = Images(**PLAIN | {"randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.5}, jitter=0.3, augment="device")
        data.workers = workers

        def noted(finish: DeviceAugment, pixels: Pixels, images: list[Tensor] = images) -> Tensor:
            images.append(plain(finish, pixels))
            return images[-1]

        def drawn(*given: Any, workers: int = workers) -> Any:
            assert (os.getpid() == own) == (workers == 0)
            return plan(*given)

        monkeypatch.setattr(DeviceAugment, "__call__", noted)
        monkeypatch.setattr(DeviceAugment, "plan", drawn)
        trainer(1, 3, precision=precision).fit(classifier(), datamodule=data)
    assert len(found[0]) == 3 and all(each.dtype == torch.float32 for each in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))


def test_outside_is_the_fill_and_a_move_by_nothing_changes_nothing():
    images = smooth_images(2)
    assert torch.equal(_moved(images, (1, 0, 0, 0, 1, 0), FILL, "bicubic"), images)
    away = _moved(images, (1, 0, 1000.0, 0, 1, 0), FILL, "bilinear")
    assert torch.equal(away, torch.tensor(FILL, dtype=torch.uint8)[:, None, None].expand_as(images))


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_autocast_and_the_default_dtype_change_nothing(default: torch.dtype):
    data = Images(**PLAIN | {"randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.5}, jitter=0.3, augment="device")
    batch = data.items("train").__getitems__([(0, index) for index in range(32)])
    wanted = data.on_after_batch_transfer(batch, 0).images
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = data.on_after_batch_transfer(batch, 0).images
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_grey_images_stay_as_bright_as_they_are():
    """Colours of a grey image are equal, so saturation changes nothing."""
    plain, other = (
        Images(dataset="digits", size=8, channels=1, randaugment=None, erasing=0.0, augment="device", jitter=jitter)
        for jitter in (0.0, 1e-9)
    )
    keys = [(0, index) for index in range(64)]
    one, two = (
        data.on_after_batch_transfer(data.items("train").__getitems__(keys), 0).images for data in (plain, other)
    )
    assert one.shape == two.shape == (64, 1, 8, 8)
    torch.testing.assert_close(one, two, atol=1.01 / 255 / 0.226, rtol=0)
    assert abs(float((two - one).mean())) < 0.2 / 255 / 0.226


def test_a_batch_of_unreadable_images_is_empty():
    finish = DeviceAugment([], 0.5, ImagePreprocess(size=16), 0)
    empty = Pixels(
        torch.empty(0, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.int64),
        finish.plan((), (16, 16)),
        ("a.png",),
    )
    assert finish(empty).shape == (0, 3, 16, 16)


def test_trainings_are_reproducible(tmp_path: Path):
    """With statistics that are recomputed on augmented batches."""
    flags = ["--data.augment=device", "--data.jitter=0.2", "--model.backbone.norm=prepbn", "--model.refresh=2"]
    flags += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        fit(folder, *flags)
    first, second = (state(folder / "resume/last.ckpt")["state_dict"] for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
