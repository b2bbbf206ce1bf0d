"""Two ranks of which one or both receive a signal: they stop together, and the resumed run is the uninterrupted one."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training import BACKBONE, PLAIN_FLAGS, state, weights
from zoo.tasks.run import ASK_EVERY, ranks_ask
from zoo.tasks.stopping import Signals, Stop


def test_a_warning_is_kept():
    """SLURM sends SIGTERM after it where a job has not ended in time; ranks may receive one of them each."""
    for numbers in ((signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)):
        signals = Signals()
        signals.training = True
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
            assert signals.received == signal.SIGUSR1
        finally:
            signals.close()


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ((0, 0), 0),
        ((0, signal.SIGINT), signal.SIGINT),
        ((signal.SIGTERM, 0), signal.SIGTERM),
        ((signal.SIGTERM, signal.SIGUSR1), signal.SIGUSR1),
        ((signal.SIGUSR1, signal.SIGINT), signal.SIGUSR1),
    ],
)
def test_ranks_agree_on_the_warning(numbers: tuple[int, int], wanted: int):
    sent = list[torch.Tensor]()

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        sent.append(value)
        return torch.stack(sent).max()

    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy)
    ranks: list[Any] = [Stop(None, SimpleNamespace(received=number)) for number in numbers]  # pyright: ignore
    for rank in ranks:
        rank.asked(trainer)
    assert [rank.asked(trainer) for rank in ranks] == [wanted, wanted]
    assert [rank.asked(trainer, ask=False) for rank in ranks] == [0, 0] and len(sent) == 4


@pytest.mark.parametrize("together", [*range(1, 18), 64])
def test_ranks_ask_each_other_between_steps_and_often(together: int):
    places = [batch for batch in range(0, 2000, together) if ranks_ask(batch, together)]
    gaps = {later - earlier for earlier, later in itertools.pairwise(places)}
    assert places[0] == 0 and max(gaps) < ASK_EVERY + together and max(gaps) <= ASK_EVERY * together
    assert min(gaps) > ASK_EVERY - together, "no more often than needed"


PATCHED = """
import os, signal, sys
from zoo.__main__ import main
from zoo.tasks.classify.train import Classify

def at(name, step):
    plain = getattr(Classify, name)

    def struck(self, batch, batch_idx):
        begins = batch_idx % self.trainer.accumulate_grad_batches == 0
        if str(self.global_rank) in os.environ["STRUCK"] and self.global_step == step and begins:
            warned = "warned" in os.environ["STRUCK"] and self.global_rank == 1
            os.kill(os.getpid(), signal.SIGUSR1 if warned else signal.SIGTERM)
        if "faulty" in os.environ["STRUCK"] and name == "training_step" and self.global_rank == 1:
            self.note(["a fault"], self.faulty[0], "training")
        return plain(self, batch, batch_idx)

    setattr(Classify, name, struck)

if "early" in os.environ["STRUCK"]:
    at("validation_step", 0)
else:
    at("training_step", 1 if "soon" in os.environ["STRUCK"] else 9)
main(sys.argv[1:])
"""


def on_two_ranks(folder: Path, struck: str, *flags: str) -> tuple[int, str]:
    """Trains with two processes, of which some receive SIGTERM; the exit status, and what they print until all end.

    If `struck` has the word warned, the second receives SIGUSR1; with faulty, each of its batches has a faulty sample.
    """
    script = folder.with_name("patched.py")
    script.write_text(PATCHED)
    backbone = [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()]
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.logger=false"]
    short = ["--trainer.limit_val_batches=2", "--trainer.max_epochs=2", f"--trainer.default_root_dir={folder}"]
    data = ["--data.dataset=synthetic", "--data.size=16", "--data.batch=16", *PLAIN_FLAGS]
    line = [sys.executable, script, "classify", "fit", *backbone, *two, *short, *data, *flags]
    environment = {**os.environ, "STRUCK": struck, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert on_two_ranks(folder, "")[0] == 0
    return weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("struck", ["1", "01"])
def test_ranks_stop_together(struck: str, whole_of_two: dict[str, torch.Tensor], tmp_path: Path):
    """Whichever of them receives the signal; only the first reports it."""
    status, printed = on_two_ranks(tmp_path / "run", struck)
    assert status == 128 + signal.SIGTERM and "Traceback" not in printed
    assert printed.count("stopped by SIGTERM") == printed.count("zoo: ") == 1
    assert on_two_ranks(tmp_path / "run", "", f"--ckpt_path={tmp_path}/run/resume/last.ckpt")[0] == 0
    found = weights(tmp_path / "run")
    assert found.keys() == whole_of_two.keys()
    assert all(torch.equal(found[name], whole_of_two[name]) for name in whole_of_two)


@pytest.mark.slow
def test_ranks_stop_together_before_training(tmp_path: Path):
    """In the first validation, where the other rank waits for the first."""
    status, printed = on_two_ranks(tmp_path / "run", "early 0")
    assert status == 128 + signal.SIGTERM and "Traceback" not in printed
    assert printed.count("stopped by SIGTERM") == printed.count("zoo: ") == 1


@pytest.mark.slow
def test_ranks_that_sum_gradients_stop_together_and_soon(tmp_path: Path):
    """Between two steps of 7 batches, in an epoch of 16, though neither 7 nor 14 is a multiple of 8."""
    flags = ["--trainer.accumulate_grad_batches=7"]
    status, printed = on_two_ranks(tmp_path / "run", "1 soon", *flags)
    assert status == 128 + signal.SIGTERM and "stopped by SIGTERM in epoch 1, step 2" in printed, printed[-3000:]
    assert on_two_ranks(tmp_path / "run", "", *flags, f"--ckpt_path={tmp_path}/run/resume/last.ckpt")[0] == 0
    assert on_two_ranks(tmp_path / "whole", "", *flags)[0] == 0
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_ranks_stop_by_the_warning_and_count_the_faults_of_all(tmp_path: Path):
    """One receives SIGTERM, and the other, which alone has faulty samples, SIGUSR1."""
    status, printed = on_two_ranks(tmp_path / "run", "01 warned faulty soon")
    assert status == 128 + signal.SIGUSR1 and "stopped by SIGUSR1 in epoch" in printed, printed[-3000:]
    found = state(tmp_path / "run/resume/last.ckpt")
    assert found["global_step"] == 8 and found["faults"] == {"unreadable images": 8}
    status, printed = on_two_ranks(tmp_path / "run", "faulty", f"--ckpt_path={tmp_path}/run/resume/last.ckpt")
    assert status == 0, printed[-3000:]
    for epoch in range(2):
        assert printed.count(f"unreadable images skipped in the training of epoch {epoch}: 16") == 1
