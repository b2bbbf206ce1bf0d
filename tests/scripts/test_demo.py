"""The demo from end to end, shortened to one epoch."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.data.images import Images

ROOT = Path(__file__).parents[2]


def test_an_incomplete_environment_is_finished_by_the_next_call(tmp_path):
    """With a stand-in for Python whose pip fails at first."""
    for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "bin/python3.11"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p .venv/bin && cp pip .venv/bin/python\n')
    python.chmod(0o755)
    pip, said = tmp_path / "pip", []
    for status in (1, 0):
        pip.write_text(f"#!/bin/sh\nexit {status}\n")
        pip.chmod(0o755)
        command = ["bash", "-c", "set -e; source scripts/environment.sh; echo ready"]
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "" if status else "ready\n"), done.stderr
        said.append(done.stderr.splitlines())
    building = "Building the environment in .venv: about 6 GB and some minutes, the first time only."
    assert said == [
        [building, "The environment in .venv is incomplete; run the same command again to finish it."],
        [building],
    ]


@pytest.mark.slow
def test_the_demo_leaves_its_table_images_and_checkpoints(tmp_path):
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
    assert not re.search(r"^next|\bzoo classify", done.stderr, re.MULTILINE), "commands that the demo does not need"
    names = [Path(entry["path"]).stem for entry in json.loads((tmp_path / "predictions.json").read_text())]
    labels = [f"digit_{index:02}_is_{label}" for index, label in enumerate(batches[0].labels[:24].tolist())]
    assert names == labels
    for name in ("accuracy.png", "predictions.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300
    assert (tmp_path / "dcnv4/last/model.safetensors").exists()


@pytest.mark.slow
def test_a_stopped_demo_says_how_it_continues(tmp_path):
    command = [sys.executable, ROOT / "scripts/demo.py", "--epochs=2", f"--output={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("epoch 1/2"):
                process.send_signal(signal.SIGINT)
        assert process.wait(200) == 130
    assert said[-1] == "scripts/demo was stopped; run the same command again to continue\n"
    assert said[-2].startswith("zoo: stopped by SIGINT in epoch") and not any("resume with" in line for line in said)
