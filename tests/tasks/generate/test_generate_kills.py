"""Commands of generation that are killed at any moment, or whose disk is full: files are whole, and a re-run writes
the same ones."""

import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encoding import autoencoder, images
from generating import generator
from killing import (
    ALL,
    Whole,
    at_operation,
    check_moments,
    check_operations,
    full,
    in_child,
    kill,
    moments,
    operations,
    some,
    whole_of,
)
from zoo.__main__ import main
from zoo.data.generation import WholeImages

pytestmark = pytest.mark.slow

FIT = ["--model.backbone.name=dit_micro", "--model.backbone.depth=1", "--model.backbone.dim=32", "--model.average=0.9"]
FIT += ["--model.backbone.heads=2", "--data.dataset=digits", "--data.size=8", "--data.channels=1", "--data.batch=32"]
FIT += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=2"]
FIT += ["--trainer.limit_val_batches=1", "--trainer.max_epochs=2", "--trainer.logger=false", "--model.show=1"]
FIT += ["--model.steps=2", "--data.workers=0"]


def fit(folder: Path, *flags: str) -> None:
    main(["generate", "fit", *FIT, f"--trainer.default_root_dir={folder}", *flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_of(fit, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("strike", [kill, full])
def test_training_at_any_file_operation(strike: Callable[[], None], whole: Whole, tmp_path: Path):
    check_operations(fit, strike, whole, tmp_path, 20)


def test_training_at_any_moment(tmp_path: Path):
    check_moments(fit, tmp_path)


class Writing:
    """A command that writes to a folder, in which an earlier run of another size left its files."""

    def __init__(self, home: Path, earlier: list[str], later: list[str]) -> None:
        self.home, self.later, self.said = home, later, home / "said"
        self.before, self.number = home / "before", 0
        if earlier:
            assert in_child(lambda: self(self.before, earlier)) == 0
        else:
            self.before.mkdir()
        self.old = contents(self.before)
        start, first = time.monotonic(), self.fresh()
        assert in_child(lambda: self(first)) == 0
        self.new, self.length = contents(first), time.monotonic() - start
        assert self.new and not any(self.old.get(name) == each for name, each in self.new.items())

    def __call__(self, folder: Path, arguments: list[str] | None = None, size: int | None = None) -> None:
        """Runs the command, with files of at most `size` bytes, and keeps the line with which it ends."""
        torch.manual_seed(0)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
            main(["generate", *(arguments or self.later), "--device=cpu", f"--output={folder}"])
        except SystemExit as stop:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            self.said.write_text(str(stop.code))
            raise

    def fresh(self) -> Path:
        """A new folder with the files of the earlier run."""
        self.number += 1
        return shutil.copytree(self.before, self.home / f"{self.number}")

    def check(self, folder: Path, where: object) -> None:
        """Each file is that of the earlier or of the later run; after another run all are those of the later one."""
        for name, found in contents(folder).items():
            assert found in (self.old.get(name), self.new.get(name)), (name, where)
        assert in_child(lambda: self(folder)) == 0, where
        assert contents(folder) == self.new and not hidden(folder), where

    def check_error(self, where: object) -> None:
        """The command ended with one line."""
        said = self.said.read_text()
        assert said.startswith("zoo: error: cannot write") and "\n" not in said, (said, where)
        self.said.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Images are read without worker processes, whose shared memory would be limited too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeImages, "processes", lambda self, files: 0)
        yield


@pytest.fixture(scope="module", params=["sample", "predict", "encode"])
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writing:
    home, name = tmp_path_factory.mktemp("writing"), request.param
    root = images(home / "images", {"train": 2, "val": 1}, 8)
    if name == "encode":
        vae = autoencoder(home / "vae")
        return Writing(home, [], [name, f"--root={root}", f"--decoder={vae}", "--size=16", "--shard=2"])
    given = [name, generator(home / "model"), "--steps=2"]
    if name == "sample":
        return Writing(home, [*given, "--classes=3,5", "--each=3"], [*given, "--classes=8", "--each=2"])
    paths = [str(root / "train"), "--times=0.5"]
    return Writing(home, [*given, *paths, str(root / "val")], [*given, *paths, "--seed=1"])


@pytest.mark.parametrize("strike", [kill, full])
def test_any_file_operation_may_be_the_last(strike: Callable[[], None], command: Writing, tmp_path: Path):
    writes = strike is full
    number = operations(command, command.fresh(), tmp_path / "counted", writes)
    assert number > 10
    failed = 0
    for each in some(number, 4):
        folder = command.fresh()

        def struck(folder: Path = folder, each: int = each) -> None:
            at_operation(folder, each, strike, writes=writes)
            command(folder)

        ended = in_child(struck)
        if ended == 0 and writes:  # it does without, as where a folder exists
            assert contents(folder) == command.new, each
        else:
            assert ended == (1 if writes else -signal.SIGKILL), each
        failed += ended != 0
        if writes:
            assert not hidden(folder), each
            if ended:
                command.check_error(each)
        command.check(folder, each)
    assert failed >= 3


def test_any_moment_may_be_the_last(command: Writing):
    for moment in moments(command.length, 100 if ALL else 6):
        folder = command.fresh()
        in_child(lambda folder=folder: command(folder), moment)
        command.check(folder, moment)


@pytest.mark.parametrize("size", [0, 60, 300])
def test_files_that_cannot_grow(size: int, command: Writing):
    """The system itself refuses to write on: the earlier files stay as they are, and nothing lies beside them."""
    folder = command.fresh()

    assert in_child(lambda: command(folder, size=size)) == 1
    command.check_error(size)
    assert contents(folder) == command.old and not hidden(folder)
    command.check(folder, size)
