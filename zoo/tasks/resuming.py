"""What a state holds of an epoch, and whether it fits the run that is resumed from it."""

import re
import reprlib
import traceback
import zlib
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from zoo.weights.trunks import misfits

LOST = re.compile(r"/gloo/|NCCL|Connection (?:closed|reset|refused)|Broken pipe")  # what the backends say of it


ACCUMULATED = "accumulate_grad_batches"


class OtherModel(ValueError):
    """The weights in a state do not fit the model of the run."""

    start = "--ckpt_path belongs to another model"

    def __init__(self, tensor: str) -> None:
        super().__init__(f"{self.start}: '{tensor}' differs")


def unlike(found: Any, usual: Any, place: str) -> str | None:
    """How a nested state differs in form from a usual one: in keys, lengths, types or shapes; None if it does not."""
    if type(found) is not type(usual):
        return f"{place} must be of type {type(usual).__name__}, got {reprlib.repr(found)}"
    if isinstance(usual, dict | list | tuple):
        if isinstance(usual, dict) and found.keys() != usual.keys():
            return f"{place} must have the keys {', '.join(map(str, usual)) or 'none'}"
        if len(found) != len(usual):
            return f"{place} must have {len(usual)} values, got {len(found)}"
        keys = usual if isinstance(usual, dict) else range(len(usual))
        return next(filter(None, (unlike(found[key], usual[key], f"{place}.{key}") for key in keys)), None)
    if isinstance(usual, Tensor) and (found.shape, found.dtype) != (usual.shape, usual.dtype):
        return f"{place} must be {usual.dtype} of shape {tuple(usual.shape)}"
    return f"{place} must be >= 0, got {found}" if isinstance(usual, int) and found < 0 else None


def require(found: Any, usual: Any, place: str) -> None:
    """TypeError if a part of a state has another form than a usual one."""
    if wrong := unlike(found, usual, place):
        raise TypeError(wrong)


def restore_loops(checkpoint: dict[str, Any], trainer: lightning.Trainer) -> None:
    """TypeError if the progress in a state has another form than that of a trainer that has not begun."""
    for name in ("fit_loop", "validate_loop", "test_loop"):
        require(checkpoint["loops"][name], getattr(trainer, name).state_dict(), f"loops.{name}")


def restore_optimizers(checkpoint: dict[str, Any], trainer: lightning.Trainer) -> None:
    """Checks the state of the optimizers, and replaces their settings and the schedules by those of this run.

    Only moments and counts come from a state, so that changed options of a resumed run have an effect.

    Raises:
        ValueError: the groups of parameters are others, as after a change of model.layer_decay.
        TypeError: a part has another form than that of the run.
    """
    states, schedules = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    if (len(states), len(schedules)) != (len(trainer.optimizers), len(trainer.lr_scheduler_configs)):
        raise TypeError("optimizer_states and lr_schedulers must be as many as in this run")
    for state, optimizer in zip(states, trainer.optimizers, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        if [len(group["params"]) for group in state["param_groups"]] != [len(group["params"]) for group in groups]:
            raise ValueError(
                "--ckpt_path: model.layer_decay, and which parameters are trained, cannot change in a resumed run; "
                "set them as they were"
            )
        state["param_groups"] = groups
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, moments in state["state"].items():
            usual = torch.empty(parameters[number].shape, dtype=parameters[number].dtype, device="meta")
            form = {"step": torch.zeros(()), "exp_avg": usual, "exp_avg_sq": usual}
            require(moments, form, f"optimizer_states.state.{number}")
    for number, config in enumerate(trainer.lr_scheduler_configs):
        scheduler: Any = config.scheduler
        fresh, found = scheduler.state_dict(), schedules[number]
        counts = {name: found[name] for name in ("last_epoch", "_step_count")}
        require(counts, {name: fresh[name] for name in counts}, f"lr_schedulers.{number}")
        factors = (factor(counts["last_epoch"]) for factor in scheduler.lr_lambdas)
        lrs = [base * factor for base, factor in zip(fresh["base_lrs"], factors, strict=True)]
        schedules[number] = fresh | counts | {"_last_lr": lrs}
        for group, lr in zip(states[number]["param_groups"], lrs, strict=True):
            group["lr"] = lr


class Resumable(lightning.LightningModule):
    """A module whose states can be resumed in the middle of an epoch.

    Attributes:
        loss_sum: the sum of the losses of this epoch.
        loss_number: their number.
        loaded: the state that is being restored, or None.
    """

    loss_sum: Tensor
    loss_number: int

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Any] | None = None
        self.former: dict[str, int] | None = None  # how the state that was loaded divided an epoch
        self.former_plan: int | None = None  # its `plan`

    @property
    def data(self) -> Any:
        """The data module."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def resume_epoch(self) -> None:
        """Starts where the state that was loaded ends: with the next epoch, or in the middle of one."""
        loop = self.trainer.fit_loop
        if loop.restarted_on_epoch_end:  # with trainer.max_steps, where Lightning would end the epoch a second time
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False
        done = loop.epoch_loop.batch_progress.current.completed
        if loop.restarted_mid_epoch and done < loop.max_batches:
            now = self.division()
            former = self.former or now
            allowed = {"batches"} if self.data.changed == "ok" else set[str]()
            if changed := [name for name in now if now[name] != former[name] and name not in allowed]:
                name = changed[-1]
                if name == ACCUMULATED:
                    raise ValueError(
                        f"--ckpt_path was written in the middle of an epoch with trainer.{name}={former[name]}, and it "
                        f"is {now[name]} now; use the same, or resume from a state at the end of an epoch"
                    )
                raise ValueError(
                    f"--ckpt_path was written in the middle of an epoch of {former[name]} {name}, and now there are "
                    f"{now[name]}; resume with as many, or from a state at the end of an epoch"
                )
            if self.data.changed != "ok" and self.former_plan not in (None, self.plan(self.trainer.train_dataloader)):
                raise ValueError(
                    "--ckpt_path was written in the middle of an epoch with other batches; set data.batch, data.seed "
                    "and the data as they were, or resume from a state at the end of an epoch; with --data.changed=ok "
                    "some samples come twice or never in this epoch"
                )
            loader: Any = self.trainer.train_dataloader
            loader.batch_sampler.skip = done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, found = self.state_dict(), checkpoint["state_dict"]
        if differ := misfits(own, found):
            raise OtherModel(differ[0])
        restore_loops(checkpoint, self.trainer)
        if "epoch_loss" in checkpoint:
            require(checkpoint["epoch_loss"], self.epoch_loss(), "epoch_loss")
            self.loss_sum, self.loss_number = checkpoint["epoch_loss"].values()
        self.former = checkpoint.get("division")
        if self.former is not None:
            self.former = {ACCUMULATED: self.trainer.accumulate_grad_batches} | self.former  # earlier versions
            require(self.former, {ACCUMULATED: 0, "batches": 0, "ranks": 0}, "division")
        if (plan := checkpoint.get("plan")) is not None:  # earlier versions had none
            require(plan, 0, "plan")
        self.former_plan = plan
        if self.trainer.state.fn == TrainerFn.FITTING and self.trainer.strategy.restore_checkpoint_after_setup:
            restore_optimizers(checkpoint, self.trainer)
        elif self.trainer.state.fn == TrainerFn.FITTING:
            self.loaded = checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_loss"], checkpoint["division"] = self.epoch_loss(), self.division()
        if self.trainer.train_dataloader is not None:
            checkpoint["plan"] = self.plan(self.trainer.train_dataloader)

    def division(self) -> dict[str, int]:
        """How an epoch is divided: the batches of a step, those of a rank, and the ranks."""
        loader: Any = self.trainer.train_dataloader
        batches = 0 if loader is None else len(loader.batch_sampler)
        together = self.trainer.accumulate_grad_batches
        return {ACCUMULATED: together, "batches": batches, "ranks": self.trainer.world_size}

    def plan(self, loader: Any, split: str = "train") -> int:
        """A checksum of what decides which samples the batches of an epoch have."""
        return zlib.crc32(repr((loader.batch_sampler.batches.plan, self.data.state_dict().get(split))).encode())

    def check_ranks(self, loader: Any, split: str) -> None:
        """ValueError if ranks have different data: samples would come twice or never, or ranks wait for each other."""
        if self.trainer.world_size == 1:
            return
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, (self.plan(loader, split), loader.batch_sampler.sampler.count))
        if len({plan for plan, _ in found}) > 1:
            numbers = " and ".join(f"{number:,}" for number in sorted({number for _, number in found}))
            raise ValueError(
                f"the data of {split!r} differ between ranks ({numbers} samples); give every machine the same files, "
                "and look for damaged shards"
            )

    def epoch_loss(self) -> dict[str, Any]:
        """The sum of the losses of this epoch, and their number."""
        return {"sum": self.loss_sum.float().cpu(), "number": self.loss_number}


def restoring(error: BaseException) -> bool:
    """Whether an error was raised while a state was restored, here or by Lightning."""
    modules = __name__, checkpoint_connector.__name__
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = any(frame.f_globals.get("__name__") in modules and "restore_" in frame.f_code.co_name for frame in frames)
    return found and not isinstance(error, torch.OutOfMemoryError)


def disconnected(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return isinstance(error, RuntimeError) and bool(LOST.search(str(error)))
