"""Trainings on shards: scores, runs that are killed, memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import detecting
from box_cases import write_coco
from sharding import image_folder, images, librispeech, packed
from training import QUIET, fit
from zoo.__main__ import main
from zoo.data import sampling

FLAGS = ["--trainer.max_epochs=3", "--data.batch=8", "--trainer.limit_val_batches=1", "--data.workers=2"]
FLAGS += ["--model.average=0.9"]
KILLED = """
import os, signal, sys
import zoo.tasks.run
from training import fit
from zoo.data import sampling
from zoo.tasks.classify.train import Classify

zoo.tasks.run.OVERHEAD = 0.0
sampling.WINDOW = 2
plain, seen = Classify.training_step, [0]

def struck(self, batch, batch_idx):
    seen[0] += 1
    if seen[0] == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return plain(self, batch, batch_idx)

Classify.training_step = struck
fit(sys.argv[3], *sys.argv[4:], data="shards")
"""


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in ("last", "best")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_in_an_epoch_ends_the_same(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "WINDOW", 2)
    out = packed(image_folder(tmp_path / "loose"), tmp_path / "out")
    flags = [*FLAGS, f"--data.root={out}"]
    fit(tmp_path / "whole", *flags, data="shards")
    killed = tmp_path / "killed"
    paths = os.pathsep.join(sys.path)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, "8", str(int(number)), killed, *flags],  # the third of the second epoch
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},  # sums in the order of this process
        capture_output=True,
        text=True,
    )
    assert child.returncode == (-number if number == signal.SIGKILL else 128 + number), child.stderr
    assert (killed / "resume/last.ckpt").exists()
    fit(killed, *flags, f"--ckpt_path={killed}/resume/last.ckpt", data="shards")
    for found, wanted in zip(weights(killed), weights(tmp_path / "whole"), strict=True):
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.daily(2)
def test_a_run_goes_on_without_a_shard_that_was_lost_in_an_epoch(tmp_path: Path):
    out = packed(image_folder(tmp_path / "loose"), tmp_path / "out")
    flags = [*FLAGS, f"--data.root={out}"]
    fit(tmp_path / "run", *flags, "--trainer.max_steps=3", data="shards")
    flags += [f"--ckpt_path={tmp_path}/run/resume/last.ckpt", "--trainer.max_steps=-1"]
    sorted(out.glob("train*.tar"))[0].unlink()
    with pytest.raises(SystemExit) as stop, pytest.warns(UserWarning, match="omitted"):
        fit(tmp_path / "run", *flags, data="shards")
    assert "--data.changed=ok" in str(stop.value)
    with pytest.warns(UserWarning, match="omitted"):
        fit(tmp_path / "run", *flags, "--data.changed=ok", data="shards")
    assert torch.load(tmp_path / "run/resume/last.ckpt", weights_only=True)["global_step"] == 15


def scores(task: str, weights: Path, *places: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What validation says on each of the places."""
    found = []
    for place in places:
        capsys.readouterr()
        main([task, "validate", *(f"--trainer.{flag}" for flag in QUIET), f"--model.weights={weights}", *place])
        found.append(capsys.readouterr().out)
    return found


@pytest.mark.daily(2)
def test_objects_have_the_same_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "loose"
    folder.mkdir()
    write_coco(folder)
    write_coco(folder, split="val")
    out = packed(folder, tmp_path / "out", "20KB")
    roots = [["--data.dataset=auto", f"--data.root={root}"] for root in (folder, out)]
    detecting.fit(tmp_path / "run", *roots[1], "--data.batch=1", "--trainer.limit_train_batches=3")
    said = scores("detect", tmp_path / "run/last", *roots, capsys=capsys)
    assert said[0] == said[1] and "AP" in said[0]


@pytest.mark.daily(2)
@pytest.mark.filterwarnings("ignore:.*(empty|omitted from a loss).*:UserWarning")
def test_utterances_have_the_same_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = librispeech(tmp_path / "loose")
    out = packed(folder, tmp_path / "out", "1MB")
    splits = ["--data.train=train-clean-100", "--data.val=dev-clean"]
    places = [
        [f"--data.dataset={kind}", f"--data.root={root}", *splits]
        for kind, root in (("librispeech", folder), ("shards", out))
    ]
    tiny = {"name": "squeezeformer_xs", "dim": 16, "depth": 2, "heads": 2, "conv": "swish(kernel=5)"}
    flags = [f"--model.backbone.{field}={value}" for field, value in tiny.items()]
    flags += ["--data.tokenizer=characters", "--model.warmup=1", "--trainer.max_epochs=1", "--trainer.logger=false"]
    flags += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--data.shortest=0"]
    main(["transcribe", "fit", *(f"--trainer.{flag}" for flag in QUIET), *flags, *places[1]])
    said = scores("transcribe", tmp_path / "run/last", *places, capsys=capsys)
    assert said[0] == said[1] and "error" in said[0]


def test_evaluate_reads_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = image_folder(tmp_path / "loose")
    out = packed(folder, tmp_path / "out")
    fit(tmp_path / "run", *FLAGS, "--trainer.max_epochs=1", f"--data.root={out}", data="shards")
    found = []
    for root in (folder, out):
        capsys.readouterr()
        main(["evaluate", str(tmp_path / "run/last"), "--root", str(root)])
        measured = json.loads(capsys.readouterr().out)
        found.append([(each["metric"], each["value"], each["n"]) for each in measured[0]["figures"]])
    assert found[0] == found[1] and found[0][0][2] == 12


def private(process: int) -> int:
    """Bytes of memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_the_memory_of_workers_does_not_grow(tmp_path: Path):
    out = packed(image_folder(tmp_path / "loose", train=750, val=1), tmp_path / "out", "200KB")
    loader: Any = images(out, batch=16, workers=2).train_dataloader()
    used = []
    for epoch in range(8):
        loader.batch_sampler.sampler.set_epoch(epoch)
        assert sum(len(batch.images) for batch in loader) == 3000
        used.append([private(worker.pid) for worker in loader._iterator._workers])
    for worker in zip(*used, strict=True):  # an epoch reads 3 MiB a worker; pages shared with the parent become private
        assert worker[7] - worker[3] < 2 * 2**20, used
