"""A detector learns: the checkpoint of blood cells becomes one of generated shapes."""

import re
from pathlib import Path

import pytest

from detecting import command

START = Path(__file__).resolve().parents[3] / "checkpoints/rtdetr_micro.blood_cells"


@pytest.mark.slow
def test_a_checkpoint_learns_shapes(tmp_path, capsys):
    """384 steps, two to three minutes of CPU time on one thread: AP50 above 0.8 on held-out images."""
    flags = {
        "model.weights": START,
        "model.backbone.queries": 30,
        "model.fresh": "[queries]",
        "model.denoising": 30,
        "model.rate": 1.5e-3,
        "model.trunk_rate": 1.0,
        "model.warmup": 1,
        "model.flat": 0.3,
        "model.average": 0.97,
        "data.dataset": "shapes",
        "data.size": 96,
        "data.batch": 16,
        "data.flip": 0.5,
        "data.workers": 0,
        "trainer.max_epochs": 24,
        "trainer.gradient_clip_val": 1.0,
        "trainer.check_val_every_n_epoch": 24,
        "trainer.logger": "false",
        "trainer.default_root_dir": tmp_path,
    }
    command("fit", "--seed_everything=0", *(f"--{name}={value}" for name, value in flags.items()))
    found = re.search(r"best      AP [\d.]+, AP50 ([\d.]+) \(n = 96 objects", capsys.readouterr().err)
    assert found is not None and float(found[1]) > 0.8
