"""Output of a run: a summary of model and data, a line per epoch, then the results and the next commands."""

import shlex
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from zoo.layer import copied, unfinished
from zoo.models.base import count_parameters
from zoo.tasks.run import Keep, by_steps
from zoo.tasks.runs import STATE
from zoo.tasks.task import Task
from zoo.text import counted


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34, 1:02:03 or 20 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 10:
        return f"{hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def readable_count(number: float) -> str:
    """A count with three digits, as 213 k or 4.62 M."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Multiply-adds of matrix products, convolutions and attention only, as is usual."""
    twin = copied(model).cpu().float().eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(*inputs)
    return counter.get_total_flops() / 2


def whole_epoch(trainer: lightning.Trainer) -> int:
    """The batches of an epoch of the whole set, without trainer.limit_train_batches."""
    return len(trainer.train_dataloader.batch_sampler)  # pyright: ignore[reportOptionalMemberAccess]


FEW = 10  # batches of an epoch
WIDTH = 80  # of the line of an epoch
SILENCE = 600.0  # seconds without a line in an epoch that has no bar


class Output(ProgressBar):
    """Prints a summary, a line for each epoch and, on a terminal, a bar for the epoch, all on standard error. Where
    there is no bar, as in the log of a job, a long epoch has a line every ten minutes.

    The time left is that of the whole run, judged by the steps since it was started or resumed. The pace is that of
    the training batches of an epoch, without validations, times the number of ranks.

    Args:
        keep: knows the best score.
        folder: the run's folder.
        task: the task's name on the command line.
        bar: whether a bar is drawn where standard error is a terminal.
    """

    def __init__(self, keep: Keep, folder: Any, task: str, bar: bool):
        super().__init__()
        self.keep, self.folder, self.task, self.bar = keep, folder, task, bar
        self.start = self.began = 0.0
        self.spoken = time.monotonic()  # when the last line was printed
        self.first = 0  # the first step of training
        self.since, self.busy = 0.0, 0.0  # when the running batch began; seconds of the epoch's batches before it
        self.amount: Any = 0  # what these batches held, a number or a tensor
        self.drawn: Any = None

    def disable(self) -> None:
        """Does nothing: only rank 0 prints."""

    def say(self, line: str) -> None:
        self.spoken = time.monotonic()
        if self.trainer.is_global_zero:
            tqdm.write(line, file=sys.stderr)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.start, self.first = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero:
            return
        inputs, unit = pl_module.data.example()
        cost = readable_count(multiply_adds(next(iter(pl_module.undivided), pl_module.model), inputs))
        size = f"{count_parameters(pl_module.model):,} parameters, {cost} multiply-adds for {unit}"
        batches = trainer.num_training_batches
        each = counted(int(batches), "batch", "batches") if batches < float("inf") else "any number of batches"
        length = f"{counted(trainer.max_epochs or 0, 'epoch')} of {each}"
        if by_steps(trainer, pl_module):
            length = f"{counted(pl_module.total, 'step')}, {each} an epoch"
        where = f"{trainer.strategy.root_device.type}, {trainer.precision}"
        self.say(f"model     {pl_module.preset}: {size}")
        self.say(f"data      {pl_module.data.described()}")
        self.say(f"training  {length}; AdamW, learning rate {pl_module.rate:g}, seed {pl_module.seed}; {where}")
        self.say(f"folder    {self.folder}")
        if (number := whole_epoch(trainer)) < FEW:
            self.say(f"warning: an epoch has {counted(number, 'batch', 'batches')}; lower {pl_module.batching}")
        sampler: Any = trainer.train_dataloader.batch_sampler.sampler  # pyright: ignore[reportOptionalMemberAccess]
        if sampler.count < trainer.world_size:
            few = counted(sampler.count, "training sample")
            self.say(f"warning: {few} for {trainer.world_size} ranks, so some ranks have none")
        if self.first:
            self.say(f"resumed   at epoch {trainer.current_epoch + 1}, step {self.first:,}")
        self.begin(self.finished)

    @property
    def finished(self) -> int:
        """The batches of the running epoch that are done."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.completed

    def begin(self, done: int = 0) -> None:
        self.began = self.since = time.monotonic()
        self.busy, self.amount = 0.0, 0
        self.draw_epoch(done)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.begin()

    def draw_epoch(self, done: int) -> None:
        self.draw(self.trainer.num_training_batches, f"epoch {self.trainer.current_epoch + 1}", done)

    def draw(self, total: float, what: str, done: int = 0) -> None:
        if self.bar and self.trainer.is_global_zero:
            self.erase()
            number = int(total) if total < float("inf") else None
            made = {"leave": False, "disable": None, "ncols": 79, "unit": "batch"}
            self.drawn = tqdm(total=number, desc=what, initial=done, **made)

    def erase(self) -> None:
        if self.drawn is not None:
            self.drawn.close()
            self.drawn = None

    def left(self, trainer: lightning.Trainer, task: Task, now: float) -> str | None:
        """The time left for the whole run; None before its first step."""
        done = trainer.global_step - self.first
        if done < 1:
            return None
        return f"{duration((now - self.start) / done * (task.total - trainer.global_step))} left"

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        now = time.monotonic()
        self.busy, self.since = self.busy + now - self.since, now
        self.amount = self.amount + pl_module.amount(batch)
        if self.drawn is not None:
            if left := self.left(trainer, pl_module, now):
                self.drawn.set_postfix_str(f"run {left}", refresh=False)
            self.drawn.update()
        if (self.drawn is None or self.drawn.disable) and now - self.spoken >= SILENCE:
            place = f"{self.place(trainer, pl_module)}  batch {batch_idx + 1}/{trainer.num_training_batches}"
            form = filter(None, (self.pace(trainer, pl_module)[0], self.left(trainer, pl_module, now)))
            self.say(f"{place}  loss {self.loss(pl_module)}  {', '.join(form)}")

    def place(self, trainer: lightning.Trainer, task: Task) -> str:
        """The running epoch, or the step where steps end the run."""
        if by_steps(trainer, task):
            return f"step {trainer.global_step:>{len(str(task.total))}}/{task.total}"
        epochs = trainer.max_epochs
        return f"epoch {trainer.current_epoch + 1:>{len(str(epochs))}}/{epochs}"

    def loss(self, task: Task) -> str:
        """The mean loss of the epoch so far."""
        return f"{float(task.loss_sum) / task.loss_number:.4f}" if task.loss_number else "-"

    def pace(self, trainer: lightning.Trainer, task: Task) -> tuple[str, str]:
        """The pace of the epoch's training, in a long and in a short form; empty for an epoch without a batch."""
        if self.busy == 0.0:
            return "", ""
        number = readable_count(float(self.amount) / self.busy * trainer.world_size)
        return f"{number} {task.unit[0]}", f"{number} {task.unit[1]}"

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.draw(sum(trainer.num_val_batches), "validation")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self.drawn is not None:
            self.drawn.update()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.erase()
        self.since = time.monotonic()
        if self.start and self.finished < trainer.num_training_batches:
            self.draw_epoch(self.finished)  # the validation was in the middle of an epoch

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.erase()
        name = self.keep.name.rpartition("/")[2].replace("loss", "val loss")
        latest, best, now = self.keep.latest, self.keep.best, time.monotonic()
        score = f"{latest.value:.4f}" if latest and latest.step == trainer.global_step else "-"
        place, loss = self.place(trainer, pl_module), self.loss(pl_module)
        head = f"{place}  loss {loss}  {name} {score}  best {f'{best.value:.4f}' if best else '-'}  "
        (long, short), left = self.pace(trainer, pl_module), self.left(trainer, pl_module, now) or "- left"
        forms = [(duration(now - self.began), long, left), (long, left), (short, left), (left,)]
        lines = [head + ", ".join(filter(None, form)) for form in forms]
        self.say(next((line for line in lines if len(line) <= WIDTH), lines[-1]))

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.erase()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.erase()
        if not self.start:
            self.say("nothing left to train: raise --trainer.max_epochs, --trainer.max_steps or --trainer.max_time")
            return
        folder, best = shlex.quote(str(self.folder)), self.keep.best
        if best:
            self.say(f"best      {best.said}, epoch {best.epoch + 1}")
        elif left := unfinished(pl_module.measured):
            self.say(f"no best   {left[0]} has not reached its final form: training ended before its schedule")
        self.say(
            f"took      {duration(time.monotonic() - self.start)}; checkpoints, logs and state are in {self.folder}"
        )
        name = "best" if best else "last"
        if not self.keep.written:  # trainer.enable_checkpointing=false, or fast_dev_run
            return
        self.say("next")
        self.say(f"  zoo {self.task} validate --model.weights {folder}/{name}")
        self.say(f"  zoo {self.task} {pl_module.use} {folder}/{name} {pl_module.files}".rstrip())
        limit = "max_steps" if by_steps(trainer, pl_module) else "max_epochs"
        self.say(f"  zoo {self.task} fit --ckpt_path={folder}/{STATE} --trainer.{limit} MORE")
