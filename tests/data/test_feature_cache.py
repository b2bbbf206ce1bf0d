"""The cache of features: the same values, without decoding again; changed, damaged and unwritable files."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding import packed, write_tone
from zoo.data.feature_cache import Kept
from zoo.data.speech import Batch, Speech
from zoo.data.speech_sources import Files, Packed
from zoo.inputs.audio import RECIPES

TEXTS = ["A CAT", "NO", "THE DOG RAN"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "libri"
    for split in ("train-clean-100", "dev-clean"):
        lines = []
        for number, text in enumerate(TEXTS):
            write_tone(folder / split / f"1/7/1-7-{number:04}.flac", 0.5 + 0.1 * number, number + len(split))
            lines.append(f"1-7-{number:04} {text}\n")
        (folder / split / "1/7/1-7.trans.txt").write_text("".join(lines))
    return folder


def data(root: Path, dataset: str = "librispeech", **options: Any) -> Speech:
    given = {"train": ["train-clean-100"], "val": ["dev-clean"], "tokenizer": "characters", "workers": 0}
    return Speech(**{"dataset": dataset, "root": str(root), **given, **options})


def clips(module: Speech, kind: str = "train", epoch: int = 0) -> list[Any]:
    dataset = getattr(module, f"{kind}_dataloader")().dataset
    return [dataset[epoch, index] for index in range(len(dataset))]


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a.features, b.features) and a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def never(*_: Any) -> Any:
    raise AssertionError("audio was decoded again")


@pytest.mark.parametrize("dataset", ["librispeech", "shards"])
def test_features_are_the_same_and_not_computed_again(root, tmp_path, monkeypatch, dataset):
    if dataset == "shards":
        root = packed(root, tmp_path / "out", "1MB")
    plain, cached = (data(root, dataset, dither=0.0, cache=cache) for cache in (None, str(tmp_path / "cache")))
    for kind in ("train", "val"):
        assert equal(clips(plain, kind), clips(cached, kind))
    assert len([*(tmp_path / "cache").glob("*/*.safetensors")]) == 6
    monkeypatch.setattr(Files if dataset == "librispeech" else Packed, "waveform", never)
    again = data(root, dataset, dither=0.0, cache=str(tmp_path / "cache"))
    for kind in ("train", "val"):
        assert equal(clips(again, kind), clips(cached, kind))


def test_dither_is_drawn_once(root, tmp_path):
    one = data(root, dither=0.1, cache=str(tmp_path / "cache"))
    assert equal(clips(one, epoch=0), clips(one, epoch=5))
    plain = data(root, dither=0.1)
    assert equal(clips(one), clips(plain)) and not equal(clips(plain), clips(plain, epoch=5))
    other = data(root, dither=0.1, seed=1, cache=str(tmp_path / "cache"))
    assert equal(clips(other), clips(data(root, dither=0.1, seed=1)))


def test_another_recipe_and_a_changed_file_have_features_of_their_own(root, tmp_path):
    given = {"dither": 0.0, "cache": str(tmp_path / "cache")}
    clips(data(root, **given))
    other = data(root, recipe="squeezeformer", **given)
    assert equal(clips(other), clips(data(root, recipe="squeezeformer", dither=0.0)))
    changed = root / "train-clean-100/1/7/1-7-0001.flac"
    write_tone(changed, 0.8, 99)
    assert equal(clips(data(root, **given)), clips(data(root, dither=0.0)))


def test_what_is_damaged_is_computed_again(root, tmp_path):
    cache = tmp_path / "cache"
    wanted = clips(data(root, dither=0.0, cache=str(cache)))
    files = sorted(cache.glob("*/*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes().replace(b"features", b"creature"))
    assert equal(clips(data(root, dither=0.0, cache=str(cache))), wanted)
    kept = Kept(str(cache), RECIPES["nemo"])
    assert all(kept.read(os.fspath(path)) is None for path in files)  # other names are other features
    found = [path.stat().st_size for path in files]
    assert min(found) > 1000


def test_a_full_disk_is_said_once(root, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("zoo.data.feature_cache.os.replace", full)
    wanted = clips(data(root, dither=0.0))
    with pytest.warns(UserWarning, match="^data.cache: cannot write .*: No space left on device; ") as told:
        assert equal(clips(data(root, dither=0.0, cache=str(tmp_path / "cache"))), wanted)
    assert len(told) == 1 and not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_faults_are_not_kept(root, tmp_path):
    (root / "train-clean-100/1/7/1-7-0000.flac").write_bytes(b"fLaC nonsense")
    module = data(root, cache=str(tmp_path / "cache"), shortest=0)
    for _ in range(2):
        found = clips(module)
        assert "cannot be read as audio" in found[0].fault and [each.fault for each in found[1:]] == ["", ""]
    assert len([*(tmp_path / "cache").glob("*/*")]) == 2


def test_workers_fill_it_together(root, tmp_path):
    def features(module: Speech) -> list[torch.Tensor]:
        batches: list[Batch] = list(module.train_dataloader())
        return [batch.features for batch in batches]

    one, other = (features(data(root, cache=cache, workers=2)) for cache in (None, str(tmp_path / "cache")))
    assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{"joined": 2}, {"speeds": [0.9, 1.0]}, {"noise": (5, 20)}])
def test_changes_of_the_waveform_are_refused(options):
    with pytest.raises(ValueError, match="^cache needs joined 1, speeds .1.0. and noise null, which change waveforms"):
        Speech(cache="anywhere", **options)
