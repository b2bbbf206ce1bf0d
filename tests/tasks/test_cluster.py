"""Several processes that somebody else starts: torchrun, and SLURM by a stand-in for its command."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from killing import STATE
from training import BACKBONE, PLAIN_FLAGS, difference, state

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

RUN = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_epochs=2", "--data.dataset=synthetic"]
RUN += [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()]
RUN += ["--data.size=16", "--data.batch=16", "--trainer.limit_val_batches=2", *PLAIN_FLAGS]
# Starts the tasks of a job as SLURM does: each process knows its rank from the environment.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && strict=1 && shift
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    node=$((rank / SLURM_NTASKS_PER_NODE)) local=$((rank % SLURM_NTASKS_PER_NODE))
    SLURM_PROCID=$rank SLURM_NODEID=$node SLURM_LOCALID=$local "$@" &
    echo $! >> JOBS
done
for _ in $(jobs -p); do
    wait -n || { status=${status:-$?}; [ -n "$strict" ] && kill -9 $(jobs -p) 2> /dev/null; }
done
exit ${status:-0}
"""
JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "zoo", "SLURM_NTASKS": "2", "SLURM_NODELIST": "127.0.0.1"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run by torchrun with two processes on one node."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    (done,) = torchrun(folder, "--standalone", "--nproc-per-node=2", "--trainer.devices=2")
    assert done.count("has no state to resume from") == done.count("epoch 2/2") == 1
    return weights(folder)


def torchrun(folder: Path, *options: str, nodes: int = 1) -> list[str]:
    """What the launchers of the nodes print; options of torchrun come first, then those of the run."""
    own = [option for option in options if not option.startswith("--trainer.")]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *own,
        "-m",
        "zoo",
        "classify",
        "fit",
        *RUN,
        *options[len(own) :],
    ]
    line += ["--trainer.strategy=ddp", "--ckpt_path=last", f"--trainer.default_root_dir={folder}"]
    started = [subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(nodes)]
    said = [each.communicate(timeout=300)[1] for each in started]
    assert [each.returncode for each in started] == [0] * nodes, said[0][-3000:]
    return said


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def job(folder: Path, nodes: int) -> tuple[list[str], dict[str, str], Path]:
    """The command and the environment of a job with two tasks, and the file that names their processes."""
    programs, jobs = folder / "bin", folder / "jobs"
    programs.mkdir()
    command(programs, "srun", SRUN.replace("JOBS", str(jobs)))
    command(programs, "scontrol", f'#!/bin/sh\necho "$@" >> {folder}/calls\n')
    command(programs, "zoo", f'#!/bin/sh\nexec {sys.executable} -m zoo "$@"\n')
    line = ["bash", str(ROOT / "configs/cluster/slurm.sbatch"), "classify", *RUN]
    line += [f"--trainer.default_root_dir={folder}/run", "--save.every_n_train_steps=1"]
    sizes = {"SLURM_NTASKS_PER_NODE": str(2 // nodes), "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NNODES": str(nodes)}
    return line, environment(**JOB, **sizes, PATH=f"{programs}:{os.environ['PATH']}"), jobs


@pytest.mark.parametrize("nodes", [1, 2], ids=["one-node", "two-nodes"])
def test_a_job_of_slurm_stops_is_queued_again_and_resumes(nodes: int, whole: dict[str, torch.Tensor], tmp_path: Path):
    line, given, jobs = job(tmp_path, nodes)
    run = tmp_path / "run"
    first = subprocess.Popen(line, env=given, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (run / STATE).exists() and time.monotonic() < end:
        time.sleep(0.01)
    for process in jobs.read_text().split():
        os.kill(int(process), signal.SIGUSR1)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGUSR1 and "Traceback" not in said, said[-3000:]
    assert said.count("zoo: stopped by SIGUSR1") == said.count("SLURM job 71 is queued again") == 1
    assert (tmp_path / "calls").read_text() == "requeue 71\n"
    steps = state(run / STATE)["global_step"]
    assert 0 < steps < 32
    again = subprocess.run(line, env=given, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and f"step {steps}" in again.stderr, again.stderr[-3000:]
    assert difference(weights(run), whole) is None


def test_two_nodes_of_torchrun(whole: dict[str, torch.Tensor], tmp_path: Path):
    """Two launchers with a process each, which meet at an address, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    said = torchrun(tmp_path / "run", *meeting, "--trainer.num_nodes=2", "--trainer.devices=1", nodes=2)
    assert "".join(said).count("epoch 2/2") == 1
    assert difference(weights(tmp_path / "run"), whole) is None


def test_a_rank_of_slurm_that_ends_alone_ends_the_job(tmp_path: Path):
    """The first rank alone asks for the folder, which another run holds; the other one waits for it."""
    line, given, _ = job(tmp_path, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.owner").write_text(str(os.getpid()))
    with FileLock(tmp_path / "run/.lock"):
        done = subprocess.run(line, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.count("another run is training in") == 1, done.stderr[-3000:]
