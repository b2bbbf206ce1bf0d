"""The `zoo` command with input that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from training import TINY, refused
from zoo.__main__ import main

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.daily(3)
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
        (
            ["classify", "validate", "--ckpt_path=last"],
            "--ckpt_path: nothing to resume in .; it has no resume/last.ckpt",
        ),
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
        (
            [*TINY, "--data.dataset=mnist"],
            "unknown dataset 'mnist'; allowed: digits, fashion_mnist, imagefolder, shards, synthetic",
        ),
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


@pytest.mark.daily(2)
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
