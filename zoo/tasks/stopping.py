"""Stopping a run from outside: a signal ends it after the current step, with a state to resume from."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from zoo.tasks.run import Keep, ranks_ask
from zoo.tasks.task import Task

WARNING = getattr(signal, "SIGUSR1", None)  # SLURM sends it where sbatch has --signal=USR1@SECONDS; not on Windows
SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, WARNING)))  # the later ones count more


class Stopped(BaseException):
    """A run was stopped by the signal `number`. It is no Exception, so that no code it interrupts swallows it."""

    def __init__(self, number: int, said: str):
        super().__init__(said)
        self.number = number


class Signals:
    """Receives SIGINT, SIGTERM and SIGUSR1 until it is closed.

    Before training the first one raises `Stopped` at once, on the other ranks, too: there is nothing to save yet. Then
    it is only noted. A second signal ends the process at once.

    Attributes:
        received: the signal that was received last, or 0; once the warning was received, the warning.
        training: whether training began.
        pass_on: sends a signal to the ranks that this process started.
    """

    def __init__(self) -> None:
        self.received, self.training, self.process = 0, False, os.getpid()
        self.pass_on: Callable[[int], object] | None = None
        self.before: dict[int, Any] = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker that has just been started
            return
        first = not self.received
        if self.received != WARNING:  # after which SLURM sends SIGTERM, and the job is to be queued again
            self.received = number
        if number != WARNING:
            signal.signal(number, signal.SIG_DFL)
        if self.training or not first:
            return
        if self.pass_on is not None:
            self.pass_on(number)
        again = queued_again(number) or "nothing was written, so the same command starts it again"
        raise Stopped(number, f"stopped by {signal.Signals(number).name}; {again}")

    def close(self) -> None:
        """Gives the signals back to those that had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stop(Checkpoint):
    """Ends a run that receives SIGINT, SIGTERM or SIGUSR1 after the current step, once its state is written; several
    ranks after at most ASK_EVERY more batches.

    After SIGUSR1 a job of SLURM is queued again; with `--ckpt_path=last` in its command it then resumes.

    The state has the number of finished batches of the epoch, so that a resumed run equals one that was never stopped.
    A run stopped during validation repeats the validation, except that the validation after the last step is not
    stopped.
    """

    def __init__(self, keep: Keep, signals: Signals):
        self.keep, self.signals = keep, signals
        self.postponed = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.signals.training = True

    def asked(self, trainer: lightning.Trainer, ask: bool = True) -> int:
        """The signal that any rank has received, the warning if one has that; 0 for none, and if ranks do not `ask`."""
        if trainer.world_size == 1:
            return self.signals.received
        if not ask:
            return 0
        order = (0, *SIGNALS)
        received = torch.tensor(order.index(self.signals.received), device=trainer.strategy.root_device)
        return order[int(torch.as_tensor(trainer.strategy.reduce(received, reduce_op="max")))]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first batch of an epoch still runs: what came before it belongs to the epoch before.
        together = trainer.accumulate_grad_batches
        if batch_idx and batch_idx % together == 0:
            self.stop(trainer, pl_module, self.asked(trainer, ranks_ask(batch_idx, together)), "batches")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.finish_step(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.finish_step(trainer)

    def finish_step(self, trainer: lightning.Trainer) -> None:
        """Lets max_time and early stopping end a run between two steps of the optimizer only: a state does not hold the
        gradients that wait for those of more batches."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        waiting = trainer.fit_loop.epoch_loop._should_accumulate()
        if waiting and trainer.should_stop:
            trainer.should_stop, self.postponed = False, True
        elif self.postponed and not waiting:
            trainer.should_stop = True

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # The validation after the last step ends, and the run with it: no state can be resumed in front of it.
        # Between two steps it runs on too: a state does not hold the gradients that wait for more.
        loop = trainer.fit_loop.epoch_loop
        if pl_module.fitting and pl_module.progress < 1.0 and not loop._should_accumulate():
            self.stop(trainer, pl_module, self.asked(trainer, ranks_ask(batch_idx)), "validation")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.should_stop:  # or else training is over
            self.stop(trainer, pl_module, self.asked(trainer), "")

    def stop(self, trainer: lightning.Trainer, pl_module: Any, number: int, place: str) -> None:
        """Writes the state and raises `Stopped` if a signal was received."""
        if not number:
            return
        assert isinstance(pl_module, Task)
        self.keep.write(trainer, pl_module, last=False, place=place)
        trainer.strategy.checkpoint_io.wait()  # pyright: ignore[reportAttributeAccessIssue]
        place = (
            f"stopped by {signal.Signals(number).name} in epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        )
        resume = f"resume with: zoo {pl_module.command} fit --ckpt_path={shlex.quote(str(self.keep.run.state))}"
        raise Stopped(number, f"{place}; {queued_again(number) or resume}")


def slurm_job() -> str | None:
    """The number of the SLURM job that this process is in; None outside of one and in an interactive one."""
    if not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def queued_again(number: int) -> str:
    """After the warning of SLURM, the first rank queues its job again and says so; empty if it cannot, and after other
    signals."""
    job = slurm_job()
    if number != WARNING or not job or getattr(rank_zero_only, "rank", 0) != 0:
        return ""
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"SLURM job {job} is queued again"
