"""Two processes, by DDP and by FSDP2, against one process with twice the batch; their kills, and what they leave."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from killing import STATE
from sharding import write_image
from training import BACKBONE, PLAIN_FLAGS, difference, refused, state
from zoo.weights import load_checkpoint

pytestmark = pytest.mark.slow

PATCHED = """
import os, signal, sys, time
import torch
from zoo.__main__ import main
from zoo.tasks.classify.train import Classify
from zoo.tasks.task import Task

torch.set_num_threads(1)
plain = Task.on_train_batch_end
kill = os.environ.get("KILL", "").split()

def note(self, outputs, batch, batch_idx):
    plain(self, outputs, batch, batch_idx)
    loss = outputs["loss"].detach()
    loss = self.all_gather(loss).mean() if self.trainer.world_size > 1 else loss
    if self.global_rank == 0:
        print("loss", float(loss), flush=True)
    if os.environ.get("FULL") and self.global_step == 3:
        if self.global_rank:
            time.sleep(600)
        raise OSError("No space left on device")
    if kill and self.global_step == int(kill[1]):
        if self.global_rank == 0:
            self.trainer.strategy.checkpoint_io.wait()
        self.trainer.strategy.barrier()
        if self.global_rank == int(kill[0]):
            os.kill(os.getpid(), signal.SIGKILL)

Task.on_train_batch_end = note

def make_alike():
    # What is drawn for an image depends on it alone; one process joins the speech batches that two would have.
    import zlib
    from unittest.mock import patch
    from zoo.data import buckets
    from zoo.tasks.generate.train import Generate

    draw, rand, randn = Generate.loss_of, torch.rand, torch.randn

    def drawn(self, batch):
        seeds = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
        def each(make, *shape):
            return torch.stack([make(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        with patch("torch.rand", lambda number, device: each(rand)):
            with patch("torch.randn_like", lambda x: each(randn, *x.shape[1:])):
                return draw(self, batch)

    Generate.loss_of = drawn
    batches, number = buckets.DurationBatches.__iter__, buckets.DurationBatches.__len__

    def of_two(self, rank, ask):
        with patch.object(buckets.sampling, "rank_and_world", lambda: (rank, 2)):
            return ask(self)

    if "LOCAL_RANK" not in os.environ and "--trainer.devices=1" in sys.argv:
        both = lambda self: zip(*(of_two(self, rank, lambda own: list(batches(own))) for rank in (0, 1)))
        buckets.DurationBatches.__iter__ = lambda self: (one + other for one, other in both(self))
        buckets.DurationBatches.__len__ = lambda self: of_two(self, 0, number)

arguments, seen = Classify.inputs_of, []

def unreadable(self, batch):
    # The first batch of those on which statistics are recomputed is empty on some ranks.
    (images,) = arguments(self, batch)
    seen.append(len(images))
    return (images[:0] if len(seen) == 1 and str(self.global_rank) in os.environ.get("EMPTY", "") else images,)

Classify.inputs_of = unreadable
if os.environ.get("ALIKE"):
    make_alike()
if os.environ.get("LOCAL_RANK") == "1":
    sys.argv = [word.replace("/data", os.environ.get("OTHER", "/data")) for word in sys.argv]
main(sys.argv[1:])
"""

COMMON = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_epochs=2", "--data.workers=0"]
COMMON += ["--trainer.limit_train_batches=10", "--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"]
COMMON += ["--model.average=0.9", "--model.warmup=0.2", "--trainer.gradient_clip_val=5.0"]
SMALL = ["--model.backbone.dim=16", "--model.backbone.depth=2", "--model.backbone.heads=2"]
SPEECH = ["--data.dataset=synthetic", "--data.tokenizer=characters", "--data.batch=8", "--model.backbone.dropout=0"]
TRUNK = "flash_internimage_t(dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), heads=(1, 1, 2, 2))"
TASKS = {
    "classify": [
        *(f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()),
        *["--model.backbone.norm=prepbn", "--model.refresh=2", "--model.mixup=0", "--model.cutmix=0"],
        *["--data.dataset=synthetic", "--data.size=16", "--data.batch=16", "--model.rate=1e-2", *PLAIN_FLAGS],
    ],
    "generate": [
        *["--model.backbone.name=dit_micro", *SMALL, "--data.dataset=digits", "--data.size=8", "--data.channels=1"],
        *["--data.batch=16", "--model.rate=1e-2", "--model.show=1", "--model.steps=2"],
    ],
    "transcribe": ["--model.backbone.name=squeezeformer_xs", *SMALL, *SPEECH, "--model.backbone.norm=prepbn"],
    "transducer": [
        *["--model.backbone.name=conformer_s", "--model.backbone.head=transducer(hidden=16)", *SMALL, *SPEECH],
    ],
    "detect": [
        *["--model.backbone.name=rtdetr_micro", f"--model.backbone.trunk={TRUNK}", *SMALL, "--data.batch=4"],
        *["--model.backbone.queries=12", "--data.dataset=shapes", "--data.size=64"],
    ],
}
TASKS["experts"] = [*TASKS["classify"], "--model.backbone.mixer=moa", "--model.backbone.ffn=moe", "--model.balance=1"]
# Without what is drawn for a batch as a whole, and with twice the batch.
DRAWN = {
    "generate": ([], ["--data.batch=32"]),
    "transcribe": (["--model.time_masks=0", "--model.frequency_masks=0"], []),
    "transducer": (["--model.time_masks=0", "--model.frequency_masks=0"], []),
    "detect": (["--model.backbone.denoising=false"], ["--data.batch=8"]),
}
BEHIND_A_BIAS = r"(branch\.norm|(first|second|narrow|wide|laterals\.\d)\.norm)\.running_mean"
OTHERS = {"transducer": "transcribe", "experts": "classify"}


def train(case: str, folder: Path, *flags: str, ranks: int = 1, **more: str) -> tuple[int, str]:
    """Trains with some processes; the exit status, and what they print until all end."""
    script = folder.with_name("patched.py")
    script.write_text(PATCHED)
    task = OTHERS.get(case, case)
    line = [sys.executable, script, task, "fit", *TASKS[case], *COMMON, f"--trainer.devices={ranks}", *flags]
    line.append(f"--trainer.default_root_dir={folder}")
    environment = {**os.environ, **{name.upper(): value for name, value in more.items()}, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return done.returncode, done.stdout


def losses(printed: str) -> torch.Tensor:
    return torch.tensor([float(line.split()[1]) for line in printed.splitlines() if line.startswith("loss ")])


def finished(case: str, folder: Path, *flags: str, ranks: int = 1, **more: str) -> torch.Tensor:
    status, printed = train(case, folder, *flags, ranks=ranks, **more)
    assert status == 0, printed[-3000:]
    found = losses(printed)
    assert len(found) == 20
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


@pytest.mark.parametrize("case", TASKS)
def test_ddp_and_fsdp2_agree(case: str, tmp_path: Path):
    ddp = finished(case, tmp_path / "ddp", "--trainer.strategy=ddp", ranks=2)
    fsdp2 = finished(case, tmp_path / "fsdp2", "--trainer.strategy=fsdp2", ranks=2)
    assert ((ddp - fsdp2).abs() / ddp.abs().clamp(min=1)).max() < 1e-5
    assert ddp.std() > 1e-3
    one, other = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp2")
    assert one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
    load_checkpoint(tmp_path / "fsdp2/last", check=True)  # in one process, with its probe
    if case == "classify":  # the same images meet in a batch, and nothing is random on a rank
        whole = finished(case, tmp_path / "one", "--data.batch=32")
        assert (ddp - whole).abs().max() < 1e-5
        single = weights(tmp_path / "one")
        statistics = [name for name in single if "running" in name]
        assert statistics and all(torch.allclose(single[name], one[name], atol=1e-5) for name in statistics)


@pytest.mark.parametrize("case", DRAWN)
def test_two_processes_are_one_with_twice_the_batch(case: str, tmp_path: Path):
    plain, twice = DRAWN[case]
    one = finished(case, tmp_path / "one", *plain, *twice, alike="1")
    single = weights(tmp_path / "one")
    # Adam moves a bias in front of a norm, whose gradient is rounding, and so the mean that the norm has seen.
    statistics = [name for name in single if "running" in name and not re.search(BEHIND_A_BIAS, name)]
    assert case == "generate" or statistics
    for strategy in ("ddp", "fsdp2"):
        two = finished(case, tmp_path / strategy, f"--trainer.strategy={strategy}", *plain, ranks=2, alike="1")
        assert ((two - one).abs() / one.abs().clamp(min=1)).max() < 1e-5
        shared = weights(tmp_path / strategy)
        assert not [name for name in statistics if not torch.allclose(single[name], shared[name], 1e-5, 1e-5)]


@pytest.mark.parametrize(
    ("case", "strategy", "option"),
    [
        ("classify", "fsdp2", "--model.compile=true"),
        ("experts", "ddp", "--model.compile=true"),
        ("generate", "fsdp2", "--model.compile=true"),
        ("detect", "fsdp2", "--model.compile=true"),
        ("classify", "fsdp2", "--model.checkpointing=true"),
        ("transcribe", "ddp", "--model.checkpointing=true"),
        ("generate", "fsdp2", "--model.checkpointing=true"),
        ("experts", "fsdp2", "--model.checkpointing=true"),
    ],
)
def test_compiled_blocks_and_recomputed_activations(case: str, strategy: str, option: str, tmp_path: Path):
    flags = [f"--trainer.strategy={strategy}"]
    plain = finished(case, tmp_path / "plain", *flags, ranks=2)
    other = finished(case, tmp_path / "other", *flags, option, ranks=2)
    assert ((plain - other).abs() / plain.abs().clamp(min=1)).max() < 1e-4
    load_checkpoint(tmp_path / "other/last", check=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sums_of_gradients(strategy: str, tmp_path: Path):
    """Two batches a step are one of twice their size."""
    flags = [f"--trainer.strategy={strategy}", "--model.backbone.norm=layernorm", "--model.refresh=0"]
    finished("classify", tmp_path / "whole", *flags, ranks=2)
    halves = ["--data.batch=8", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=20"]
    status, printed = train("classify", tmp_path / "halves", *flags, *halves, ranks=2)
    assert status == 0 and len(losses(printed)) == 40, printed[-3000:]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_near(strategy: str, precision: str, tmp_path: Path):
    flags = [f"--trainer.strategy={strategy}", "--model.rate=1e-3"]
    exact = finished("classify", tmp_path / "exact", *flags, ranks=2)
    near = finished("classify", tmp_path / "near", *flags, f"--trainer.precision={precision}", ranks=2)
    assert 0 < (exact - near).abs().max() < 0.05
    load_checkpoint(tmp_path / "near/last", check=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(strategy: str, rank: int, tmp_path: Path):
    flags = [f"--trainer.strategy={strategy}", "--save.every_n_train_steps=3"]
    finished("classify", tmp_path / "whole", *flags, ranks=2)
    start = time.monotonic()
    status, printed = train("classify", tmp_path / "run", *flags, ranks=2, kill=f"{rank} 8")
    assert status and time.monotonic() - start < 60, printed[-2000:]
    assert "Traceback" not in printed and printed.count("lost the connection") == 1, printed[-3000:]
    kept = state(tmp_path / "run" / STATE)
    assert kept["global_step"] == 6
    status, printed = train("classify", tmp_path / "run", *flags, f"--ckpt_path={tmp_path}/run", ranks=2)
    assert status == 0 and len(losses(printed)) == 14, printed[-2000:]
    assert difference(weights(tmp_path / "run"), weights(tmp_path / "whole")) is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_error_of_the_first_rank_ends_those_that_wait_for_it(
    strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("FULL", "yes")
    start = time.monotonic()
    status, printed = train("classify", tmp_path / "run", f"--trainer.strategy={strategy}", ranks=2)
    assert status == 1 and printed.count("No space left on device") == 1 and "Traceback" not in printed, printed[-3000:]
    assert time.monotonic() - start < 200


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_number_of_ranks(strategy: str, tmp_path: Path):
    """It is refused within an epoch, and works from the end of one, with the form of the parameters unchanged."""
    flags = [f"--trainer.strategy={strategy}", "--save.every_n_train_steps=4"]
    train("classify", tmp_path / "run", *flags, ranks=2, kill="1 6")
    base = ["classify", "fit", *TASKS["classify"], *COMMON, f"--trainer.default_root_dir={tmp_path}/run"]
    base += ["--trainer.devices=1", "--trainer.strategy=auto"]
    said = refused(*base, f"--ckpt_path={tmp_path}/run/{STATE}")
    assert "written in the middle of an epoch of 2 ranks, and now there are 1; resume with as many" in said
    said = refused(*base, "--data.batch=8", f"--ckpt_path={tmp_path}/run/{STATE}")
    assert "written in the middle of an epoch of 2 ranks" in said
    status, printed = train("classify", tmp_path / "two", *flags, "--trainer.max_epochs=1", ranks=2)
    assert status == 0, printed[-2000:]
    more = [f"--ckpt_path={tmp_path}/two", "--trainer.max_epochs=2", "--trainer.strategy=auto", "--data.batch=32"]
    status, printed = train("classify", tmp_path / "two", *more)
    assert status == 0 and len(losses(printed)) == 10, printed[-2000:]
    assert state(tmp_path / "two" / STATE)["global_step"] == 20


def test_sigterm_stops_both_ranks(tmp_path: Path):
    script = tmp_path / "patched.py"
    script.write_text(PATCHED.replace("signal.SIGKILL", "signal.SIGTERM"))
    line = [sys.executable, script, "classify", "fit", *TASKS["classify"], *COMMON, "--trainer.devices=2"]
    line += ["--trainer.strategy=fsdp2", f"--trainer.default_root_dir={tmp_path}/run"]
    environment = {**os.environ, "KILL": "1 3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("zoo: stopped by SIGTERM") == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_statistics_are_recomputed_on_batches_that_no_rank_lacks(strategy: str, tmp_path: Path):
    """An epoch has two batches on each rank; a rank that has fewer must not leave the other waiting."""
    flags = [f"--trainer.strategy={strategy}", "--data.batch=128", "--model.refresh=3", "--trainer.max_epochs=1"]
    for empty, number in (("none", 2), ("1", 1), ("0 1", 1)):
        status, printed = train("classify", tmp_path / empty, *flags, ranks=2, empty=empty)
        assert status == 0, printed[-3000:]
        assert f"batch statistics recomputed on {number} batches" in printed
    one, both = weights(tmp_path / "1"), weights(tmp_path / "0 1")
    assert one.keys() == both.keys() and all(torch.equal(one[name], both[name]) for name in one)


def write_images(folder: Path, number: int) -> None:
    for part, name in ((part, name) for part in ("train", "val") for name in ("ant", "bee")):
        for index in range(number if part == "train" else 1):
            write_image(folder / part / name / f"{index}.png", 10 * index + len(name))


OF_FOLDERS = ["--data.dataset=imagefolder", "--model.backbone.classes=2", "--model.refresh=0", "--trainer.strategy=ddp"]


def test_fewer_images_than_ranks_are_said(tmp_path: Path):
    write_images(tmp_path / "data", 1)
    flags = [*OF_FOLDERS, f"--data.root={tmp_path}/data", "--trainer.max_epochs=1"]
    status, printed = train("classify", tmp_path / "run", *flags, ranks=3)
    assert status == 0, printed[-3000:]
    assert printed.count("warning: 2 training samples for 3 ranks, so some ranks have none") == 1
    assert len(losses(printed)) == 1


def test_a_rank_without_images_does_not_keep_an_aligned_training_waiting(tmp_path: Path):
    write_images(tmp_path / "data", 1)
    flags = ["--data.dataset=imagefolder", f"--data.root={tmp_path}/data", "--data.channels=3", "--model.show=0"]
    flags += ["--model.backbone.classes=2", "--model.teacher=vit_micro", "--trainer.strategy=ddp"]
    flags += ["--model.teacher_weights=null"]
    status, printed = train("generate", tmp_path / "run", *flags, "--trainer.max_epochs=1", ranks=3)
    assert status == 0 and len(losses(printed)) == 1, printed[-3000:]


def test_ranks_with_different_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTHER", "/other")
    write_images(tmp_path / "data", 20)
    write_images(tmp_path / "other", 19)
    status, printed = train("classify", tmp_path / "run", *OF_FOLDERS, f"--data.root={tmp_path}/data", ranks=2)
    assert status == 1 and not list(losses(printed)), printed[-3000:]
    assert "Traceback" not in printed
    assert "zoo: error: the data of 'train' differ between ranks (38 and 40 samples); give every machine" in printed
