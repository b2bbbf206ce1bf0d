"""Stopping a run from outside: SIGINT and SIGTERM end it after the current batch, with a state to resume from."""

import shlex
import signal
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from zoo.tasks.run import Keep
from zoo.tasks.task import Task

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EVERY = 8  # batches after which ranks ask each other whether one should stop


class Stopped(Exception):
    """A run was stopped by the signal `number`; it can be resumed."""

    def __init__(self, number: int, said: str):
        super().__init__(said)
        self.number = number


class Stop(Checkpoint):
    """Ends a run that receives SIGINT or SIGTERM after the current batch, once its state is written.

    A second signal ends the process at once. The state has the number of finished batches of the epoch, so that a
    resumed run equals one that was never stopped. A run stopped during validation repeats the validation, except that
    the validation after the last step is not stopped.
    """

    def __init__(self, keep: Keep):
        self.keep, self.received, self.before = keep, 0, dict[int, Any]()
        self.place = ""  # where in an epoch a state is being written: between its batches, or in its validation

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.restore()

    def asked(self, trainer: lightning.Trainer, batch_idx: int) -> int:
        """The signal that any rank has received, or 0."""
        if trainer.world_size == 1:
            return self.received
        if batch_idx % EVERY:
            return 0
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(torch.as_tensor(trainer.strategy.reduce(received, reduce_op="max")))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first batch of an epoch still runs: what came before it belongs to the epoch before.
        if batch_idx and batch_idx % trainer.accumulate_grad_batches == 0:
            self.stop(trainer, pl_module, self.asked(trainer, batch_idx), "batches")

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # The validation after the last step ends, and the run with it: no state can be resumed in front of it.
        # Between two steps it runs on too: a state does not hold the gradients that wait for more.
        loop = trainer.fit_loop.epoch_loop
        if pl_module.fitting and pl_module.progress < 1.0 and not loop._should_accumulate():
            self.stop(trainer, pl_module, self.asked(trainer, batch_idx), "validation")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.should_stop:  # or else training is over
            self.stop(trainer, pl_module, self.asked(trainer, 0), "")

    def stop(self, trainer: lightning.Trainer, pl_module: Any, number: int, place: str) -> None:
        """Writes the state and raises `Stopped` if a signal was received."""
        if not number:
            return
        assert isinstance(pl_module, Task)
        self.place = place
        self.keep.write(trainer, pl_module, last=False)
        place = (
            f"stopped by {signal.Signals(number).name} in epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        )
        resume = f"zoo {pl_module.command} fit --ckpt_path={shlex.quote(str(self.keep.run.state))}"
        raise Stopped(number, f"{place}; resume with: {resume}")

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning's counters stand between two batches, or before a validation that has not begun.
        loops = checkpoint["loops"]["fit_loop"]
        epochs, whole = loops["epoch_progress"], loops["epoch_loop.batch_progress"]["is_last_batch"]
        if not whole and epochs["current"]["processed"] == epochs["current"]["started"]:
            # trainer.max_steps or max_time ends training in the middle of an epoch, whose rest is still to come.
            epochs["total"]["processed"] -= 1
            epochs["current"]["processed"] -= 1
        if self.place:
            for counts in (loops["epoch_loop.batch_progress"][kind] for kind in ("total", "current")):
                counts |= dict.fromkeys(("ready", "started", "processed"), counts["completed"])
        if self.place == "batches":
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        if self.place == "validation":
            progress = loops["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["is_last_batch"] = False
