"""Training a detector on two ranks, some of which never see an object or an image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detecting import flags_of
from training import state

PATCHED = """
import os
import sys

from zoo.__main__ import main
from zoo.tasks.detect.train import Detect

step, validate = Detect.training_step, Detect.validation_step


def changed(self, batch):
    if str(self.global_rank) in os.environ["UNREADABLE"]:
        nothing = (each[:0] for each in (batch.images, batch.ids, batch.sizes))
        rest = dict(zip(("images", "ids", "sizes"), nothing), mask=None, skipped=("a.jpg",) * len(batch.images))
        return batch._replace(truth=type(batch.truth)(*(each[:0] for each in batch.truth)), **rest)
    if str(self.global_rank) in os.environ["EMPTY"]:
        batch = batch._replace(truth=type(batch.truth)(*(each[:, :0] for each in batch.truth)))
    if str(self.global_rank) in os.environ["WHOLE"]:
        batch = batch._replace(mask=None)
    return batch


def after_backward(self):
    missing = [name for name, each in self.model.named_parameters() if each.requires_grad and each.grad is None]
    assert not missing, missing
    assert all(bool(each.grad.isfinite().all()) for each in self.model.parameters() if each.grad is not None)
    print(f"rank {self.global_rank} step {self.global_step}", flush=True)


Detect.training_step = lambda self, batch, batch_idx: step(self, changed(self, batch), batch_idx)
Detect.validation_step = lambda self, batch, batch_idx: validate(self, changed(self, batch), batch_idx)
Detect.on_after_backward = after_backward
main(sys.argv[1:])
"""


TIMM = {"trunk": "timm:resnet18"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("empty", "whole", "unreadable", "fields"),
    [
        ("1", "", "", {}),
        ("01", "", "", {}),
        ("1", "1", "", TIMM),
        ("", "", "1", TIMM),
        ("", "", "1", {"name": "dfine_n"}),
    ],
)
def test_training_continues_where_ranks_differ(
    empty: str, whole: str, unreadable: str, fields: dict[str, str], tmp_path: Path
):
    """Three steps and an evaluation with ranks that have no objects, no padding or no image that can be read; every
    parameter has a finite gradient on both, and the run ends by itself. Norms exchange their statistics and losses
    their numbers of objects, so that none may be left waiting."""
    (tmp_path / "patched.py").write_text(PATCHED)
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.limit_train_batches=3"]
    line = [sys.executable, tmp_path / "patched.py", "detect", "fit", *flags_of(tmp_path / "run"), *two]
    line += [f"--model.backbone.{name}={value}" for name, value in fields.items()]
    line += ["--data.fit=pad"] if fields is TIMM else []
    done = subprocess.run(
        list(map(str, line)),
        env={**os.environ, "EMPTY": empty, "WHOLE": whole, "UNREADABLE": unreadable, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert all(f"rank {rank} step {number}" in done.stdout for rank in (0, 1) for number in (0, 1, 2)), done.stdout
    weights = state(tmp_path / "run/resume/last.ckpt")["state_dict"]
    assert all(bool(each.isfinite().all()) for each in weights.values() if isinstance(each, torch.Tensor))
