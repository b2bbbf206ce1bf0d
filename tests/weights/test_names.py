"""What is no name, and places that cannot be read: one line of the zoo's own error, from every function that takes the
name of a checkpoint."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest

import zoo
from helpers import randomise
from zoo.__main__ import main, tasks
from zoo.inputs.images import ImagePreprocess
from zoo.models.vit import ViT
from zoo.tasks.evaluate.measure import evaluate
from zoo.weights import CheckpointError, load_checkpoint, load_model, save_model
from zoo.weights.hub import publish

NOBODY = 65534


class OwnPath(PosixPath):
    pass


class OwnLike:
    def __fspath__(self) -> str:
        return "here"


class BytesLike:
    def __fspath__(self) -> bytes:
        return b"here"


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "load_model": load_model,
    "load_checkpoint": load_checkpoint,
    "from_pretrained": ViT.from_pretrained,
    "publish": lambda name: publish(name, "owner/name", dry_run=True),
    "evaluate": lambda name: evaluate({}, name),
}


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the checkpoint `here`, that every user may read."""
    folder = Path(tempfile.mkdtemp(dir="/tmp" if os.geteuid() == 0 else None))
    folder.chmod(0o755)
    model = randomise(zoo.create_model("vit_micro", dim=16, depth=1, heads=2, image=16, patch=8, classes=2))
    save_model(model, folder / "here", preprocess=ImagePreprocess(size=16), labels=["a", "b"])
    monkeypatch.chdir(folder)
    load_checkpoint("here", check=True)  # imports what it needs while all may be read
    yield folder
    shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, whatever the mode says."""
    if (root := os.geteuid() == 0) and os.name == "posix":
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def line_of(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 600, text
    return text


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_name_is_refused(entry, home):
    for name in (None, 3, 1.5, True, b"here", bytearray(b"here"), ["here"], BytesLike(), object()):
        assert "must be a string or a path, got " in line_of(lambda name=name: ENTRIES[entry](name))
    for name in ("", " ", "\n", "a\0b", np.str_("")):
        assert "is not the name of a checkpoint" in line_of(lambda name=name: ENTRIES[entry](name))
    for name in ("x" * 300, "é" * 200, "a/" * 5000, "~nobody-of-this-name/x", "\ud800", "\x1b[31m", Path(), "..", "/"):
        line_of(lambda name=name: ENTRIES[entry](name))
    for name in ("timm:", "hf:", "zoo:", "nemo:", "hf:a", "hf:\n/x", "nemo:~nobody-of-this-name/x", "nemo:\x1b"):
        line_of(lambda name=name: ENTRIES[entry](name))


def test_names_of_other_types_are_read(home):
    for name in (np.str_("here"), Path("here"), OwnPath("here"), OwnLike(), OwnPath(home, "here")):
        assert load_checkpoint(name).labels == ("a", "b")
        assert "would get" in publish(name, "owner/name", dry_run=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("entry", ENTRIES)
def test_links_that_lead_to_themselves(entry, home):
    (home / "loop").symlink_to("loop")
    (home / "one").symlink_to("other")
    (home / "other").symlink_to("one")
    (home / "nowhere").symlink_to("nothing")
    shutil.copytree("here", "inside")
    for name in ("loop", Path("one"), "loop/x", "nowhere"):
        assert str(name) in line_of(lambda name=name: ENTRIES[entry](name))
    for file in ("README.md", "config.json", "model.safetensors"):
        shutil.copytree("here", "broken", dirs_exist_ok=True)
        (home / "broken" / file).unlink()
        (home / "broken" / file).symlink_to(file)
        if file != "README.md" or entry == "publish":
            assert f"broken has no {file}" in line_of(lambda: ENTRIES[entry]("broken"))
        (home / "broken" / file).unlink()


PLACES = [("here", 0o000), ("here", 0o444), (".", 0o000), ("here/config.json", 0), ("here/model.safetensors", 0)]
CASES = [(entry, *each) for entry in ENTRIES for each in PLACES]
CASES += [("publish", "here/README.md", 0), ("publish", "here/probe.safetensors", 0)]
CASES += [("evaluate", "here/probe.safetensors", 0)]


@pytest.mark.parametrize(("entry", "place", "mode"), CASES)
def test_what_may_not_be_read(entry, place, mode, home):
    name = "here" if place != "." else home / "here"
    (home / place).chmod(mode)
    try:
        with unprivileged():
            line = line_of(lambda: ENTRIES[entry](name))
        assert "Permission denied" in line and "here" in line, line
    finally:
        (home / place).chmod(0o755)


@pytest.mark.parametrize("arguments", [["publish", "here", "a/b", "--dry-run"], ["evaluate", "here"], ["info", "here"]])
def test_commands_say_it_in_one_line(arguments, home):
    tasks()
    (home / "here").chmod(0)
    try:
        with unprivileged(), pytest.raises(SystemExit) as error:
            main(arguments)
    finally:
        (home / "here").chmod(0o755)
    text = str(error.value.code)
    assert text.startswith("zoo: error: ") and "\n" not in text and "Permission denied" in text and "here" in text
