"""Batches of images: the built-in sets, augmentation, randomness, loaders, and the options of the data module."""

import inspect
import random
from typing import Any

import jsonargparse
import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from image_cases import PLAIN, image_of, whole
from zoo.data.images import Batch, Images, training_transform
from zoo.data.sampling import seeded
from zoo.inputs.images import ImagePreprocess


def states() -> list[str]:
    return [repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())]


# Digits


def test_digits_split_is_fixed_and_stratified():
    data = Images(seed=0, size=8)
    train, val = data.source("train"), data.source("val")
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    for label in range(10):
        share = (train.labels == label).mean()
        assert abs(share - (val.labels == label).mean()) < 0.005
    other = Images(seed=7, size=8)
    assert (other.source("val").labels == val.labels).all()
    assert val.labels[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
    assert len(Images(fraction=0.5).source("val").labels) == 899
    assert data.classes == [str(digit) for digit in range(10)]


def test_digits_parts_share_no_picture():
    """All 1797 pictures are distinct, so bytes tell them apart."""
    data = Images(size=8, interpolation="nearest")
    parts = {}
    for split in ("train", "val", "test"):
        source = data.source(split)
        parts[split] = {source.image(i).tobytes() for i in range(len(source.labels))}
    assert not parts["train"] & parts["val"] and parts["val"] == parts["test"]
    assert len(parts["train"]) == 1437


def test_digits_values_and_size():
    from sklearn.datasets import load_digits

    data = Images(size=8, channels=1, mean=[0.0], std=[1.0], crop=1.0)
    images = whole(data.val_dataloader()).images
    raw, _ = load_digits(return_X_y=True)
    known = {row.astype(int).tobytes() for row in raw}
    assert images.max() == 1 and images.min() == 0
    for image in images:
        assert torch.round(image * 16).long().numpy().tobytes() in known
    enlarged = Images(size=32).source("val").image(0)
    assert enlarged.size == (32, 32) and enlarged.mode == "RGB"


# Transforms


@pytest.mark.parametrize("channels", [1, 3])
def test_training_without_augmentation_is_a_resize(channels: int):
    data = Images(channels=channels, size=24, crop=1.0, **PLAIN)
    dataset = data.train_dataloader().dataset
    for index in range(5):
        torch.testing.assert_close(image_of(dataset, 0, index), data.preprocess(data.source("train").image(index)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "option",
    [
        {"randaugment": "rand-m9-mstd0.5-inc1"},
        {"randaugment": "3a"},
        {"flip": 1.0},
        {"scale": (0.08, 1.0)},
        {"jitter": 0.4},
        {"jitter": 0.4, "randaugment": "rand-m0-n0"},
        {"erasing": 1.0},
    ],
    ids=str,
)
def test_each_augmentation_acts(channels: int, option: dict[str, Any]):
    plain = Images(dataset="synthetic", channels=channels, **PLAIN)
    data = Images(dataset="synthetic", channels=channels, **(PLAIN | option))
    changed = 0
    for index in range(8):
        before = image_of(plain.train_dataloader().dataset, 0, index)
        after = image_of(data.train_dataloader().dataset, 0, index)
        assert after.shape == (channels, 32, 32) and after.isfinite().all()
        changed += not torch.equal(before, after)
    assert changed >= 2


def test_erasing_puts_noise_into_a_rectangle():
    """Noise of standard deviation 1 in normalised units; what lies around stays."""
    plain = Images(dataset="synthetic", **PLAIN).train_dataloader().dataset
    erased = Images(dataset="synthetic", **(PLAIN | {"erasing": 1.0})).train_dataloader().dataset
    noise = []
    for index in range(20):
        before, after = image_of(plain, 0, index), image_of(erased, 0, index)
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        noise.append(after[:, changed].flatten())
    assert abs(torch.cat(noise).mean()) < 0.05 and abs(torch.cat(noise).std() - 1) < 0.05


def test_jitter_is_as_strong_as_asked():
    transform, erase = training_transform(Images(**(PLAIN | {"jitter": 0.4})))
    assert erase is None
    grey = Image.fromarray(np.full((8, 8, 3), 100, dtype=np.uint8))
    factors = []
    for index in range(200):
        with seeded(index):
            factors.append(float(np.asarray(transform(grey)).mean()) / 100)
    assert 0.59 <= min(factors) < 0.63 and 1.37 < max(factors) <= 1.41


def test_flip_mirrors():
    plain = Images(**PLAIN).train_dataloader().dataset
    flipped = Images(**(PLAIN | {"flip": 1.0})).train_dataloader().dataset
    assert torch.equal(image_of(flipped, 0, 3), image_of(plain, 0, 3).flip(-1))


def test_grey_is_normalised_with_one_value():
    grey = Images(channels=1, size=8, mean=[0.5], std=[0.25], **PLAIN).train_dataloader().dataset
    unit = Images(channels=1, size=8, mean=[0.0], std=[1.0], **PLAIN).train_dataloader().dataset
    torch.testing.assert_close(image_of(grey, 0, 0), (image_of(unit, 0, 0) - 0.5) / 0.25)


@pytest.mark.parametrize("name", ["rand-z9", "nonsense", "rand-mx9"])
def test_unknown_randaugment(name: str):
    with pytest.raises(ValueError, match=f"cannot parse randaugment='{name}'"):
        Images(randaugment=name).setup("fit")


@pytest.mark.parametrize("name", ["rand-m10-p1-n2-inc1", "rand-m0-p1", "v0", "original"])
def test_strong_posterizing(name: str):
    """Levels at which timm asks Pillow for 0 bits."""
    transform, _ = training_transform(Images(**(PLAIN | {"randaugment": name})))
    picture = Image.fromarray(np.full((8, 8, 3), 255, dtype=np.uint8))
    for index in range(200):
        with seeded(index):
            transform(picture)


@pytest.mark.parametrize("interpolation", ["lanczos", "box", "hamming"])
def test_interpolations_for_resizing_alone(interpolation: str):
    """Pillow does not rotate and shear by them: bicubic does, in the place of reading and on the device."""
    given: Any = PLAIN | {"randaugment": "rand-m9-p1-n3", "interpolation": interpolation, "dataset": "synthetic"}
    for place in ("workers", "device"):
        data = Images(**given, augment=place)
        batch = data.items("train").__getitems__([(0, index) for index in range(40)])
        assert len(data.on_after_batch_transfer(batch, 0).images) == 40


# Randomness


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    def epoch(number: int, seed: int = 0, workers: int = 0) -> Batch:
        torch.manual_seed(number + 17 * workers)
        random.seed(number + 17 * workers)
        np.random.seed(number + 17 * workers)
        data = Images(dataset="synthetic", size=16, seed=seed, workers=workers, jitter=0.3)
        loader = data.train_dataloader()
        batches: Any = loader.batch_sampler
        batches.sampler.set_epoch(number)
        return whole(loader)

    first = epoch(0)
    shared = epoch(0, workers=2)
    assert torch.equal(first.images, shared.images) and torch.equal(first.labels, shared.labels)
    assert not torch.equal(first.images, epoch(1).images)
    assert not torch.equal(first.images, epoch(0, seed=1).images)


def test_seed_epoch_and_index_each_change_a_picture():
    dataset: Any = Images(dataset="synthetic", size=16).train_dataloader().dataset
    assert torch.equal(image_of(dataset, 4, 0), image_of(dataset, 4, 0))
    assert not torch.equal(image_of(dataset, 4, 0), image_of(dataset, 5, 0))
    assert not torch.equal(image_of(dataset, 4, 0), image_of(dataset, 4, 4))
    other: Any = Images(dataset="synthetic", size=16, seed=1).train_dataloader().dataset
    assert not torch.equal(image_of(dataset, 4, 0), image_of(other, 4, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_main_generators_are_left_alone(workers: int):
    data = Images(dataset="synthetic", size=8, workers=workers)
    before = states()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert states() == before


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_sets_the_epoch():
    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
            self.validated = 0

        def training_step(self, batch: Batch) -> torch.Tensor:
            assert isinstance(batch, Batch)
            self.seen[self.current_epoch].append(batch.images)
            return self.weight * 0

        def validation_step(self, batch: Batch) -> None:
            self.validated += len(batch.labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = Images(dataset="synthetic", size=8, batch=256)
    module = Recorder()
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)
    for epoch in (0, 1):
        loader = data.train_dataloader()
        batches: Any = loader.batch_sampler
        batches.sampler.set_epoch(epoch)
        assert torch.equal(torch.cat(module.seen[epoch]), whole(loader).images)
    assert module.validated == 2 * 128


# Loaders


def test_no_image_is_left_out():
    data = Images(dataset="synthetic", size=8, batch=100)
    assert [len(batch.labels) for batch in data.train_dataloader()] == [100] * 4 + [56] * 2
    assert sum(len(batch.labels) for batch in data.val_dataloader()) == 128
    assert len(data.val_dataloader()) == 2
    small = Images(dataset="synthetic", size=8, batch=1000)
    assert [len(batch.labels) for batch in small.train_dataloader()] == [512]


def test_workers_persist(monkeypatch: pytest.MonkeyPatch):
    assert Images(dataset="synthetic", workers=1).train_dataloader().persistent_workers
    assert not Images(dataset="synthetic").train_dataloader().persistent_workers
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert Images(dataset="synthetic").train_dataloader().pin_memory == there


def test_a_batch_of_nothing():
    images = ImagePreprocess(size=4, channels=1, mean=(0.5,), std=(0.5,)).normalized([])
    assert images.shape == (0, 1, 4, 4) and images.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_its_images_are_alone(channels: int):
    """Augmented and erased, so no image's randomness depends on its batch."""
    dataset: Any = Images(dataset="synthetic", size=16, channels=channels, jitter=0.3).train_dataloader().dataset
    keys = [(1, 5), (1, 0), (1, 7)]
    batch = dataset.__getitems__(keys)
    assert torch.equal(batch.images, torch.stack([image_of(dataset, *key) for key in keys]))
    assert batch.labels.tolist() == [dataset.source.labels[index] for _, index in keys]


# Synthetic


def test_synthetic_is_fixed_and_learnable():
    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = Images(dataset="synthetic", channels=1).source(split)
        arrays = np.stack([np.asarray(source.image(i)) for i in range(len(source.labels))])
        spectrum = np.abs(np.fft.rfft2(arrays / 255.0 - 0.5))
        return spectrum.reshape(len(arrays), -1), source.labels

    train, labels = features("train")
    assert np.array_equal(train, features("train")[0])
    val, answers = features("val")
    assert not np.isclose(train[0], val[0]).all()
    model = LogisticRegression(max_iter=200).fit(train, labels)
    assert model.score(val, answers) > 0.9
    assert np.bincount(labels).tolist() == [128] * 4


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"dataset": "mnist"},
            "allowed: digits, fashion_mnist, imagefolder, shards, synthetic",
        ),
        ({"dataset": "imagefolder"}, "needs root"),
        ({"root": "somewhere"}, "'digits' takes no root; for your own images set dataset to imagefolder"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"workers": -1}, "workers must be >= 0"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"erasing": -0.5}, "erasing must be a probability"),
        ({"fraction": 1.0}, "fraction must be"),
        ({"scale": (0.9, 0.5)}, "scale must be"),
        ({"scale": (0.0, 1.0)}, "scale must be"),
        ({"jitter": -1.0}, "jitter must be"),
        ({"size": 0}, "size must be"),
        ({"channels": 2}, "channels must be"),
        ({"mean": [0.5]}, "mean has 1 values"),
        ({"channels": 1, "std": [0.5, 0.5, 0.5]}, "std has 3 values"),
        ({"interpolation": "random"}, "unknown interpolation"),
        ({"crop": 0.0}, "crop must be"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words) as error:
        Images(**options)
    assert "\n" not in str(error.value)


def test_options_are_documented_flags():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Images, "data")
    text = parser.format_help()
    for name in inspect.signature(Images).parameters:
        (action,) = (a for a in parser._actions if a.dest == f"data.{name}")
        assert action.help and len(action.help) > 20, name
        assert f"--data.{name}" in text
    flags = ["--data.scale=[0.5,1.0]", "--data.randaugment=null", "--data.mean=[0.1,0.2,0.3]"]
    data = parser.instantiate_classes(parser.parse_args(flags)).data
    assert data.scale == (0.5, 1.0) and data.randaugment is None
    assert data.preprocess.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.2, 1.0)])
def test_rectangles(scale: tuple[float, float]):
    data = Images("synthetic", size=(12, 20), batch=4, workers=0, scale=scale, randaugment=None, erasing=0.0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader)).images.shape == (4, 3, 12, 20)
    assert data.example()[1] == "an image of 3 x 12 x 20"
    assert data.prepared(data.preprocess) == data.preprocess
