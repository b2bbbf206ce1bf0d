"""Training a classifier on two ranks, one of which cannot read any image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import BACKBONE, QUIET, state

PATCHED = """
import sys

from zoo.__main__ import main
from zoo.tasks.classify.train import Classify

step = Classify.training_step


def without_images(self, batch, batch_idx):
    if self.global_rank == 1:
        batch = batch._replace(images=batch.images[:0], labels=batch.labels[:0], skipped=("a.jpg",))
    return step(self, batch, batch_idx)


def after_backward(self):
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in self.model.parameters())
    print(f"rank {self.global_rank} step {self.global_step}", flush=True)


Classify.training_step, Classify.on_after_backward = without_images, after_backward
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_training_continues_where_a_rank_reads_no_image(tmp_path: Path):
    """Batch norms exchange their statistics, so that no rank may be left waiting."""
    (tmp_path / "patched.py").write_text(PATCHED)
    fields = BACKBONE | {"norm": "batchnorm"}
    line = [sys.executable, tmp_path / "patched.py", "classify", "fit", *(f"--trainer.{flag}" for flag in QUIET)]
    line += [f"--model.backbone.{name}={value}" for name, value in fields.items()]
    line += ["--data.dataset=synthetic", "--data.size=16", "--data.batch=16", "--trainer.logger=false"]
    line += ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_steps=3", "--model.warmup=1"]
    line += [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        list(map(str, line)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert all(f"rank {rank} step {number}" in done.stdout for rank in (0, 1) for number in (0, 1, 2)), done.stdout
    weights = state(tmp_path / "run/resume/last.ckpt")["state_dict"]
    assert all(bool(each.isfinite().all()) for each in weights.values())
