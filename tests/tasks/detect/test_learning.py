"""A detector learns: the checkpoint of blood cells becomes one of generated shapes."""

import json
from pathlib import Path

import pytest

from detecting import command

START = Path(__file__).resolve().parents[3] / "checkpoints/rtdetr_micro.blood_cells"


@pytest.mark.slow
def test_a_checkpoint_learns_shapes(tmp_path):
    """288 steps, under two minutes of CPU time on one thread: AP50 0.8 and more on held-out images."""
    flags = {
        "model.weights": START,
        "model.backbone.queries": 30,
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
        "trainer.max_epochs": 18,
        "trainer.gradient_clip_val": 1.0,
        "trainer.check_val_every_n_epoch": 18,
        "trainer.logger": "false",
        "trainer.default_root_dir": tmp_path,
    }
    command("fit", "--seed_everything=0", *(f"--{name}={value}" for name, value in flags.items()))
    metrics = json.loads((tmp_path / "best/config.json").read_text())["metrics"]
    assert metrics["val/ap50"] > 0.8
