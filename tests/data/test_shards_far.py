"""Shards that are read by a command or over HTTP, through a cache."""

import functools
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from sharding import image_folder, images, librispeech, packed
from zoo.data import fetching, shards
from zoo.data.speech import Speech
from zoo.inputs.images import UnreadableImage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return packed(image_folder(tmp_path / "loose"), tmp_path / "out")


class Quiet(SimpleHTTPRequestHandler):
    served: list[str] = []

    def log_message(self, *_: Any) -> None:
        pass

    def log_request(self, *_: Any) -> None:
        self.served.append(self.path)


@pytest.fixture
def address(out: Path) -> Iterator[str]:
    Quiet.served = []
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=out)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def contents(source: Any) -> list[bytes]:
    return [source.image(index).tobytes() for index in range(len(source.labels))]


def test_http_gives_the_same_and_each_shard_is_fetched_once(out: Path, address: str, cache: Path):
    local, far = (images(root).source("train") for root in (out, address))
    assert contents(far) == contents(local) and far.fingerprint == local.fingerprint
    again = images(address).source("train")
    assert contents(again) == contents(local)
    tars = [path for path in Quiet.served if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == len(local.shards.places) == len([*cache.glob("*/*.tar")])
    assert not [*cache.glob("*/*.new")] and far.name(0).startswith(f"{address}/train-000000.tar: train/")


def test_workers_share_the_cache(address: str):
    data = images(address, batch=4, workers=2)
    assert sum(len(batch.images) for batch in data.train_dataloader()) == 40
    tars = [path for path in Quiet.served if path.endswith(".tar")]
    assert len(tars) == len(set(tars))


def test_a_command_gives_the_same(out: Path):
    spoken = f"pipe:cat {out}"
    assert contents(images(spoken).source("val")) == contents(images(out).source("val"))
    with pytest.raises(ValueError, match="^cannot read pipe:cat /no/shards.json: the command ended with status 1$"):
        images("pipe:cat /no").source("val")


def test_speech_of_a_command(tmp_path: Path):
    out = packed(librispeech(tmp_path / "speech"), tmp_path / "spoken")
    sources = [Speech("shards", str(root), val="dev-clean").source("val") for root in (out, f"pipe:cat {out}")]
    for row in range(4):
        one, other = (source.waveform(row, 16000) for source in sources)
        assert one.equal(other) and sources[0].text(row) == sources[1].text(row)


def test_what_is_not_that_of_the_index_is_skipped(out: Path, address: str, cache: Path):
    source = images(address).source("train")
    groups = source.shards.groups.tolist()
    (out / "train-000001.tar").unlink()
    os.truncate(out / "train-000002.tar", 100)
    with open(out / "train-000003.tar", "r+b") as file:
        file.write(b"zoo")
    for shard, why in (
        (1, "curl ended with status 22"),
        (2, "its 100 bytes are not the "),
        (3, "its hash is not that of the index"),
    ):
        for index in range(groups[shard], groups[shard + 1]):
            with pytest.raises(UnreadableImage, match=f"train-00000{shard}.tar: train/.*: {why}"):
                source.image(index)
    for shard in (1, 2, 3):  # it was asked for once
        assert Quiet.served.count(f"/train-00000{shard}.tar") == 1
    assert source.image(0).size == (30, 24) and len([*cache.glob("*/*.tar")]) == 1
    assert not [*cache.glob("*/*.new")]


def test_the_cache_stays_below_its_share_of_the_disk(
    out: Path, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = images(address).source("train")
    sizes = source.shards.sizes
    most = sum(sizes[:3])

    def usage(folder: Path) -> Any:
        used = sum(path.stat().st_size for path in folder.glob("*.tar"))
        return type("Usage", (), {"free": most / fetching.SHARE - used})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert contents(source) == contents(images(out).source("train"))
    assert 0 < sum(path.stat().st_size for path in cache.glob("*/*.tar")) <= most
    again = images(address).source("train")
    assert contents(again) == contents(images(out).source("train"))


@pytest.mark.daily(2)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 6 worker processes")
def test_processes_that_remove_shards_of_each_other_read_all(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    out = packed(image_folder(tmp_path / "loose", train=20), tmp_path / "out", "12KB")
    wanted = contents(images(out).source("train"))
    source = images(f"pipe:cat {out}").source("train")
    count, size = len(source.shards.sizes), max(source.shards.sizes)
    assert count > 20
    # With half of what is free and used, the cache settles at a third of the shards.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": count // 3 * size}))
    monkeypatch.setattr(shards, "MOST_OPEN", 2)

    def faults(indices: list[int]) -> list[str]:
        found = []
        for index in indices:
            try:
                assert source.image(index).tobytes() == wanted[index]
            except UnreadableImage as error:
                found.append(str(error))
        return found

    order: Any = random.Random(0).choices(range(len(wanted)), k=900)
    loader = DataLoader(order, 15, num_workers=6, collate_fn=faults, multiprocessing_context="fork")
    assert sum(loader, []) == []
    files = sorted(path.name for path in cache.glob("*/*"))
    assert 0 < len(files) < count and all(name.endswith(".tar") for name in files)


def test_what_may_go_away_is_tried_again_later(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = images(f"pipe:cat {out}").source("train")
    out.rename(tmp_path / "away")
    with pytest.raises(UnreadableImage, match="the command ended with status 1$"):
        source.image(0)
    (tmp_path / "away").rename(out)
    with pytest.raises(UnreadableImage, match="the command ended with status 1$"):  # not for each image
        source.image(0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + shards.AGAIN)
    assert source.image(0).size == (30, 24)
