"""The `zoo` command with files to resume from that are broken, losses that are NaN, and a disk that is full."""

import contextlib
import errno
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from training import QUIET, SHORT, TINY, fit, refused, said, state
from zoo.tasks import run as running
from zoo.tasks import states
from zoo.tasks.arguments import check_path
from zoo.tasks.classify.train import Classify
from zoo.tasks.runs import NOTE
from zoo.weights import load_checkpoint

pytestmark = pytest.mark.usefixtures("elsewhere")


class Hostile:
    """What runs when a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch in an old format"])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_code_in_a_file_is_never_run(verb: str, how: str, tmp_path: Path):
    path, owned = tmp_path / "hostile.ckpt", tmp_path / "owned"
    content = {"state_dict": Hostile(owned), "loops": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0"}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization="old" not in how)
    assert "code in a file is never run" in refused("classify", verb, *TINY[2:], f"--ckpt_path={path}")
    assert not owned.exists()
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert owned.exists()  # so it was hostile


@pytest.mark.parametrize("size", [0, 100, 2000, -1])
def test_a_truncated_file_to_resume_from(size: int, run: Path, tmp_path: Path):
    path = tmp_path / "broken.ckpt"
    path.write_bytes((run / "resume" / "last.ckpt").read_bytes()[:size])
    assert f"{path} is truncated or not the state of a training run" in refused(*TINY, f"--ckpt_path={path}")


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("loops",), "text"),
        (("loops", "fit_loop", "epoch_progress"), {}),
        (("state_dict", "model.head.weight"), None),
        (("callbacks", "Keep", "best"), -1),
        (("lr_schedulers",), 1),
        (("optimizer_states",), []),
        (("optimizer_states", 0, "state", 4), 1e30),
        (("optimizer_states", 0, "state", 4, "exp_avg"), torch.zeros(3)),  # PyTorch would read outside of it
        (("optimizer_states", 0, "state", 4, "step"), None),
        (("optimizer_states", 0, "state", 99), {}),
        (("optimizer_states", 0, "param_groups", 0), []),
        (("loops", "fit_loop", "epoch_progress", "total", "started"), None),
        (("loops", "fit_loop", "epoch_loop.batch_progress", "current", "completed"), "x"),
        (("loops", "fit_loop", "epoch_loop.batch_progress", "current", "reset"), 1),
        (("loops", "fit_loop", "epoch_loop.state_dict", "_batches_that_stepped"), -1),
        (("lr_schedulers", 0, "last_epoch"), "x"),
        (("callbacks", "Keep", "best"), ("x", "", 0, 0)),
        (("epoch_loss",), {"sum": 1.0, "number": 3}),
    ],
    ids=str,
)
def test_a_state_of_another_form_is_one_line(place: tuple[Any, ...], value: Any, run: Path, tmp_path: Path):
    content = part = state(run / "resume/last.ckpt")
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    torch.save(content, tmp_path / "odd.ckpt")
    flags = [f"--ckpt_path={tmp_path}/odd.ckpt", f"--trainer.default_root_dir={tmp_path}/new", "--trainer.max_epochs=9"]
    assert "odd.ckpt is not a state that this run can be resumed from" in refused(*TINY, *flags)


def test_other_files_to_resume_from(run: Path, tmp_path: Path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "plain.ckpt")
    assert "FOLDER/resume/last.ckpt is one" in refused(*TINY, f"--ckpt_path={tmp_path}/plain.ckpt")
    assert f"--ckpt_path: nothing to resume in {tmp_path}; it has" in refused(*TINY, f"--ckpt_path={tmp_path}")
    assert f"to use its weights: --model.weights={run}/best" in refused(*TINY, f"--ckpt_path={run}/best")
    for path in (run / "best/resume/last.ckpt", run / "best/model.safetensors", run / "best/config.json"):
        with pytest.raises(ValueError, match=f"to use its weights: --model.weights={run}/best; to resume its run: "):
            check_path(path)
    with pytest.raises(ValueError, match=f"config.yaml is not the state of a run; .*: --ckpt_path={run}$"):
        check_path(run / "config.yaml")
    check_path(run / "resume/last.ckpt")
    other = [*TINY, "--model.backbone.dim=32", f"--ckpt_path={run}/resume/last.ckpt"]
    message = refused(*other, f"--trainer.default_root_dir={tmp_path}/new")
    assert message.startswith("--ckpt_path belongs to another model: 'model.blocks.0.")  # no config tells what changed
    again = [f"--ckpt_path={run}", "--trainer.max_epochs=9"]
    again += [f"--trainer.{flag}" for flag in QUIET]
    for flags, changed in (
        (["backbone.dim=32", "rate=0.5"], "model.backbone.dim 32 (was 16)"),
        (["backbone.dim=32", "backbone.depth=3"], "model.backbone.dim 32 (was 16), model.backbone.depth 3 (was 2)"),
        (["average=0.5"], "model.average 0.5 (was 0.0)"),
    ):
        message = refused("classify", "fit", *again, *(f"--model.{flag}" for flag in flags))
        assert message == f"--ckpt_path belongs to another model: {changed}"
    assert "is a file; a checkpoint is a folder" in refused(*TINY, f"--model.weights={run}/resume/last.ckpt")
    assert "is a NeMo file; load it as 'nemo:" in refused(*TINY, f"--model.weights={run}/ear.NEMO")


class Full(io.FileIO):
    """A file on a disk that has little room left."""

    def write(self, data: Any) -> int:
        super().write(memoryview(data)[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """later(hook, action) calls action(task) in front of a hook of the task in epoch 1."""

    def patch(hook: str, action: Any) -> None:
        plain = getattr(Classify, hook)

        def wrapped(task: Classify, *arguments: Any) -> Any:
            if task.current_epoch == 1:
                action(task)
            return plain(task, *arguments)

        monkeypatch.setattr(Classify, hook, wrapped)

    return patch


def stopped(root: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        fit(root, *SHORT, *flags)
    return said(stop.value)


def test_a_full_disk_leaves_the_last_state_whole(later: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    kept: list[bytes] = []
    file = tmp_path / "resume" / "last.ckpt"

    def fill(task: Classify) -> None:
        task.trainer.strategy.checkpoint_io.wait()  # pyright: ignore[reportAttributeAccessIssue]
        kept.append(file.read_bytes())
        monkeypatch.setattr(states, "open", lambda path, mode: Full(path, mode), raising=False)

    later("on_train_epoch_start", fill)
    message = stopped(tmp_path)
    assert ".ckpt: No space left on device; the previous one is untouched" in message
    assert [file.read_bytes()] == kept
    assert sorted((tmp_path / "resume").iterdir()) == [file, tmp_path / NOTE]
    assert state(file)["global_step"] == 3
    monkeypatch.undo()
    fit(tmp_path, *SHORT, f"--ckpt_path={file}")
    assert state(file)["global_step"] == 6


def test_a_full_disk_at_the_first_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(states, "open", lambda path, mode: Full(path, mode), raising=False)
    assert "No space left on device; nothing was left behind" in stopped(tmp_path)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == [".begun", "last.json"]
    monkeypatch.undo()
    fit(tmp_path, *SHORT)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["last.ckpt", "last.json"]


# NaN and infinity


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(later: Any, tmp_path: Path):
    later("on_train_epoch_start", lambda task: task.model.head.bias.data.fill_(float("nan")))
    message = stopped(tmp_path)
    assert message == (
        "the loss was NaN or infinite at step 3 (epoch 1); "
        "lower model.rate, raise model.warmup, or clip with trainer.gradient_clip_val"
    )
    for name in ("best", "last"):
        assert load_checkpoint(tmp_path / name, check=True).config["source"].endswith("epoch 1, step 3")
    found = state(tmp_path / "resume" / "last.ckpt")
    assert found["global_step"] == 3
    assert all(value.isfinite().all() for value in found["state_dict"].values())


@pytest.mark.parametrize("flag", ["--model.average=0", "--model.average=0.9"])
def test_weights_that_the_last_step_spoils_are_not_kept(flag: str, later: Any, tmp_path: Path):
    """No loss of training sees them."""
    later("on_validation_start", lambda task: task.model.stem.conv.weight.data[0].fill_(float("inf")))
    assert "the weights are NaN or infinite after step 5; lower model.rate" in stopped(tmp_path, flag)
    assert load_checkpoint(tmp_path / "last", check=True).config["source"].endswith("epoch 1, step 3")
    assert state(tmp_path / "resume" / "last.ckpt")["global_step"] == 3


def test_a_state_is_not_kept_where_nothing_is_validated(later: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(running, "OVERHEAD", 0.0)
    later("on_train_epoch_end", lambda task: task.model.stem.conv.weight.data[0].fill_(float("nan")))
    flags = ["--trainer.check_val_every_n_epoch=5", "--trainer.max_epochs=3"]
    assert "the weights are NaN or infinite after step 5" in stopped(tmp_path, *flags)
    assert state(tmp_path / "resume" / "last.ckpt")["global_step"] == 3
    assert load_checkpoint(tmp_path / "last", check=True).config["source"].endswith("epoch 1, step 3")


def test_an_absurd_rate_stops(tmp_path: Path):
    message = stopped(tmp_path, "--model.rate=1e30", "--model.warmup=0")
    assert "NaN or infinite" in message and "lower model.rate" in message


def test_a_state_by_its_step_is_whole_or_absent_where_a_disk_has_no_links(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def part(_: Any, path: Path) -> None:
        path.write_bytes(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    folder, written = tmp_path / "resume", states.States(keep=2)
    monkeypatch.setattr(os, "link", none)
    written.save_checkpoint({"global_step": 1}, folder / "last.ckpt")
    written.wait()
    monkeypatch.setattr(states.shutil, "copyfile", part)
    written.save_checkpoint({"global_step": 2}, folder / "last.ckpt")
    with pytest.raises(OSError, match="No space left on device; the previous one is untouched"):
        written.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-000000001.ckpt"]
    assert state(folder / "last.ckpt") == state(folder / "step-000000001.ckpt") == {"global_step": 1}


def test_what_a_killed_process_left_is_not_written_into(tmp_path: Path):
    early, aside = tmp_path / "step-000000001.ckpt", tmp_path / ".last.ckpt.new"
    early.write_text("early")
    os.link(early, aside)  # killed while it made this state the last one
    written = states.States()
    written.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    written.wait()
    assert early.read_text() == "early" and state(tmp_path / "last.ckpt") == {"global_step": 2}
    assert not aside.exists()
