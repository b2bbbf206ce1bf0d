"""`zoo shard`: what it writes, what it refuses, and what is left when it ends early."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharding import image_folder, images, librispeech, manifest, packed
from training import refused
from zoo.__main__ import main
from zoo.data import packing
from zoo.data.packing import UNFINISHED
from zoo.data.shards import INDEX, Shards
from zoo.inputs.audio import UnreadableAudio
from zoo.tasks.shard import size_of


def content(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed `zoo shard` writes."""
    return content(packed(folder, tmp_path_factory.mktemp("whole") / "out"))


def test_it_writes_tars_and_an_index(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Any):
    out = packed(folder, tmp_path / "out")
    found = json.loads((out / INDEX).read_text())
    assert (found["format"], found["kind"], found["classes"]) == (1, "images", ["ant", "bee", "cat", "d. og"])
    for part in found["splits"].values():
        for shard in part["shards"]:
            assert whole[shard["name"]] == shard["sha256"] and (out / shard["name"]).stat().st_size == shard["size"]
            assert shard["size"] <= 30_000
    counts = {split: sum(shard["files"] for shard in part["shards"]) for split, part in found["splits"].items()}
    assert counts == {"train": 40, "val": 12}
    shards = {split: len(part["shards"]) for split, part in found["splits"].items()}
    said = f"{out} holds images: train 40 files in {shards['train']} shards, val 12 files in {shards['val']} shards\n"
    assert capsys.readouterr().out == said
    assert content(out) == whole  # byte for byte the same again


def test_some_splits(folder: Path, tmp_path: Path):
    out = packed(folder, tmp_path / "out", "1MB", "--split", "val")
    assert sorted(path.name for path in out.iterdir()) == [INDEX, "val-000000.tar", "val.safetensors"]
    said = refused("shard", folder, tmp_path / "other", "--split", "test")
    assert said == f"{folder} has no split 'test'; it has train, val" and not (tmp_path / "other").exists()


def test_sizes():
    assert [size_of(text) for text in ("256MB", "1.5 GB", "7b", "20KB")] == [256_000_000, 1_500_000_000, 7, 20_000]
    for text in ("", "12", "-1MB", "0MB", "1TB", "MB", "nanMB", "1e3MB"):
        with pytest.raises(ValueError, match="--size must be a number with B, KB, MB or GB"):
            size_of(text)


def test_what_is_refused_leaves_nothing(folder: Path, tmp_path: Path):
    out, empty, other = tmp_path / "out", tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("kept")
    assert refused("shard", tmp_path / "no", out) == f"{tmp_path / 'no'} is not a folder"
    assert refused("shard", empty, out) == f"{empty} is empty"
    assert refused("shard", other, out).startswith(f"nothing to pack was found in {other}; it needs train/CLASS/*.jpg")
    for inside in (folder, folder / "train/x"):
        assert refused("shard", folder, inside) == f"{inside} is inside {folder}; choose an OUT beside it"
    assert refused("shard", folder, other) == f"{other} is not empty; choose another OUT"
    assert refused("shard", folder, other / "notes.txt") == f"{other / 'notes.txt'} is not a folder; choose another OUT"
    said = refused("shard", folder, out, "--size", "3KB")
    assert said.startswith("--size 3,000 bytes is too small: ") and said.endswith("in a tar")
    assert not out.exists() and [path.name for path in other.iterdir()] == ["notes.txt"]
    packed(folder, out)
    assert refused("shard", folder, out) == f"{out} holds finished shards; delete it or choose another OUT"
    assert refused("shard", out, tmp_path / "again") == f"{out} holds shards already"


def test_a_disk_that_is_too_small_is_seen_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    said = refused("shard", folder, tmp_path / "out")
    assert said.startswith(f"{tmp_path / 'out'} needs ") and said.endswith("bytes of disk, and 100,000 are free")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any):
    out, written, real = tmp_path / "out", [], packing._write_tar

    def full(path: Path, *rest: Any) -> None:
        if len(written) == 3:
            path.with_name(f".{path.name}.new").write_bytes(b"part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path.name)
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_tar", full)
        command = f"zoo shard {folder} {out} --size 30KB"
        kept = f"No space left on device; what is packed is kept, continue with: {command}"
        assert refused("shard", folder, out, "--size", "30KB") == f"cannot pack into {out}: {kept}"
    flags = ["--data.dataset=shards", f"--data.root={out}", f"--trainer.default_root_dir={tmp_path}/run"]
    said = refused("classify", "fit", "--model.backbone.name=vit_micro", *flags, *QUIET)
    assert said == f"the shards in {out} are not finished; continue with: {command}"
    before = {name: (out / name).stat().st_mtime_ns for name in written}
    packed(folder, out)
    assert content(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in written} == before  # they were not written again


QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_epochs=1"]


def test_other_data_or_another_size_starts_again(folder: Path, tmp_path: Path):
    own, out = Path(shutil.copytree(folder, tmp_path / "own")), tmp_path / "out"
    packed(own, out)
    (out / INDEX).rename(out / "kept.json")
    (out / UNFINISHED).write_text(json.dumps({"command": "", "prints": {"train": "another", "val": "another"}}))
    (out / "train-000099.tar").write_bytes(b"old")
    (out / "mine-000001.tar").write_bytes(b"kept")
    (out / "kept.json").unlink()
    packed(own, out, "60KB")
    assert not (out / "train-000099.tar").exists() and (out / "mine-000001.tar").read_bytes() == b"kept"
    (out / "mine-000001.tar").unlink()
    assert content(out) == content(packed(own, tmp_path / "fresh", "60KB"))


def test_a_file_that_changes_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own, out, real = Path(shutil.copytree(folder, tmp_path / "own")), tmp_path / "out", packing._check_disk

    def change(*given: Any) -> None:
        (own / "val/cat/é0.png").write_bytes(b"short")
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_check_disk", change)
        said = refused("shard", own, out, "--size", "30KB")
    assert f"{own}/val/cat/é0.png changed meanwhile; what is packed is kept" in said and not (out / INDEX).exists()
    packed(own, out)
    assert content(out) == content(packed(own, tmp_path / "fresh"))


SLOW = """
import sys, time
from zoo.data import packing
real = packing._write_tar
def slow(path, *rest):
    real(path, *rest)
    print(path.name, flush=True)
    time.sleep(0.3)
packing._write_tar = slow
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run without it
from zoo.__main__ import main
main(["shard", *sys.argv[1:], "--size", "30KB"])
"""


@pytest.mark.daily(2)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_index_and_continues(folder: Path, tmp_path: Path, whole: Any, number: int):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", SLOW, folder, out], stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() and child.stdout.readline()
        assert refused("shard", folder, out, "--size", "30KB") == f"another `zoo shard` is writing into {out}"
        child.send_signal(number)
        said = child.communicate()[1]
        line = f"zoo: stopped; what is packed is kept, continue with: zoo shard {folder} {out} --size 30KB\n"
        assert number == signal.SIGKILL or said.endswith(line)
        assert child.returncode == (-number if number == signal.SIGKILL else 130)
    assert not (out / INDEX).exists() and len([*out.glob("train-*.tar")]) >= 2
    with pytest.raises(ValueError, match="are not finished; continue with: zoo shard "):
        images(out).source("train")
    packed(folder, out)
    assert content(out) == whole


def test_check_names_what_differs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = packed(folder, tmp_path / "out")
    capsys.readouterr()
    check = ["shard", "--check", str(out)]
    main(check)
    assert capsys.readouterr().out.startswith(f"{out} is as it was packed; images: train 40 files in ")
    with open(out / "train-000001.tar", "r+b") as file:
        file.seek(700)
        file.write(b"zoo")
    os.truncate(out / "val-000000.tar", 100)
    (out / "val.safetensors").unlink()
    size = json.loads((out / INDEX).read_text())["splits"]["val"]["shards"][0]["size"]
    assert refused(*check).split("; ") == [
        f"3 files of {out} differ from the index: {out / 'val.safetensors'}: No such file or directory",
        f"{out / 'train-000001.tar'}: its hash is not that of the index",
        f"{out / 'val-000000.tar'}: 100 bytes instead of {size:,}",
    ]


def test_without_the_package_one_line_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = packed(folder, tmp_path / "out")
    for name in ("webdataset", "webdataset.writer", "webdataset.gopen"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = 'zoo shard needs webdataset; run: pip install "zoo[shards]"'
    assert refused("shard", folder, tmp_path / "other") == wanted
    assert not (tmp_path / "other").exists()
    assert images(out).source("train").image(3).size == (30, 24)  # local shards need no package
    with pytest.raises(ValueError, match='^shards at an address need webdataset; run: pip install "zoo.shards."$'):
        images(f"pipe:cat {out}").source("train")


def test_speech_keeps_the_names_of_its_splits(tmp_path: Path):
    out = packed(librispeech(tmp_path / "loose"), tmp_path / "out", "1MB")
    assert [*json.loads((out / INDEX).read_text())["splits"]] == ["dev-clean", "train-clean-100"]


def test_sound_files_named_like_what_is_beside_them(tmp_path: Path):
    folder = manifest(tmp_path / "loose")
    lines = (folder / "list.json").read_text()
    for old, new in (("a.wav", "a.txt"), ("b.flac", "b.json")):
        (folder / old).rename(folder / new)
        lines = lines.replace(old, new)
    (folder / "list.json").write_text(lines)
    out = packed(folder, tmp_path / "out", "1MB")
    found = Shards(str(out), "list.json", "speech", UnreadableAudio)
    read = {found.names[number]: found.read(number) for number in range(3)}
    assert read["a.txt"] == (folder / "a.txt").read_bytes() and read["b.json"] == (folder / "b.json").read_bytes()


def test_shards_that_another_process_finished_meanwhile_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, plain = tmp_path / "out", packing._plans

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(packing, "_plans", plain)
        packed(folder, out)
        return plain(*arguments)

    monkeypatch.setattr(packing, "_plans", slow)
    assert "holds finished shards" in refused("shard", folder, out, "--size", "60KB")
    assert not [*packing.faults(out)]


def test_out_is_a_link_to_nothing_and_the_largest_size(folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert "link is not a folder; choose another OUT" in refused("shard", folder, tmp_path / "link")
    assert "--size must be" in refused("shard", folder, tmp_path / "out", "--size", "999999999999GB")


def test_arguments(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["folder"], ["folder", "out", "--check", "out"]):
        with pytest.raises(SystemExit) as stop:
            main(["shard", *arguments])
        assert stop.value.code == 2 and "zoo shard: error: " in capsys.readouterr().err
