"""The demo from end to end, shortened to one epoch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.data.images import Images

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_leaves_its_table_pictures_and_checkpoints(tmp_path):
    command = [sys.executable, ROOT / "scripts/demo.py", "--epochs=1", f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == ["softmax", "sla_prepbn", "dcnv4"]
    batches = list(Images(size=32, crop=1.0).val_dataloader())
    for row in rows[2:]:
        model = zoo.load_model(tmp_path / row[0].strip("| ") / "last")
        with torch.no_grad():
            right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in batches)
        assert row[1:3] == [f"{right / 360:.3f}", "360"]
    folded = {row[0].strip("| "): int(row[7]) for row in rows[2:]}
    assert folded["sla_prepbn"] == 9 and folded["softmax"] == 0, "eight norms before branches and the final one"
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 24
    for name in ("accuracy.png", "predictions.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    assert (tmp_path / "dcnv4/last/model.safetensors").exists()
