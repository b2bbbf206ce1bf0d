"""What the data modules share: the loader, where an epoch starts, workers, and the preprocessing of a checkpoint."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, Dataset

from zoo.data.images import Images
from zoo.data.loading import Batches, DataModule, Loader, make_loader
from zoo.data.sampling import EpochSampler
from zoo.data.speech import Speech
from zoo.inputs.audio import RECIPES
from zoo.inputs.images import ImagePreprocess, default_statistics

# The loader


class Keys(Dataset[Any]):
    """The keys themselves, (epoch, index)."""

    def __getitem__(self, key: Any) -> Any:
        return key


def batches(count: int = 12, size: int = 2) -> Any:
    return BatchSampler(EpochSampler(count, training=True), size, True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_may_be_set_after_the_iterator_is_made(workers: int):
    """As Lightning does it. Workers of a plain DataLoader have the keys of epoch 0 by then."""
    loader = make_loader(Keys(), batches(), list, workers)
    for epoch in (3, 4):
        iterator = iter(loader)
        loader.batch_sampler.sampler.set_epoch(epoch)  # pyright: ignore
        assert {key[0] for batch in iterator for key in batch} == {epoch}
    assert len(loader) == 6


def test_an_epoch_may_start_in_its_middle():
    plain, sampler = list(batches()), Batches(batches())
    assert list(sampler) == plain and len(sampler) == 6
    sampler.skip = 4
    assert list(sampler) == plain[4:] and sampler.skip == 0 and len(sampler) == 6
    assert list(sampler) == plain
    sampler.skip = 6
    assert list(sampler) == []
    sampler.sampler.set_epoch(1)
    assert [key[0] for batch in sampler for key in batch] == [1] * 12


def test_no_more_workers_than_batches():
    assert make_loader(Keys(), batches(size=6), list, 1).num_workers == 1
    assert make_loader(Keys(), batches(size=6), list, 5).num_workers == 2
    loader = make_loader(Keys(), batches(size=6), list, 0)
    assert isinstance(loader, Loader) and loader.num_workers == 0 and not loader.persistent_workers


@pytest.mark.parametrize(
    ("workers", "files", "cores", "world", "wanted"),
    [
        (None, False, 8, 1, 0),  # what is made in memory needs none
        (None, True, 8, 1, 8),
        (None, True, 8, 4, 2),
        (None, True, 2, 4, 1),
        (None, True, 64, 1, 16),
        (0, True, 8, 1, 0),
        (3, False, 8, 2, 3),
    ],
)
def test_workers(workers: int | None, files: bool, cores: int, world: int, wanted: int, monkeypatch: Any):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("zoo.data.loading.rank_and_world", lambda: (0, world))
    assert Images(workers=workers).processes(files) == wanted


def test_workers_share_the_cores_of_their_machine(monkeypatch: Any):
    """Of two machines with four ranks each; SLURM gives each rank cores of its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    monkeypatch.setattr("zoo.data.loading.rank_and_world", lambda: (0, 8))
    data: Any = Images()
    data.trainer = SimpleNamespace(num_devices=4)
    assert data.processes(True) == 6
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "zoo", "SLURM_CPUS_PER_TASK": "8"}.items():
        monkeypatch.setenv(name, value)
    assert data.processes(True) == 8


# The preprocessing of a checkpoint

KEPT = ImagePreprocess(size=24, crop=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def followed(data: DataModule, preprocess: Any, stage: str) -> list[str]:
    return data.follow(preprocess and SimpleNamespace(preprocess=preprocess), stage)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_what_is_not_given_is_that_of_the_checkpoint(stage: str):
    data = Images()
    assert data.preprocess == ImagePreprocess(size=32)
    assert followed(data, KEPT, stage) == [] and data.preprocess == KEPT
    assert followed(data, None, stage) == [] and data.preprocess == ImagePreprocess(size=32)
    same = Images(size=24, crop=0.9, interpolation="bilinear", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert followed(same, KEPT, stage) == [] and same.preprocess == KEPT


def test_what_is_given_wins_in_fit_alone():
    data = Images(size=16, crop=1.0, mean=[0.0, 0.0, 0.0])
    (line,) = followed(data, KEPT, "fit")
    assert line == (
        "inputs are preprocessed as in the checkpoint, except for size 16 (was 24), "
        "mean [0.0, 0.0, 0.0] (was [0.1, 0.2, 0.3]), crop 1.0 (was 0.9)"
    )
    assert data.preprocess == replace(KEPT, size=16, crop=1.0, mean=(0.0, 0.0, 0.0))
    for stage in ("validate", "test"):
        (line,) = followed(data, KEPT, stage)
        assert line == (
            "measured with the preprocessing of the checkpoint: size 24 (not 16), "
            "mean [0.1, 0.2, 0.3] (not [0.0, 0.0, 0.0]), crop 0.9 (not 1.0)"
        )
        assert data.preprocess == KEPT


def test_other_channels_have_the_statistics_of_images():
    data = Images(channels=1)
    assert followed(data, KEPT, "fit")
    mean, std = default_statistics(1)
    assert data.preprocess == replace(KEPT, channels=1, mean=mean, std=std)


def test_speech_follows_too():
    kept = replace(RECIPES["squeezeformer"], mels=40)
    data = Speech()
    assert data.preprocess == RECIPES["nemo"]
    assert followed(data, kept, "fit") == [] and data.preprocess == kept
    data = Speech(mels=64)
    assert followed(data, kept, "fit") == ["inputs are preprocessed as in the checkpoint, except for mels 64 (was 40)"]
    assert data.preprocess == replace(RECIPES["squeezeformer"], mels=64)
    data = Speech(recipe="nemo")
    assert followed(data, kept, "fit") and data.preprocess == RECIPES["nemo"]
    (line,) = followed(data, kept, "validate")
    assert "mels 40 (not 80)" in line and data.preprocess == kept


def test_the_task_of_a_trainer_is_asked_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr("zoo.data.loading.rank_zero_info", lines.append)
    data = Images(dataset="synthetic", size=16)
    task = SimpleNamespace(start=SimpleNamespace(preprocess=KEPT))
    data.trainer = SimpleNamespace(lightning_module=task)  # pyright: ignore[reportAttributeAccessIssue]
    data.setup("validate")
    assert lines == ["measured with the preprocessing of the checkpoint: size 24 (not 16)"]
    (batch, *_) = data.val_dataloader()
    assert batch.images.shape[-1] == 24 and torch.equal(batch.images[0], KEPT(data.source("val").image(0)))
