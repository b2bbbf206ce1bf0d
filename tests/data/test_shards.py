"""Shards hold what the loose files hold, and are read once per epoch, whatever happens to them."""

import gc
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ranks import set_rank
from sharding import image_folder, images, packed
from training import PLAIN, command, fit, refused
from zoo.data import sampling, shards
from zoo.data.sampling import EpochSampler
from zoo.data.shards import Shards, read_at
from zoo.inputs.images import UnreadableImage


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images, and its shards."""
    folder = image_folder(tmp_path_factory.mktemp("loose"))
    return folder, packed(folder, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def copied(both: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(both[1], tmp_path / "out"))


def samples(source: Any) -> Counter[tuple[int, bytes]]:
    return Counter((int(label), source.image(index).tobytes()) for index, label in enumerate(source.labels))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_samples_are_those_of_the_folder(both: tuple[Path, Path], channels: int):
    loose, packs = images(both[0], "imagefolder", channels=channels), images(both[1], channels=channels)
    assert loose.classes == packs.classes == ["ant", "bee", "cat", "d. og"]
    for split, count in (("train", 40), ("val", 12)):
        found = samples(packs.source(split))
        assert found == samples(loose.source(split)) and found.total() == count
    name = packs.source("val").name(0)
    assert name.startswith(f"{both[1]}/val-000000.tar: val/") and name.endswith(".png")
    assert packs.described() == "shards: 40 images to train on, 12 to validate, 4 classes"


def test_classes_are_mixed_in_the_tars(both: tuple[Path, Path]):
    source = images(both[1]).source("train")
    assert 5 < len(source.shards.groups) < 20
    assert all(len(set(source.labels[start : start + 10].tolist())) > 2 for start in range(0, 40, 10))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_tars(both: tuple[Path, Path]):
    from webdataset.compat import WebDataset

    source = images(both[1]).source("train")
    tars = sorted(map(str, both[1].glob("train-*.tar")))
    found = [*WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpeg", "cls")]
    assert [label for _, label in found] == source.labels.tolist()
    assert [image.tobytes() for image, _ in found] == [source.image(index).tobytes() for index in range(40)]
    gc.collect()  # the package leaves tars open


def test_without_augmentation_the_batches_hold_the_same(both: tuple[Path, Path]):
    found = []
    for root, dataset in ((both[0], "imagefolder"), (both[1], "shards")):
        batches = [*images(root, dataset, batch=5).val_dataloader()]
        inputs, labels = torch.cat([each.images for each in batches]), torch.cat([each.labels for each in batches])
        order = np.lexsort(inputs.flatten(1).numpy().T)
        found.append((inputs[order], labels[order]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# Order


@pytest.mark.parametrize("count", [1, 5, 40, 41])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_sample_comes_once_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch, count: int, world: int):
    monkeypatch.setattr(sampling, "WINDOW", 2)
    groups = np.unique(np.array([0, 3, 3, 4, 10, 11, 25, count]).clip(0, count))
    sampler = EpochSampler(count, training=True, seed=1, groups=groups)
    shares = []
    for rank in range(world):
        set_rank(monkeypatch, rank, world)
        shares.append([index for _, index in sampler])
        assert len(shares[-1]) == len(sampler)
    assert sorted(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_order_moves_through_windows_of_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "WINDOW", 2)
    sampler = EpochSampler(60, training=True, seed=3, groups=np.arange(0, 61, 10))
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
        windows = [{index // 10 for index in orders[-1][start : start + 20]} for start in (0, 20, 40)]
        assert [len(window) for window in windows] == [2, 2, 2] and set.union(*windows) == set(range(6))
        assert [index // 10 for index in orders[-1]] != sorted(index // 10 for index in orders[-1])
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(0)
    assert [index for _, index in sampler] == orders[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_sample_comes_once_over_workers(both: tuple[Path, Path], workers: int):
    data = images(both[1], batch=4, workers=workers)
    items, loader, orders = data.items("train"), data.train_dataloader(), []
    for epoch in range(2):
        loader.batch_sampler.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        found = [image.numpy().tobytes() for batch in loader for image in batch.images]
        wanted = [items[epoch, index].images.numpy().tobytes() for index in range(40)]
        assert len(set(found)) == 40 and sorted(found) == sorted(wanted)
        orders.append([wanted.index(each) for each in found])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_comes_once_over_ranks_and_workers(
    both: tuple[Path, Path], workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampling, "WINDOW", 2)
    data, seen = images(both[1], batch=7, workers=workers, **PLAIN), Counter[bytes]()
    for rank in range(3):
        set_rank(monkeypatch, rank, 3)
        seen.update(image.numpy().tobytes() for batch in data.train_dataloader() for image in batch.images)
    assert len(seen) == 40 and {*seen.values()} == {1}


# Reading


def test_few_tars_are_open_and_a_pickled_source_reads(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 3)
    source = images(both[1]).source("train")
    assert len(source.shards.places) > 3
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    found = [source.image(index).tobytes() for _ in range(3) for index in range(40)]
    assert len(os.listdir("/proc/self/fd")) - before == len(source.shards._open) == 3
    again = pickle.loads(pickle.dumps(source))
    assert not again.shards._open and [again.image(index).tobytes() for index in range(40)] == found[:40]
    del source, again
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_members_are_skipped_by_name(copied: Path):
    whole = images(copied).source("train")
    inside, header = int(whole.shards.offset[3]) + 20, int(whole.shards.offset[5]) - 508
    with open(copied / "train-000000.tar", "r+b") as file:
        for place in (inside, header):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
    source = images(copied).source("train")
    with pytest.raises(UnreadableImage, match="JPEG: damaged, its checksum is wrong$"):
        source.image(3)
    with pytest.raises(UnreadableImage, match="JPEG: the tar is not that of the index, or is truncated$"):
        source.image(5)
    batch = images(copied).items("train").__getitems__([(0, index) for index in range(8)])
    assert batch.skipped == (source.name(3), source.name(5)) and len(batch.images) == 6


def test_a_corrupt_image_was_packed_as_it_is_and_is_skipped(tmp_path: Path):
    folder = image_folder(tmp_path / "loose")
    (folder / "train/ant/0.x.JPEG").write_bytes(b"\xff\xd8 no image")
    (folder / "train/bee/0.x.JPEG").write_bytes(b"")
    data = images(packed(folder, tmp_path / "out"))
    skipped = [name for batch in data.train_dataloader() for name in batch.skipped]
    assert sorted(name.partition(": ")[2] for name in skipped) == ["train/ant/0.x.JPEG", "train/bee/0.x.JPEG"]


def test_missing_and_truncated_shards_are_omitted_in_one_warning(copied: Path):
    whole = images(copied).source("train")
    groups = whole.shards.groups.tolist()
    (copied / "train-000001.tar").unlink()
    cut = int(whole.shards.offset[groups[2] + 1]) + 5
    os.truncate(copied / "train-000002.tar", cut)  # its first image is left
    lost = groups[3] - groups[1] - 1
    wanted = (
        rf"omitted {lost} files of 2 damaged shards \({copied}/train-000001.tar: No such file or directory; "
        rf"{copied}/train-000002.tar: {cut:,} bytes instead of [0-9,]+\)"
    )
    with pytest.warns(UserWarning, match=wanted):
        source = images(copied).source("train")
    assert len(source.labels) == 40 - lost == sum(np.diff(source.shards.groups))
    kept = [index for index in range(40) if not groups[1] <= index < groups[3] or index == groups[2]]
    assert source.labels.tolist() == whole.labels[kept].tolist()
    assert [source.name(place) for place in range(len(kept))] == [whole.name(index) for index in kept]
    for place, index in enumerate(kept):
        if index < groups[1] or index >= groups[3]:
            assert source.image(place).tobytes() == whole.image(index).tobytes()


def test_no_shard_is_left(copied: Path):
    for path in copied.glob("val-*.tar"):
        path.write_bytes(b"another")
    assert "none is left of 'val'" in refused("classify", "validate", *VALIDATE, f"--data.root={copied}")


def test_another_tar_of_the_same_size_gives_no_data(copied: Path):
    first, other = copied / "train-000000.tar", copied / "train-000001.tar"
    source, size = images(copied).source("train"), first.stat().st_size
    first.write_bytes(other.read_bytes()[:size].ljust(size, b"\0"))
    for index in range(int(source.shards.groups[1])):
        with pytest.raises(UnreadableImage, match="the tar is not that of the index"):
            source.image(index)


VALIDATE = ["--model.weights=vit_micro.digits", "--data.dataset=shards", "--trainer.accelerator=cpu"]


def test_what_is_no_index_is_refused_in_one_line(copied: Path, tmp_path: Path):
    def says(root: Path | str) -> str:
        with pytest.raises(ValueError) as error:
            Shards(str(root), "train", "images", UnreadableImage)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert says(tmp_path / "no") == f"{tmp_path / 'no'} is not a folder"
    assert says(tmp_path) == f"{tmp_path} has no shards.json; write shards with: zoo shard FOLDER {tmp_path}"
    for line, shown in (("zoo shard a b; ls", "continue with: zoo shard a 'b;' ls"), ("ls", "zoo shard FOLDER")):
        (tmp_path / ".unfinished.json").write_text(json.dumps({"command": line}))
        assert shown in says(tmp_path)
    index = copied / "shards.json"
    text = index.read_text()
    for changed, why in (
        ("[1]", "is not the index of shards"),
        ("{", "is not the index of shards"),
        (text.replace('"format": 1', '"format": 2'), "format must be 1, got 2"),
        (text.replace('"splits"', '"parts"'), "'splits' is missing"),
        (text.replace('"size": ', '"size": 9999999999999999'), "must be integers >= 0"),
        (text.replace('"ids": []', '"ids": null'), "ids a list of integers"),
        (text.replace("train-000001.tar", "../x.tar"), "'../x.tar' is not the name of a file"),
        (text.replace("train-000001.tar", "a;rm"), "'a;rm' is not the name of a file"),
        (
            re.sub('"sha256": "[0-9a-f]{4}', '"sha256": "../x', text),
            "the hashes of 'train' must have 64 hexadecimal digits",
        ),
        (text.replace('"images"', '"speech"'), "holds speech, for `zoo transcribe`, not images"),
        (text.replace('"train":', '"dev":'), "has no split 'train'; it has dev, val"),
    ):
        index.write_text(changed)
        assert why in says(copied), changed[:100]
    index.write_text(text)
    with open(copied / "train.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xee")
    assert says(copied) == f"{copied / 'train.safetensors'} does not match shards.json; run `zoo shard` again"


def rewritten(out: Path, **changed: Any) -> None:
    """Replaces arrays of the training images, whose hash the index then has."""
    arrays = load_file(out / "train.safetensors")
    for name, value in changed.items():
        arrays.pop(name) if value is None else arrays.update({name: value(arrays[name])})
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, out / "train.safetensors")
    index = json.loads((out / "shards.json").read_text())
    index["splits"]["train"]["sha256"] = hashlib.sha256((out / "train.safetensors").read_bytes()).hexdigest()
    (out / "shards.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"label": None}, "does not fit shards.json: it has no 'label'; run `zoo shard` again"),
        ({"crc": None}, "does not fit shards.json: it has no 'crc'"),
        ({"label": lambda array: array + 1}, "has labels that are none of its 4 classes"),
        ({"offset": lambda array: array + 40_000}, "an offset is outside its tar"),
        ({"length": lambda array: array + 2**62}, "an offset is outside its tar"),
        ({"length": lambda array: array * 1.0}, "must be integers"),
        ({"crc": lambda array: array[:-1]}, "they have different numbers of files"),
        ({"name_ends": lambda array: array[::-1]}, "the ends of strings must rise"),
        ({"name_ends": lambda array: array * 1.0}, "strings must be bytes and where each ends"),
        ({"label": lambda array: array[:-1]}, "'label' has another dtype or shape"),
    ],
    ids=["no label", "no crc", "labels", "offsets", "lengths", "floats", "fewer", "ends", "end floats", "fewer labels"],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(changed: dict[str, Any], why: str, copied: Path):
    rewritten(copied, **changed)
    with pytest.raises(ValueError, match=why) as error:
        images(copied).source("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("boxes", {"starts": np.array([0, -1, 1])}),
        ("boxes", {"labels_of": np.array([2])}),
        ("boxes", {"boxes": np.full((1, 4), np.nan)}),
        ("boxes", {"sizes": np.array([[9, 9]])}),
        ("speech", {"start": np.array([0.0, np.inf])}),
        ("speech", {"duration": np.ones(1)}),
        ("speech", {"file": np.array([0.0, 1.0])}),
    ],
)
def test_arrays_of_objects_and_of_speech_that_do_not_fit_are_refused(kind: Any, changed: dict[str, Any], copied: Path):
    two, ends, letters = np.arange(2), np.array([0, 1, 2]), np.array([65, 66], dtype=np.uint8)
    arrays: dict[str, Any] = {"offset": two * 1024 + 512, "length": two * 0 + 9, "crc": two, "name": letters}
    if kind == "boxes":
        arrays |= {"ids": two, "sizes": np.array([[9, 9], [9, 9]]), "starts": np.array([0, 1, 1])}
        arrays |= {"labels_of": two[:1], "boxes": np.ones((1, 4)), "areas": np.ones(1), "object_ids": two[:1]}
        arrays["crowd"] = np.zeros(1, dtype=bool)
    else:
        arrays |= {"file": two, "start": two * 1.0, "seconds": two * np.nan, "duration": np.ones(2)}
        arrays |= {"text": letters, "text_ends": ends, "utterance": letters, "utterance_ends": ends}
    shard = {
        "name": "train-000000.tar",
        "size": (copied / "train-000000.tar").stat().st_size,
        "sha256": "0" * 64,
        "files": 2,
    }

    def read(**changed: Any) -> Shards:
        save_file({**arrays, "name_ends": ends, **changed}, copied / "train.safetensors")
        digest = hashlib.sha256((copied / "train.safetensors").read_bytes()).hexdigest()
        part = {"shards": [shard], "arrays": "train.safetensors", "sha256": digest}
        index = {"format": 1, "kind": kind, "classes": ["a", "b"], "ids": [1, 2], "splits": {"train": part}}
        (copied / "shards.json").write_text(json.dumps(index))
        return Shards(str(copied), "train", kind, UnreadableImage)

    assert len(read().kept) == 2
    with pytest.raises(ValueError, match=r"train\.safetensors does not fit shards\.json"):
        read(**changed)


# Training


RUN = ["--trainer.max_epochs=2", "--data.batch=8", "--trainer.limit_val_batches=1", "--data.size=16"]


def test_a_run_is_not_resumed_on_other_shards(both: tuple[Path, Path], copied: Path, tmp_path: Path):
    root = tmp_path / "run"
    fit(root, *RUN, f"--data.root={copied}", "--trainer.max_epochs=1", data="shards")
    again = [*RUN, f"--data.root={copied}", f"--ckpt_path={root}/resume/last.ckpt"]
    shutil.rmtree(copied)
    packed(image_folder(tmp_path / "other", train=11), copied)
    with pytest.raises(SystemExit) as stop:
        fit(root, *again, data="shards")
    assert stop.value.code == (
        f"zoo: error: the data of 'train' and 'val' in {copied} is not that which the run was started on; "
        "restore it, or resume on this with --data.changed=ok"
    )
    fit(root, *again, "--data.changed=ok", data="shards")


def test_shards_and_folder_have_the_same_score(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(tmp_path, *RUN, f"--data.root={both[1]}", data="shards")
    capsys.readouterr()
    said = []
    for root, dataset in ((both[0], "imagefolder"), (both[1], "shards")):
        weights = f"--model.weights={tmp_path}/last"
        command("validate", weights, f"--data.dataset={dataset}", f"--data.root={root}")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "accuracy" in said[0]


def test_fewer_samples_than_ranks(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    data, seen, trained = images(both[1]), [], []
    for rank in range(50):
        set_rank(monkeypatch, rank, 50)
        assert len(batches := [*data.train_dataloader()]) == 1
        trained.append(len(batches[0].images))
        seen.append(sum(len(batch.labels) for batch in data.val_dataloader()))
    assert sum(seen) == 12 and trained == [1] * 40 + [0] * 10


def test_a_read_that_returns_less_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One call of the system reads at most 2 GiB."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: plain(file, min(length, 7), offset))
    file = os.open(tmp_path / "file", os.O_RDONLY)
    assert read_at(file, 50, 20) == bytes(range(20, 70)) and read_at(file, 50, 90) == bytes(range(90, 100))
    os.close(file)
