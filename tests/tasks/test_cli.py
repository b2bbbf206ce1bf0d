"""The `zoo` command with input that is wrong, files that are broken, and a disk that is full."""

import contextlib
import errno
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import zoo
from training import BACKBONE, PLAIN_FLAGS, QUIET, command, difference, fit, images, refused, said, state
from zoo.__main__ import main
from zoo.data.images import Images
from zoo.tasks import run as running
from zoo.tasks.arguments import check_path
from zoo.tasks.classify.train import Classify
from zoo.weights import load_checkpoint, save_model

SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", *PLAIN_FLAGS]
TINY = ["classify", "fit", "--trainer.accelerator=cpu", "--trainer.logger=false", "--data.dataset=synthetic"]
TINY += [
    "--data.size=16",
    "--trainer.max_epochs=1",
    *(f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run leaves in the current folder by mistake is gone with the test."""
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints/vit", "seen/best"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"family": "vit"}')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on synthetic images."""
    root = tmp_path_factory.mktemp("run")
    fit(root, *SHORT, "--trainer.max_epochs=1")
    return root


# The command itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TINY, "--model.rat=3"], "--model.rat=3"),
        ([*TINY, "--trainer.max_epoch=3"], "--trainer.max_epoch=3"),
        ([*TINY, "--weights_only=false"], "--weights_only=false"),
        ([*TINY, "stray"], "stray"),
        ([*TINY, "--model.rate=fast"], "model.rate"),
        ([*TINY, "--model.backbone=3"], "model.backbone"),
        ([*TINY, "--config=nowhere.yaml"], "--config: file not found: nowhere.yaml"),
        ([*TINY, "--data.mean", "0.5"], "--data.mean must be a list of numbers or null, got 0.5 (zoo classify fit"),
        ([*TINY, "--data.batch"], "--data.batch: expected one argument"),
        (["transcribe", "fit", "--model.weights=vit"], "`zoo transcribe` cannot use vit; use `zoo classify fit`"),
        (["transcribe", "test", "--ckpt_path=seen"], "`zoo transcribe` cannot use seen; use `zoo classify test`"),
        (
            ["transcribe", "test", "--model.weights=seen/best"],
            "`zoo transcribe` cannot use seen/best; use `zoo classify",
        ),
        (["classify", "fit", "--ckpt_path=last"], "--ckpt_path: nothing to resume in .; it has no resume/last.ckpt"),
        ([*TINY, "--ckpt_path=last"], "--ckpt_path: nothing to resume in runs/classify_vit_micro; it has no"),
        ([*TINY, "--model.backbone.name=vit_tinny"], "unknown model 'vit_tinny'; did you mean vit_tiny"),
        ([*TINY, "--model.backbone.depht=3"], "unknown field of vit_micro 'depht'; did you mean depth?"),
        ([*TINY, "--model.backbone.mixer=atention"], "mixer: unknown name 'atention'; "),
        ([*TINY, "--model.backbone.norm=prepbn(blend=1)"], "unknown option of prepbn 'blend'; "),
        ([*TINY, "--model.backbone.position=rope", "--model.backbone.mixer=pool"], "rope"),
        (
            [*TINY, "--model.backbone.classes=5"],
            "the model has 5 classes, but the data has 4; omit model.backbone.classes or set it to 4",
        ),
        ([*TINY, "--model.backbone.classes=0"], "model.backbone.classes must be >= 2"),
        ([*TINY, "--model.average=1.0"], "model.average"),
        (
            [*TINY, "--model.backbone.channels=3", "--data.channels=1"],
            "the model has 3 channels, but the data has 1; omit model.backbone.channels or set it to 1",
        ),
        ([*TINY, "--trainer.precision=64-true"], "trainer.precision must be 32-true, "),
        ([*TINY, "--trainer.limit_train_batches=0"], "trainer.limit_train_batches must be > 0 for training"),
        ([*TINY, "--trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler must be false"),
        ([*TINY, "--model.weights=nowhere"], "checkpoint 'nowhere' not found"),
        ([*TINY, "--data.dataset=mnist"], "unknown dataset 'mnist'; allowed: digits, imagefolder, synthetic"),
        ([*TINY, "--data.dataset=imagefolder"], "needs root"),
        ([*TINY, "--data.dataset=imagefolder", "--data.root=nowhere"], "nowhere/train is not a folder"),
        ([*TINY, "--data.batch=1"], "raise data.batch"),
        ([*TINY, "--data.randaugment=rand-q9"], "rand-q9"),
        ([*TINY, "--trainer.max_epochs=-1"], "the schedule needs a length"),
        ([*TINY, "--trainer.precision=7"], "precision"),
        ([*TINY, "--trainer.limit_val_batches=1.5"], "limit_val_batches"),
        ([*TINY, "--ckpt_path=nowhere.ckpt"], "--ckpt_path: file not found: nowhere.ckpt"),
        (
            ["classify", "fit"],
            "model.backbone needs a name, as in --model.backbone.name=NAME (`zoo list` shows them); or",
        ),
        (["classify", "fit"], "or give --model.weights=CHECKPOINT"),
        (["classify", "validate", *TINY[2:]], "--model.weights"),
        (["classify", "test", *TINY[2:]], "--model.weights"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(arguments: list[str], words: str):
    assert words in refused(*arguments)


@pytest.mark.slow
def test_a_fault_is_one_line_on_standard_error_and_status_1():
    line = [sys.executable, "-W", "ignore", "-m", "zoo", *TINY, "--model.backbone.mixer=none"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("zoo: error: --model.backbone.mixer: unknown mixer 'none'; ")


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--trainer.max_epochs=x", "--trainer.max_epochs must be an integer or null, got x"),
        ("--trainer.limit_val_batches=x", "--trainer.limit_val_batches must be an integer, a number or null, got x"),
        ("--trainer.precision=7", "16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 or null, got 7"),
        ("--data.scale=[1]", "--data.scale must be a list of 2 values, got [1]"),
        ("--data.mean=[a]", "--data.mean must be a list of numbers or null, got ['a']"),
        ("--data.scale=x", "--data.scale must be a list, got x"),
        ("--model.backbone=3", "--model.backbone must be a mapping, got 3"),
        ("--trainer.callbacks=Foo", "--trainer.callbacks must be a list of Callback, a Callback or null, got Foo"),
        ("--trainer.inference_mode=7", "--trainer.inference_mode must be true or false, got 7"),
    ],
)
def test_a_value_of_another_type(flag: str, wanted: str):
    assert f"{wanted} (zoo classify fit --help-all lists all options)" in refused(*TINY, flag)


# Files to resume from


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
    assert "convert it with zoo.convert.from_nemo" in refused(*TINY, f"--model.weights={run}/ear.NEMO")


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
        kept.append(file.read_bytes())
        monkeypatch.setattr(running, "open", lambda path, mode: Full(path, mode), raising=False)

    later("on_train_epoch_start", fill)
    message = stopped(tmp_path)
    assert ".ckpt: No space left on device; the previous one is untouched" in message
    assert [file.read_bytes()] == kept
    assert list((tmp_path / "resume").iterdir()) == [file]
    assert state(file)["global_step"] == 3
    monkeypatch.undo()
    fit(tmp_path, *SHORT, f"--ckpt_path={file}")
    assert state(file)["global_step"] == 6


def test_a_full_disk_at_the_first_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(running, "open", lambda path, mode: Full(path, mode), raising=False)
    assert "No space left on device; nothing was left behind" in stopped(tmp_path)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == [".begun"]
    monkeypatch.undo()
    fit(tmp_path, *SHORT)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["last.ckpt"]


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


# Images


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(value).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven and seven images in two classes, and three and three to validate; one of each part is broken."""
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "dog")):
        for index in range(7):
            paint(root / "train" / name / f"{index}.png", 100 * label + index)
        for index in range(3):
            paint(root / "val" / name / f"{index}.png", 100 * label + 50 + index)
    for path in (root / "train/cat/3.png", root / "val/dog/1.png"):
        path.write_bytes(path.read_bytes()[:200])
    return root


def folder_flags(root: Path) -> list[str]:
    flags = [
        f"--data.root={root}",
        "--data.batch=7",
        "--data.workers=0",
        "--model.backbone.classes=2",
        "--trainer.max_epochs=2",
    ]
    return [*flags, "--trainer.num_sanity_val_steps=0", *PLAIN_FLAGS]


@pytest.mark.parametrize("mixed", [True, False])
def test_unreadable_images_are_named_once_and_counted(mixed: bool, folder: Path, tmp_path: Path):
    """Batches of 7 with mixup, too, which takes pairs."""
    flags = folder_flags(folder) + ([] if mixed else ["--model.mixup=0", "--model.cutmix=0"])
    with pytest.warns(UserWarning) as seen:
        fit(tmp_path / "run", *flags, data="imagefolder")
    messages = [str(each.message) for each in seen]
    found = [message for message in messages if "skipped" in message]
    broken = [f"skipped {folder}/{part}: cannot be read as an image" for part in ("train/cat/3.png", "val/dog/1.png")]
    counts = [
        f"unreadable images skipped in the {stage} of epoch {epoch}: 1"
        for epoch in range(2)
        for stage in ("training", "validation")
    ]
    assert sorted(found) == sorted(broken + counts)
    assert load_checkpoint(tmp_path / "run" / "last", check=True).labels == ("cat", "dog")


def test_images_that_are_all_unreadable(folder: Path, tmp_path: Path):
    """In training such batches change nothing; without one image to validate there is nothing to say."""
    for path in folder.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", *folder_flags(folder), "--trainer.num_sanity_val_steps=2", data="imagefolder")
    assert said(stop.value) == "no image of the validation set could be read"


def test_folders_that_are_not_as_they_should_be(folder: Path, tmp_path: Path):
    flags = ["--data.dataset=imagefolder", f"--data.root={folder}", "--model.backbone.classes=2"]
    (folder / "val" / "ox").mkdir()
    assert "differ from those of" in refused(*TINY, *flags) and "ox" in refused(*TINY, *flags)
    (folder / "train" / "ox").mkdir()
    assert f"{folder}/train has class folders without images of their own" in refused(
        *TINY, *flags, "--model.backbone.classes=3"
    )


# Checkpoints


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    found: list[str] = []
    for module in ("tasks.classify.train", "tasks.task", "data.loading"):
        monkeypatch.setattr(f"zoo.{module}.rank_zero_info", found.append)
    yield found


def kept_with(run: Path, folder: Path, labels: list[str]) -> Path:
    kept = load_checkpoint(run / "last")
    return save_model(kept.model, folder, preset="vit_micro", preprocess=kept.preprocess, labels=labels)


def test_classes_that_differ_from_those_of_the_checkpoint(run: Path, lines: list[str], tmp_path: Path):
    names = images().classes
    folder = kept_with(run, tmp_path / "other", [names[0], "a fish", *names[2:]])
    flags = ["--data.dataset=synthetic", "--data.size=16", f"--model.weights={folder}", "--trainer.logger=false"]
    where = "it has 'a fish' where the data has '30 degrees'"
    message = refused("classify", "validate", *flags, "--trainer.accelerator=cpu")
    assert message == f"the classes of the checkpoint differ from those of the data: {where}"
    flags += [*SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}/run"]
    command("fit", *flags)
    assert f"head kept: the checkpoint has other classes ({where})" in lines
    assert load_checkpoint(tmp_path / "run" / "last").labels == tuple(names)


def test_a_new_head(run: Path, lines: list[str]):
    old = zoo.load_model(run / "last").state_dict()
    task = Classify({"classes": 9, "drop_path": 0.2}, weights=str(run / "last"))
    new = task.model.state_dict()
    assert lines == [f"started   from {run}/last, with a new head"]
    assert new["head.weight"].shape == (9, 16) and task.config.drop_path == 0.2 and task.preset == "vit_micro"
    body = {key for key in old if not key.startswith("head")}
    assert difference({key: old[key] for key in body}, {key: new[key] for key in body}) is None


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"name": "vit_tiny"}, "was made from vit_micro, not from model.backbone.name=vit_tiny"),
        ({"dim": 32}, "do not fit model.backbone: 'blocks.0."),
        ({"depth": 1}, "do not fit model.backbone: 'blocks.1."),
        ({"mixer": "sla"}, "do not fit model.backbone: 'blocks.0."),
        ({"depht": 1}, "unknown field of model.backbone 'depht'; did you mean depth?"),
        ({"classes": 1}, "model.backbone.classes must be >= 2"),
    ],
    ids=str,
)
def test_a_backbone_that_the_checkpoint_does_not_fit(backbone: dict[str, Any], words: str, run: Path):
    with pytest.raises(ValueError) as error:
        Classify(backbone, weights=str(run / "last"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_preprocessing_than_that_of_the_checkpoint(
    run: Path, lines: list[str], capsys: pytest.CaptureFixture[str]
):
    flags = ["--data.dataset=synthetic", f"--model.weights={run}/last"]
    capsys.readouterr()
    for more in ([], ["--data.size=16"], ["--data.size=24", "--data.crop=0.5"]):
        command("validate", *flags, *more)
    assert lines == ["measured with the preprocessing of the checkpoint: size 16 (not 24), crop 0.875 (not 0.5)"]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and len(set(shown)) == 1 and shown[0].startswith("accuracy 0.")


def test_a_fused_checkpoint_cannot_be_trained(run: Path, tmp_path: Path):
    kept = load_checkpoint(run / "last")
    folder = save_model(zoo.fuse(kept.model), tmp_path / "fused", preprocess=kept.preprocess, labels=kept.labels)
    flags = [flag for flag in TINY[2:] if "backbone" not in flag]
    message = refused("classify", "fit", *flags, f"--model.weights={folder}", f"--trainer.default_root_dir={tmp_path}")
    assert message == "a fused model is for inference only; train the unfused one"
    more = ["--model.backbone.classes=9", f"--model.weights={folder}"]
    assert "is fused, so its config cannot change" in refused("classify", "fit", *flags, *more)


def test_a_folder_that_holds_a_run_is_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]):
    before = (run / "best/model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main([*TINY, f"--trainer.default_root_dir={run}"])
    assert "already holds a run" in str(ended.value) and "--ckpt_path" in str(ended.value)
    assert (run / "best/model.safetensors").read_bytes() == before


def test_there_is_no_best_while_a_norm_blends(tmp_path: Path):
    fit(tmp_path, *SHORT, "--model.backbone.norm=prepbn(until=0.7)", "--trainer.max_epochs=4")
    zoo.fuse(zoo.load_model(tmp_path / "best"))
    kept = zoo.load_model(tmp_path / "best").state_dict()
    assert all(value.item() == 0 for key, value in kept.items() if key.endswith("blend"))


def test_measuring_needs_no_training_images(tmp_path: Path):
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "val" / name / "1.png")
    data = Images(dataset="imagefolder", root=str(tmp_path), size=16)
    assert data.classes == ["a", "b"] and len(data.source("val").labels) == 2
    with pytest.raises(ValueError, match="train is not a folder"):
        data.source("train")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.rate=0", "model.rate"),
        ("--model.smoothing=2", "smoothing"),
        ("--model.mixup=-1", "mixup"),
        ("--model.layer_decay=1.5", "layer_decay"),
        ("--model.warmup=-3", "warmup"),
        ("--model.refresh=3", "refresh"),
        ("--model.backbone.image=big", "image"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches must be above 0"),
        ("--trainer.val_check_interval=0", "val_check_interval must be above 0"),
        ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch must be above 0"),
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val must be at least 0"),
        ("--trainer.devices=-1", "devices"),
        ("--trainer.accelerator=tpu", "torch_xla"),
    ],
)
def test_values_out_of_range_are_one_line(flag: str, words: str, tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        main([*TINY, f"--trainer.default_root_dir={tmp_path}", flag])
    assert words in str(ended.value) and "\n" not in str(ended.value)


# The config of a run, taken from its folder


def test_a_run_resumes_with_its_own_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "a run"
    flags = ["--model.backbone.norm=prepbn", "--model.average=0.5", "--data.seed=3"]
    fit(run, *SHORT, *flags, "--trainer.max_epochs=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    command("fit", "--ckpt_path", run)
    shown = capsys.readouterr().err
    assert "changed " not in shown and "nothing left to train: raise --trainer.max_epochs" in shown
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    command("fit", "--ckpt_path", run, "--trainer.max_epochs=2", "--model.warmup=0.5")
    shown = capsys.readouterr().err
    assert "changed   trainer.max_epochs 2 (was 1), model.warmup 0.5 (was 1.0)\n" in shown
    assert "resumed   at epoch 2, step 3\n" in shown and "epoch 1/2" not in shown and "epoch 2/2" in shown
    assert state(run / "resume/last.ckpt")["global_step"] == 6
    kept = load_checkpoint(run / "last")
    assert kept.config["source"].endswith("epoch 2, step 6") and kept.config["model"]["norm"] == "prepbn"
    before, after = (yaml.safe_load(text) for text in (before[run / "config.yaml"], (run / "config.yaml").read_text()))
    assert after["model"]["warmup"] == 0.5 and after["trainer"]["max_epochs"] == 2 and after["data"] == before["data"]


def test_what_is_kept_is_measured_without_a_config(run: Path, capsys: pytest.CaptureFixture[str]):
    for flags in ([f"--model.weights={run}/last"], [f"--ckpt_path={run}"], [f"--ckpt_path={run}/resume/last.ckpt"]):
        capsys.readouterr()
        command("validate", *flags)
        shown = capsys.readouterr().out
        assert "n = 128" in shown and shown.count("\n") == 1  # all of it, whatever limit_val_batches the run had
