"""The cache of features: the same values, without decoding again; changed, damaged and unwritable files."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import save

from sharding import packed, write_tone
from zoo.data.feature_cache import FeatureCache
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
    other = data(root, dither=0.1, seed=1, cache=str(tmp_path / "cache"))
    assert not equal(clips(other), clips(one)) and not equal(clips(data(root, dither=0.0)), clips(one))


def test_the_run_that_fills_it_does_not_matter(root, tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    clips(data(root, dither=0.1, cache=one, shortest=0.55))  # the first utterance is missing
    first, second = clips(data(root, dither=0.1, cache=one)), clips(data(root, dither=0.1, cache=other))
    assert equal(first, second)


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
    assert min(path.stat().st_size for path in files) > 1000  # they are whole again
    cached = FeatureCache(str(cache), RECIPES["nemo"])
    cached.write("a", torch.zeros(3, 80), False, True)
    assert cached.read("a") is not None and cached.read("b") is None
    [path] = {*cache.glob("*/*.safetensors")} - {*files}
    for wrong in (torch.zeros(3, 79), torch.zeros(80), torch.zeros(3, 80, dtype=torch.float64)):
        path.write_bytes(save({"features": wrong, "flags": torch.zeros(2)}))
        assert cached.read("a") is None
    path.write_bytes(save({"features": torch.zeros(3, 80), "flags": torch.tensor(True)}))
    assert cached.read("a") is None


def test_a_full_disk_is_reported_once(root, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("zoo.data.feature_cache.os.replace", full)
    wanted = clips(data(root, dither=0.0))
    with pytest.warns(UserWarning, match="^data.cache: cannot write to .*/cache: No space left on device; ") as told:
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

    given = {"workers": 2, "dither": 0.0}
    one, other = (features(data(root, cache=cache, **given)) for cache in (None, str(tmp_path / "cache")))
    assert len([*(tmp_path / "cache").glob("*/*.safetensors")]) == 3
    again = features(data(root, cache=str(tmp_path / "cache"), **given))
    assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_silence_depends_on_the_text_of_this_run(root, tmp_path):
    quiet = root / "train-clean-100/1/7/1-7-0000.flac"
    soundfile.write(quiet, [0.0] * 8000, 16000)
    cache = str(tmp_path / "cache")
    for text, silent in (("", False), ("A CAT", True)):
        (tmp_path / "list.json").write_text(json.dumps({"audio_filepath": str(quiet), "text": text}) + "\n")
        given = {"dataset": "manifest", "train": None, "val": [str(tmp_path / "list.json")], "dither": 0.0}
        assert [clip.silent for clip in clips(Speech(**given, cache=cache), "val")] == [silent]


def test_a_file_in_its_place_is_one_line(root, tmp_path):
    (tmp_path / "cache").write_text("")
    for cache in (str(tmp_path / "cache"), ""):
        with pytest.raises(ValueError, match="^data.cache: cannot make the folder "):
            data(root, cache=cache).setup("fit")


@pytest.mark.parametrize("options", [{"joined": 2}, {"speeds": [0.9, 1.0]}, {"noise": (5, 20)}])
def test_changes_of_the_waveform_are_refused(options):
    with pytest.raises(ValueError, match="^cache needs joined 1, speeds .1.0. and noise null, which change waveforms"):
        Speech(cache="anywhere", **options)
