"""The folder of a training run: its lock, its state to resume from, its config, and the checkpoints it leaves."""

import contextlib
import itertools
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from zoo.layer import copied, unfinished
from zoo.tasks.intervals import Measured
from zoo.tasks.resuming import require
from zoo.tasks.runs import NOTE, STATE, content, place
from zoo.tasks.states import Saving, drop_later, make_last
from zoo.tasks.task import Task
from zoo.text import from_json, reason
from zoo.weights import Figure, save_model

PATIENCE = 8.0  # seconds to wait for a folder: the workers of a run that was killed hold its lock for 5 seconds
OVERHEAD = 30.0  # checkpoints are written once this many times the duration of writing them has passed
STATE_WAIT = 0.5  # seconds that the step after a state waits for its write
ASK_EVERY = 8  # batches after which ranks ask each other about signals and minutes, between two steps of the optimizer


class Run:
    """The folder of a run.

    Args:
        folder: for all files of the run.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        self.state, self.config = self.folder / STATE, self.folder / "config.yaml"
        self.begun = self.state.with_name(".begun")  # exists from the start of a run until its first state
        self._lock: FileLock | None = None

    def has(self, state: str | os.PathLike[str] | None) -> bool:
        """Whether a state is one of this run."""
        return state is not None and Path(state).resolve().parent == self.state.parent.resolve()

    def open(self, resumed: bool) -> None:
        """Makes the folder and locks it until this process ends, however it ends.

        Raises:
            ValueError: another process trains in it, it holds a run and `resumed` is False, or it is a file.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:  # the first rank holds the lock for all
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; choose another --trainer.default_root_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire()
        kept = [name for name in (STATE, "last", "best") if (self.folder / name).exists()]
        if kept and not resumed and (STATE in kept or not self.begun.exists()):
            way = f"resume it with --ckpt_path={self.state}" if STATE in kept else "delete it"
            raise ValueError(f"{self.folder} already holds a run; {way}, or choose another --trainer.default_root_dir")
        if STATE not in kept:
            self.begun.parent.mkdir(exist_ok=True)
            self.begun.touch()

    def _acquire(self) -> None:
        """Locks the folder. ValueError at once if its holder lives, after PATIENCE if the holder has died."""
        self._lock, owner = FileLock(self.folder / ".lock"), self.folder / ".owner"
        end = time.monotonic() + PATIENCE
        while not self._lock.is_locked:
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                if lives(owner) or time.monotonic() > end:
                    raise ValueError(
                        f"another run is training in {self.folder}; choose another --trainer.default_root_dir"
                    ) from None
                time.sleep(0.2)
            except (OSError, NotImplementedError) as error:
                raise ValueError(
                    f"cannot lock {self.folder}: {reason(error)}; choose another --trainer.default_root_dir"
                ) from error
        owner.write_text(str(os.getpid()))

    def record_state(self, note: dict[str, Any]) -> None:
        """Records that a state is written, and what `zoo runs` says of it."""
        self.begun.unlink(missing_ok=True)
        self.note(note)

    def note(self, note: dict[str, Any]) -> None:
        """Writes the note of the last state. If it cannot be written, the one before stays: nothing depends on it."""
        path = self.folder / NOTE
        with contextlib.suppress(OSError):
            try:
                replace(path, json.dumps(note))
            finally:
                aside(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Releases the lock of the folder."""
        if self._lock is not None:
            self._lock.release()


def aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def replace(path: Path, text: str) -> None:
    """Writes a file aside and renames it."""
    aside(path).write_text(text)
    os.replace(aside(path), path)


def free(path: Path) -> Path:
    """The path, or with a number behind it the first that nothing has."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(each for each in names if not each.exists())


def ranks_ask(batch_idx: int, together: int = 1) -> bool:
    """Whether ranks ask each other in front of a batch that begins a step of `together` batches: in front of the first
    such batch from each multiple of ASK_EVERY on, so that at most ASK_EVERY + together - 1 batches lie between two
    questions.
    """
    return batch_idx % ASK_EVERY < together


def by_steps(trainer: lightning.Trainer, task: Task) -> bool:
    """Whether trainer.max_steps ends the run, and not trainer.max_epochs."""
    return 0 < trainer.max_steps == task.total


def lives(owner: Path) -> bool:
    """Whether the process lives whose number is in a file; False if that cannot be known."""
    try:
        number = int(owner.read_text())
        if os.name != "posix" or number <= 0:
            return False
        os.kill(number, 0)  # only asks
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


class Score(NamedTuple):
    """The result of a validation: the monitored value, a line about it, the epoch, the step, the number of samples, and
    the ends of the 95 % interval, NaN if there is none."""

    value: float
    said: str
    epoch: int
    step: int
    n: int = 0
    low: float = math.nan
    high: float = math.nan
    metric: str = ""


class Keep(Checkpoint):
    """Writes the checkpoints `last` and `best`, the state to resume from, and once the run's config.

    They are written at the end of an epoch, if 30 times the duration of writing has passed; at the end of training;
    and when training is stopped. A state is also written as `saving` says, between two batches or at the end of an
    epoch, after a `best` that was not yet written. Best is the validated model with the best score, once every layer
    has its final form (while prepbn still blends, no model is the best).

    A state has the number of finished batches of the epoch, so that a resumed run equals one that was never stopped.
    Training waits for checkpoints: their probe and cost run the model under settings of the whole process (kernels of
    attention, hooks of all modules, the random state). A state is written while training goes on. The optimizer's
    next step waits STATE_WAIT for it at most: if it is written by then, a kill costs no more steps than lie between two
    states.

    Attributes:
        best: the best score so far; None before the first.
        latest: the score of the last validation.
    """

    def __init__(self, run: Run, name: str, mode: str, config: str, saving: Saving) -> None:
        self.run, self.name, self.sign, self.config = run, name, 1.0 if mode == "max" else -1.0, config
        self.saving = saving
        self.best: Score | None = None
        self.latest: Score | None = None
        self.waiting: Any = None  # the best model, not yet written
        self.began = False  # whether training began
        self.written, self.step = 0.0, -1  # when a state was last written, and at which step
        self.kept, self.cost = 0.0, 0.0  # when checkpoints were last written, and the seconds that it took
        self.ended = -1  # the step of the last checkpoint `last`
        self.place = ""  # where in an epoch a state is being written: between its batches, or in its validation

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best and tuple(self.best), "latest": self.latest and tuple(self.latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("best", "latest"):
            if (found := state_dict[name]) is not None:
                found: Any = (*found, *Score(0.0, "", 0, 0)[len(found) :])  # earlier versions had four fields
                require(found, (0.0, "", 0, 0, 0, 0.0, 0.0, ""), name)
                setattr(self, name, Score(*found))

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Records that training begins: the state is not refused, which it may be in `on_train_start`."""
        self.began, self.step = True, trainer.global_step
        self.written = self.kept = time.monotonic()
        if trainer.strategy.broadcast(trainer.is_global_zero and self.leaves_best(trainer.ckpt_path)):
            self.best = None
        self.record(trainer.ckpt_path, self.note(trainer, pl_module))

    def leaves_best(self, state: str | os.PathLike[str] | None) -> bool:
        """Whether the run has no `best` with the score of the state: it goes back to one before its `best`, which gets
        another name, or its folder has none."""
        best, found = self.run.folder / "best", dict[str, int]()
        if self.best is not None and not best.exists():  # in another folder, or it got another name before a kill
            return True
        if state is None or not self.run.has(state) or self.run.state.exists() and self.run.state.samefile(state):
            return False
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # none, or a damaged one
            found = place(dict(from_json(content(best / "config.json"))).get("source"))
        if found.get("step", 0) <= self.step:
            return False
        other = free(self.run.folder / f"best-of-step-{found['step']}")
        os.replace(best, other)
        rank_zero_info(f"moved     the best of step {found['step']:,} to {other}: the run resumes from an earlier one")
        return True

    @rank_zero_only
    def record(self, state: str | os.PathLike[str] | None, note: dict[str, Any]) -> None:
        """Writes the run's config and its note, and drops the states of a future that it leaves; the state that it is
        resumed from becomes the last."""
        if state is not None and self.run.has(state):
            make_last(Path(state), self.run.state)
        drop_later(self.run.state.parent, self.step)
        replace(self.run.config, self.config)
        self.run.note(note)

    def note(self, trainer: lightning.Trainer, task: Any) -> dict[str, Any]:
        """What `zoo runs` says of a state: its epoch and step, how many there are to be, and the best score so far."""
        epochs, best = None if by_steps(trainer, task) else trainer.max_epochs, None
        place = {"epoch": trainer.current_epoch + 1, "epochs": epochs, "step": trainer.global_step, "steps": task.total}
        if self.best is not None and math.isfinite(self.best.value):
            best = {"metric": self.best.metric or self.measured(task).metric, "value": self.best.value}
        return {"task": task.command, "model": task.preset, **place, "best": best}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not pl_module.fitting:
            return
        value = float(trainer.callback_metrics[self.name])
        measured = self.measured(pl_module)
        low, high = measured.interval or (math.nan, math.nan)
        given = (trainer.current_epoch, trainer.global_step, measured.n, low, high, measured.metric)
        self.latest = Score(value, pl_module.said, *given)
        # While a layer still changes its form, the model is not yet the final one.
        if unfinished(pl_module.measured) or (self.best and self.sign * value <= self.sign * self.best.value):
            return
        self.best, found = self.latest, pl_module.whole()
        if trainer.is_global_zero and found is not None:
            self.waiting = copied(found).cpu()

    def due(self, trainer: lightning.Trainer, batch_idx: int = 0) -> bool:
        """Whether steps or minutes ask for a state; the same on every rank, which talk about minutes now and then."""
        steps, seconds = trainer.global_step - self.step, time.monotonic() - self.written
        if 0 < self.saving.steps <= steps:
            return True
        if trainer.world_size > 1 and not ranks_ask(batch_idx, trainer.accumulate_grad_batches):
            return False
        return trainer.strategy.reduce_boolean_decision(steps > 0 and 0 < self.saving.seconds <= seconds, all=False)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.began:
            self.begin(trainer, pl_module)
        # The first batch of an epoch still runs: what came before it belongs to the epoch before.
        between = batch_idx and batch_idx % trainer.accumulate_grad_batches == 0
        if between and self.due(trainer, batch_idx):
            self.write(trainer, pl_module, last=False, place="batches")

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        # If training were killed after this step and before the write is done, one step more would be repeated.
        if trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.wait(STATE_WAIT)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        last = trainer.strategy.broadcast(time.monotonic() - self.kept >= OVERHEAD * self.cost) or trainer.should_stop
        if last or self.due(trainer):
            pl_module.finish()
            self.write(trainer, pl_module, last=last)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.ended != trainer.global_step:
            self.write(trainer, pl_module, state=False)

    def write(
        self, trainer: lightning.Trainer, pl_module: Any, *, last: bool = True, state: bool = True, place: str = ""
    ) -> None:
        """Writes `best` if there is a better one, `last`, and then the state, which knows of them.

        `place` is "batches" between two batches of an epoch, "validation" in a validation, else empty.
        """
        if place:
            pl_module.raise_bad_weights()
        start = time.monotonic()
        if self.waiting is not None and self.best is not None:
            self.save(trainer, pl_module, "best", self.waiting, self.best)
            self.waiting = None
        if last:
            now = Score(math.nan, "", trainer.current_epoch, trainer.global_step)
            found = self.latest if self.latest and self.latest.step == now.step else now
            self.save(trainer, pl_module, "last", pl_module.whole(), found)
            self.ended, self.kept = trainer.global_step, time.monotonic()
        self.cost = time.monotonic() - start + (0.0 if last else self.cost)
        if state:
            self.place = place
            then = partial(self.run.record_state, self.note(trainer, pl_module))
            trainer.save_checkpoint(self.run.state, weights_only=False, storage_options=then)
            self.place = ""
        self.written, self.step = time.monotonic(), trainer.global_step

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

    @rank_zero_only
    def save(self, trainer: lightning.Trainer, task: Task, name: str, model: Any, score: Score) -> None:
        save_model(
            model,
            self.run.folder / name,
            preset=task.preset,
            preprocess=task.data.preprocess,
            labels=task.labels,
            source=f"trained by zoo on {task.data.dataset}, epoch {score.epoch + 1}, step {score.step}",
            figures=[self.figure(task, score)] if math.isfinite(score.value) else [],
        )

    def measured(self, task: Task) -> Measured:
        """What the last validation found of the monitored metric."""
        found = [each for each in task.figures if f"val/{each.key}" == self.name]
        return found[0] if found else Measured(self.name, self.name, 0)

    def figure(self, task: Task, score: Score) -> Figure:
        """The score as a checkpoint states it."""
        root, found = getattr(task.data, "root", None), self.measured(task).metric
        return Figure(
            data=task.data.dataset if root is None else Path(root).resolve().name,
            split="val",
            metric=score.metric or found,
            value=score.value,
            n=score.n,
            interval=[score.low, score.high] if math.isfinite(score.low + score.high) else None,
            command=f"zoo evaluate CHECKPOINT{'' if root is None else ' --root DIR'}",
        )
