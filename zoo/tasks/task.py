"""What every task shares: the model from its name, the optimizer, the schedule, the averaged copy, the progress."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from zoo.config import Config
from zoo.data.loading import DataModule
from zoo.data.sampling import global_seed, reseed
from zoo.layer import advance, copied, undecayed
from zoo.models import create_model
from zoo.models.base import Model, adding_losses, compile_blocks
from zoo.norms import has_batch_statistics, refresh_statistics
from zoo.outputs import LABELS
from zoo.tasks.average import Average
from zoo.tasks.faults import Faults
from zoo.tasks.intervals import Measured
from zoo.tasks.resuming import Resumable, restore_optimizers
from zoo.tasks.sharding import FSDP2, gathered
from zoo.weights import load_checkpoint
from zoo.weights.adapt import Loaded, adapt

HINT = "lower model.rate, raise model.warmup, or clip with trainer.gradient_clip_val"
# Readable names of fields that the data decides.
NAMES = {"vocabulary": "tokens with the blank", "mels": "mel bands"}


def differing(labels: Sequence[str], names: Sequence[str]) -> str:
    """Where the classes of a checkpoint differ first from those of the data; empty if they are the same."""
    if apart := next((pair for pair in zip(labels, names, strict=False) if pair[0] != pair[1]), None):
        return f"it has '{apart[0]}' where the data has '{apart[1]}'"
    return "" if len(labels) == len(names) else f"it has {len(labels)} classes"


class NotFinite(ValueError):
    """The loss or the weights are NaN or infinite."""


class Task(Faults, Resumable):
    """A model in training, with the options that all tasks share.

    `command` is the task's name on the command line, as in `zoo classify`; `score` is the metric that is monitored,
    and `max` or `min`; `use` is the verb that uses a trained model, and `files` what it takes, in a line of a command;
    `faulty` lists possible faults of samples; `batching` is the option that sets the size of a batch; `unit` is that of
    the pace of training, in long and short.

    Every step advances the model (and its averaged copy) to the finished share of training. Randomness is a
    function of seed, epoch and batch, so a resumed run gives the weights of one that never stopped. Fields of the
    model's config that the data decides (the number of outputs, channels) come from the data unless backbone sets them.

    Args:
        backbone: arguments of `zoo.create_model`: name, and any field of the model's config.
        weights: a checkpoint to start from or to evaluate: a folder, a name in checkpoints/, or owner/name on the Hub.
            Fields of backbone then replace those of its config.
        fresh: fields of backbone that may differ from the checkpoint's; weights that then do not fit start untrained.
        rate: peak learning rate of AdamW.
        weight_decay: of matrices only; norms, biases, tokens and positions have none.
        layer_decay: factor of the learning rate from each block to the one below it; 1 for none.
        warmup: epochs of linear warm-up.
        final_rate: learning rate at the end of the cosine, and the least of other schedules.
        average: decay of the averaged copy of the weights, which is then evaluated and saved; 0 for none.
        checkpointing: recomputes activations in the backward pass, to save memory.
        compile: compiles each block (torch.compile) at the first batch of training and, without an average, of
            validation; and again when sizes start to vary or padding first occurs.
        balance: weight of the mean of the losses of the model's layers, such as those that balance experts; 0 for none.
        refresh: training batches on which batch statistics are recomputed before the last validation.
        seed: seed of dropout, dropped paths, mixing and masks, together with epoch and batch; null for that of
            seed_everything.

    Attributes:
        start: the checkpoint that is fine-tuned or evaluated, or None.
        said: the result of the last validation, in one line.
        alignment: a module that is trained beside the model and not saved with it, or None.
        figures: what the last validation measured, with 95 % intervals.
    """

    command: ClassVar[str]
    score: ClassVar[tuple[str, str]]
    use: ClassVar[str] = "predict"
    files: ClassVar[str] = "FILES"
    batching: ClassVar[str] = "data.batch"
    unit: ClassVar[tuple[str, str]] = ("images/s", "img/s")
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        weights: str | None = None,
        fresh: list[str] = [],  # noqa: B006 (it is never changed, and --help shows it)
        rate: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup: float = 5.0,
        final_rate: float = 1e-5,
        average: float = 0.0,
        checkpointing: bool = False,
        compile: bool = False,
        balance: float = 0.01,
        refresh: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.weights, self.said = dict(backbone), weights, ""
        self.figures: list[Measured] = []
        self.fresh, self.taken = list(fresh), Loaded()
        self.named: list[str] | None = None  # the labels of the model's rows, of a checkpoint that is fine-tuned
        self.start = load_checkpoint(weights) if isinstance(weights, str) else weights  # or a checkpoint as loaded
        if self.start is None and "name" not in backbone:
            raise ValueError(
                "model.backbone needs a name, as in --model.backbone.name=NAME (`zoo list` shows them); "
                "or give --model.weights=CHECKPOINT to start from one"
            )
        self.model = self.built(self.backbone)
        if (trained := self.config.task) != self.command:
            other = f"use `zoo {trained}`" if trained else "no command trains it"
            raise ValueError(f"`zoo {self.command}` cannot train this model.backbone; {other}")
        self.preset: str | None = self.backbone.get("name", self.start and self.start.config["preset"])
        self.checkpointing, self.compiled, self.decay, self.balance = checkpointing, compile, average, balance
        least = {"warmup": warmup, "weight_decay": weight_decay, "balance": balance, "refresh": refresh}
        if wrong := next((name for name, value in least.items() if value < 0), None):
            raise ValueError(f"model.{wrong} must be >= 0, got {least[wrong]}")
        if not 0.0 < rate < math.inf or not 0.0 <= final_rate <= rate:
            raise ValueError(f"model.rate must be > 0 and model.final_rate from 0 to rate, got {rate} and {final_rate}")
        if not 0.0 < layer_decay <= 1.0:
            raise ValueError(f"model.layer_decay must be > 0 and <= 1, got {layer_decay}")
        if refresh and not has_batch_statistics(self.model):
            raise ValueError("model.refresh recomputes batch statistics, but this model has none; set it to 0")
        if not 0.0 <= average < 1.0:
            raise ValueError(f"model.average must be a decay from 0 to 1, or 0 for no averaged copy, got {average}")
        self.average: Average | None = None
        self.alignment: nn.Module | None = None
        self.complete()
        self.rate, self.weight_decay, self.layer_decay = rate, weight_decay, layer_decay
        self.warmup, self.final_rate, self.refresh = warmup, final_rate, refresh
        self.seed = global_seed() if seed is None else seed
        self.loss_sum, self.loss_number = torch.zeros(()), 0
        self.total, self.finished_at = 0, -1
        self.undivided: tuple[nn.Module, ...] = ()  # a copy of a model that is divided over ranks, hidden in a tuple
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.long), persistent=False)

    def built(self, backbone: dict[str, Any], labels: Any = None) -> Model:
        """The model that backbone describes, with the weights of the checkpoint that training starts from; its rows of
        labels that the checkpoint has, too, are kept."""
        if self.start is None:
            with torch.random.fork_rng(devices=[]):  # built again, it starts from the same weights
                model = create_model(**backbone)
            assert isinstance(model, Model)
            return model
        fields, preset = dict(backbone), self.start.config["preset"]
        if (asked := fields.pop("name", preset)) != preset:
            raise ValueError(f"{self.weights} was made from {preset}, not from model.backbone.name={asked}")
        try:
            found = adapt(self.start, fields, labels, self.fresh, self.weights)
        except ValueError as error:
            raise ValueError(
                str(error).replace("in fresh, as in fresh=", "in model.fresh, as in model.fresh=")
            ) from None
        model, self.taken = found.model, found.model.loaded
        if any(self.taken[1:]):
            rank_zero_info(f"started   from {self.weights}: {self.taken}")
        model.preset = model.preprocess = model.labels = None  # training sets its own
        model.about = self.about_start()
        return model.train()

    def about_start(self) -> dict[str, Any]:
        """The license of the checkpoint that training starts from, and where it is from."""
        assert self.start is not None
        origin = self.start.model.origin
        return {"license": self.start.config.get("license", "unknown"), "base": origin and dict(origin.base)}

    def complete(self) -> None:
        """Makes what depends on the model, here its averaged copy; called again if the data changed the model."""
        self.model.checkpointing = self.checkpointing
        self.balanced = self.balance > 0 and any(getattr(part, "reports_loss", False) for part in self.model.modules())
        if self.decay:
            self.average = Average(self.model, self.decay)

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if self.compiled and self.trainer.state.fn == TrainerFn.FITTING:
            compile_blocks(self.model, strategy.root_device)
        if self.undivided or not isinstance(strategy, FSDP2):
            return
        self.undivided = (copied(self.measured).cpu(),)
        for model in (self.model, self.average and self.average.module, self.alignment):
            if model is not None:
                strategy.shard(model)

    def setup(self, stage: str) -> None:
        data = self.data
        found = {self.config.counted: self.outputs_wanted(data)}
        found |= {name: getattr(data.preprocess, name) for name in data.preprocess.shared}
        differ = {name: value for name, value in found.items() if getattr(self.config, name) != value}
        taken = {name: value for name, value in differ.items() if name not in self.backbone and stage == "fit"}
        labels = self.kept_labels() if stage == "fit" and {*differ} == {*taken} else None
        if taken or labels is not None:
            self.backbone |= taken
            self.model = self.built(self.backbone, labels)
            self.complete()
        if taken:
            rank_zero_info(f"taken     {', '.join(f'{name}={value}' for name, value in taken.items())} from the data")
        if wrong := next((name for name in differ if name not in taken), None):
            ours, theirs, what = getattr(self.config, wrong), found[wrong], NAMES.get(wrong, wrong)
            model = "model" if stage == "fit" else "checkpoint"
            remedy = f"; omit model.backbone.{wrong} or set it to {theirs}" if stage == "fit" else ""
            raise ValueError(f"the {model} has {ours} {what}, but the data has {theirs}{remedy}")

    def kept_labels(self) -> Any:
        """The labels of the data, to keep the rows of those that the checkpoint has, too; None if no row depends on
        them."""
        kind = LABELS.get(str(self.config.labels))
        if self.start is None or self.start.labels is None or not self.start.model.config.labelled or kind is None:
            return None
        labels, self.named = self.labels, self.named or [*kind.names(self.start.labels)]
        if not kind.fits(labels) or [*kind.names(labels)] == self.named:
            return None
        self.named = [*kind.names(labels)]
        return labels

    def outputs_wanted(self, data: DataModule) -> int:
        """How many outputs the model needs for the data."""
        return data.labelled

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def measured(self) -> nn.Module:
        """The model that is evaluated and saved: the averaged copy if there is one."""
        return self.model if self.average is None else self.average.module

    def whole(self) -> nn.Module | None:
        """`measured`; if it is divided over ranks, gathered on the first of them, and None on the others."""
        return gathered(self.measured, *self.undivided) if self.undivided else self.measured

    @property
    def fitting(self) -> bool:
        """Whether this is `fit`, its validations included and its first check excluded."""
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    @property
    def progress(self) -> float:
        """The finished share of training."""
        return min(1.0, self.trainer.global_step / self.total) if self.total else 0.0

    def groups(self) -> list[dict[str, Any]]:
        """The parameters by weight decay and share `lr_scale` of the learning rate."""
        excluded = self.model.no_weight_decay() | undecayed(self.model)
        if self.layer_decay < 1.0:
            groups = param_groups_layer_decay(
                self.model, self.weight_decay, no_weight_decay_list=excluded, layer_decay=self.layer_decay
            )
        else:
            groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=excluded)
        if self.alignment is not None:
            groups.append({"params": list(self.alignment.parameters()), "weight_decay": 0.0})
        return groups

    def configure_optimizers(self) -> Any:
        """AdamW without decay on norms, biases and positions; the learning rate follows `factor`."""
        groups = self.groups()
        for group in groups:
            group["lr"] = self.rate * group.pop("lr_scale", 1.0)
        # In mixed precision Lightning does not clip the gradients of the fused form.
        fused = not (str(self.trainer.precision).endswith("-mixed") and self.trainer.gradient_clip_val)
        optimizer = AdamW(groups, lr=self.rate, betas=self.betas, fused=fused)
        self.trainer.fit_loop.setup_data()
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs a length; set trainer.max_epochs or trainer.max_steps")
        self.total = int(steps)
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = LambdaLR(optimizer, lambda step: self.factor(step, per_epoch, self.total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def factor(self, step: int, per_epoch: int, steps: int) -> float:
        """The learning rate of a step as a share of the peak: a linear warm-up, then half a cosine."""
        warmup, low = round(self.warmup * per_epoch), self.final_rate / self.rate
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, steps - warmup)
        return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, share))) / 2

    def on_fit_start(self) -> None:
        if self.start is not None and self.start.config["fused"]:
            raise ValueError("a fused model is for inference only; train the unfused one")
        if self.loaded is not None:
            restore_optimizers(self.loaded, self.trainer)
            self.loaded = None

    def on_train_start(self) -> None:
        self.check_ranks(self.trainer.train_dataloader, "train")
        self.resume_epoch()
        trainer: Any = self.trainer  # a short epoch has its losses in the logs, too
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, int(trainer.fit_loop.max_batches) // 4))
        self.averaged_step = self.trainer.global_step
        self.advance()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.loss_sum, self.loss_number = torch.zeros((), device=self.device), 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, with that of the model's layers."""
        if not self.balanced:
            return self.loss_of(batch)
        with adding_losses(self.model) as losses:
            loss = self.loss_of(batch)
        if losses:
            mean = torch.stack(losses).mean()
            self.log("train/balance", mean.detach())
            loss = loss + self.balance * mean
        return loss

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch in training, which it logs as `train/loss` and checks."""
        raise TypeError(f"{type(self).__name__} has no loss_of")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        reseed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.device.type != "cpu":
            torch.manual_seed(torch.initial_seed())  # the accelerator's generator, too

    def advance(self) -> None:
        advance(self.model, self.progress)
        if self.average is not None:
            advance(self.average.module, self.progress)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss; remembers its first step that is NaN or infinite, and asks the device only now and then."""
        value = loss.detach()
        self.loss_sum, self.loss_number = self.loss_sum + value, self.loss_number + 1
        if loss.device.type != "cpu":
            bad = (self.bad_step < 0) & ~value.isfinite()
            self.bad_step = torch.where(bad, torch.full_like(self.bad_step, self.global_step), self.bad_step)
            if self.global_step % 50 == 0:
                self.raise_bad_step()
        elif not math.isfinite(value.item()):
            self.bad_step.fill_(self.global_step)
            self.raise_bad_step()
        return loss

    def raise_bad_step(self) -> None:
        if (step := int(self.bad_step.item())) >= 0:
            place = f"step {step} (epoch {self.current_epoch}){self.where()}"
            raise NotFinite(f"the loss was NaN or infinite at {place}; {HINT}")

    def where(self) -> str:
        """What else is known of a loss that is NaN or infinite, for the error."""
        return ""

    def raise_bad_weights(self) -> None:
        """Stops before weights that are NaN or infinite are evaluated or saved."""
        self.raise_bad_step()
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise NotFinite(f"the weights are NaN or infinite after step {self.global_step - 1}; {HINT}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.averaged_step:
            return  # the gradients of this batch wait for those of the next
        self.averaged_step = self.trainer.global_step
        self.advance()
        if self.average is not None:
            if self.undivided:
                self.average.module.reshard()  # pyright: ignore[reportCallIssue] (a validation leaves it gathered)
            self.average.update(self.model, step=self.trainer.global_step)
        if self.progress == 1.0:  # also in the middle of an epoch: Lightning then validates before it ends
            self.trainer.should_stop, self.trainer.check_val_every_n_epoch = True, None

    def on_train_epoch_end(self) -> None:
        self.raise_bad_weights()

    def on_test_start(self) -> None:
        self.check_ranks(self.trainer.test_dataloaders, "test")

    def on_validation_start(self) -> None:
        self.check_ranks(self.trainer.val_dataloaders, "val")
        if self.fitting:
            self.raise_bad_weights()
            self.finish()

    def finish(self) -> None:
        """Changes the model once, after the last step and before it is evaluated and saved."""
        if self.progress == 1.0 and self.refresh and self.finished_at != self.trainer.global_step:
            self.refresh_statistics()
        self.finished_at = self.trainer.global_step

    def refresh_statistics(self) -> None:
        """Recomputes batch statistics on `refresh` training batches of an epoch that training did not see.

        Batches without a readable sample on some rank are skipped on all: ranks exchange statistics.
        """
        loader = self.data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(self.current_epoch + 1)
        precision = self.trainer.precision_plugin
        moved = (self.transfer_batch_to_device(precision.convert_input(batch), self.device, 0) for batch in loader)
        inputs = (self.inputs_of(self.data.on_after_batch_transfer(batch, 0)) for batch in moved)
        agreed = self.trainer.strategy.reduce_boolean_decision
        filled = (each for each in inputs if agreed(len(each[0]) > 0))
        with precision.val_step_context():
            used = refresh_statistics(self.measured, itertools.islice(filled, self.refresh))
        rank_zero_info(f"batch statistics recomputed on {used} batches")

    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """The model's arguments from a batch."""
        raise TypeError(f"{type(self).__name__} has no inputs_of")

    def amount(self, batch: Any) -> float | Tensor:
        """How much a batch holds, so that its sum over a second is the pace in `unit`."""
        return len(batch.images)

    @property
    def labels(self) -> Any:
        """The labels that a checkpoint stores for the model's outputs."""
        raise TypeError(f"{type(self).__name__} has no labels")

    def no_loss(self) -> Tensor:
        """A loss of 0 that depends on every trained parameter that is not divided, for a batch without samples."""
        whole = [each for each in self.parameters() if each.requires_grad and not isinstance(each, DTensor)]
        return torch.stack([parameter.sum() for parameter in whole]).sum() * 0.0
