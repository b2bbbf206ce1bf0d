"""The states that a run is resumed from: when they are written, how, and how they are read."""

import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zoo.tasks.runs import STATE
from zoo.text import reason


class Saving:
    """When a run writes a state to resume from, besides the ends of epochs, and how many it keeps.

    Args:
        every_n_train_steps: steps of the optimizer between two states; 0 for none.
        every_n_minutes: minutes between two states; 0 for none.
        keep: how many states stay in the folder resume: last.ckpt is the last, and if keep is above 1, step-N.ckpt are
            the last ones by their steps.
    """

    def __init__(self, every_n_train_steps: int = 0, every_n_minutes: float = 10.0, keep: int = 1):
        for name, value, least in (
            ("every_n_train_steps", every_n_train_steps, 0),
            ("every_n_minutes", every_n_minutes, 0),
            ("keep", keep, 1),
        ):
            if not value >= least:
                raise ValueError(f"save.{name} must be >= {least}, got {value}")
        self.steps, self.seconds, self.keep = every_n_train_steps, 60.0 * every_n_minutes, keep


class States(CheckpointIO):
    """Writes states aside in a thread and renames them; reads them as tensors and numbers, never as code.

    Training waits for the copy of a state to host memory, and for the write before it if that is not done.

    Args:
        keep: how many states are kept, see `Saving`.
    """

    def __init__(self, keep: int = 1) -> None:
        self.keep = keep
        self._writer: futures.ThreadPoolExecutor | None = None
        self._pending: futures.Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Starts to write a state; `storage_options`, if given, is called without arguments when it is on the disk.

        Raises:
            OSError: the state before it could not be written.
        """
        self.wait()
        copy = tree_map_only(Tensor, _on_host, checkpoint)
        self._writer = self._writer or futures.ThreadPoolExecutor(1, "states")
        self._pending = self._writer.submit(self._write, copy, Path(path), storage_options)

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the last state is written, at the latest after `seconds`. OSError if it could not be."""
        if self._pending is not None and futures.wait([self._pending], seconds).done:
            pending, self._pending = self._pending, None
            pending.result()

    def teardown(self) -> None:
        self.wait()

    def _write(self, checkpoint: dict[str, Any], target: Path, then: Any) -> None:
        aside = target.with_name(f".{target.name}.new")
        fate = "the previous one is untouched" if target.exists() else "nothing was left behind"
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)  # of a process that was killed: it may be a link to another state
            with open(aside, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if self.keep > 1:
                _keep_by_step(aside, target.parent, int(checkpoint["global_step"]), self.keep)
            os.replace(aside, target)
        except OSError as error:
            raise OSError(f"cannot write {target}: {reason(error)}; {fate}") from error
        finally:
            aside.unlink(missing_ok=True)
        if then is not None:
            then()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise OSError(f"cannot read {path}: {reason(error)}") from error
        try:
            with file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # PyTorch does not compare the checksums of the tensors.
                damaged = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None
                file.seek(0)
                state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than tensors and numbers; code in a file is never run") from error
        except Exception as error:  # a broken file may raise anything
            raise ValueError(f"{path} is truncated or not the state of a training run") from error
        if damaged:
            raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
        if not isinstance(state, dict) or not {"state_dict", "loops"} <= state.keys():
            raise ValueError(f"{path} is not the state of a training run; FOLDER/{STATE} is one")
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _keep_by_step(state: Path, folder: Path, step: int, keep: int) -> None:
    """Gives a state its name by its step, too, and removes those that are too many."""
    _give_name(state, folder / f"step-{step:09}.ckpt")
    for each in _by_step(folder)[:-keep]:
        each.unlink(missing_ok=True)


def _give_name(state: Path, name: Path) -> None:
    """Gives a state a further name; what had that name before is replaced at once or not at all."""
    aside = name.with_name(f".{name.name}.new")
    aside.unlink(missing_ok=True)
    try:
        try:
            os.link(state, aside)
        except OSError:  # a file system without links
            shutil.copyfile(state, aside)
        os.replace(aside, name)
    finally:
        aside.unlink(missing_ok=True)


def _by_step(folder: Path) -> list[Path]:
    """The states of a folder by their steps, without files of similar names."""
    return sorted(path for path in folder.glob("step-*.ckpt") if re.fullmatch(r"step-[0-9]{9}", path.stem))


def drop_later(folder: Path, step: int) -> None:
    """Removes states of later steps, which a run leaves that is resumed from an earlier one."""
    for each in _by_step(folder):
        if each.stem > f"step-{step:09}":
            each.unlink(missing_ok=True)


def make_last(state: Path, last: Path) -> None:
    """Makes the state that a run is resumed from the last one, so that the run resumes from it if it is killed again.

    Raises:
        OSError: it cannot be written; the last one is untouched.
    """
    if last.exists() and last.samefile(state):
        return
    try:
        _give_name(state, last)
    except OSError as error:
        raise OSError(f"cannot write {last}: {reason(error)}; the previous one is untouched") from error
