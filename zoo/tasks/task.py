"""What every task shares: the model from its name, the optimizer, the schedule, the averaged copy, the progress."""

import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from zoo.config import Config
from zoo.data.sampling import global_seed
from zoo.inputs import Preprocess
from zoo.layer import advance
from zoo.models import create_model
from zoo.models.base import Model
from zoo.norms import has_batch_statistics, refresh_statistics
from zoo.weights import load_checkpoint
from zoo.weights.adapt import adapted, misfits

HINT = "lower model.rate, raise model.warmup, or clip with trainer.gradient_clip_val"


class NotFinite(ValueError):
    """The loss or the weights are no numbers."""


class Task(lightning.LightningModule):
    """A model in training, with the options that all tasks share.

    `command` is the task's name on the command line, as in `zoo classify`; `score` is the metric that is monitored, and
    `max` or `min`; `faulty` lists what may be wrong with samples.

    Every step advances the model (and its averaged copy) to the share of training that is over. Randomness is a
    function of seed and epoch, so a run resumed at the end of an epoch gives the weights of one that never stopped.

    Args:
        backbone: the call of `zoo.create_model`: name, and any field of the model's config.
        weights: a checkpoint to start from or to measure: a folder, a name in checkpoints/, or owner/name on the Hub.
            Fields of backbone then replace those of its config.
        rate: peak learning rate of AdamW.
        weight_decay: of matrices only; norms, biases, tokens and positions have none.
        layer_decay: factor of the learning rate from each block to the one below it; 1 for none.
        warmup: epochs of linear warm-up.
        final_rate: learning rate at the end of the cosine, and the least of other schedules.
        average: decay of the averaged copy of the weights, which is then what is measured and kept; 0 for none.
        checkpointing: computes activations again in the backward pass, to save memory.
        refresh: training batches on which batch statistics are measured again before the last validation.
        seed: what dropout, dropped paths, mixing and masks depend on, besides the epoch; null for that of
            seed_everything.
    """

    command: ClassVar[str]
    score: ClassVar[tuple[str, str]]
    faulty: ClassVar[tuple[str, ...]] = ()
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        weights: str | None = None,
        rate: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup: float = 5.0,
        final_rate: float = 1e-5,
        average: float = 0.0,
        checkpointing: bool = False,
        refresh: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.start = dict(backbone), None
        if weights is None:
            if "name" not in backbone:
                raise ValueError("model.backbone needs a name, as in --model.backbone.name=NAME; `zoo list` shows them")
            model = create_model(**backbone)
            assert isinstance(model, Model)
            self.model = model
        else:
            self.start = load_checkpoint(weights)
            self.model, fresh = adapted(self.start, self.backbone, weights)
            self.model.train()
            if fresh:
                rank_zero_info(f"started from {weights} with a new head")
        if (trained := self.config.task) != self.command:
            by = f"trained by `zoo {trained}`" if trained else "trained by no command"
            raise ValueError(f"model.backbone is {by}, not by `zoo {self.command}`")
        self.preset: str | None = self.backbone.get("name", self.start and self.start.config["preset"])
        self.model.checkpointing = checkpointing
        for name, value, least in (
            ("warmup", warmup, 0.0),
            ("weight_decay", weight_decay, 0.0),
            ("refresh", refresh, 0),
        ):
            if value < least:
                raise ValueError(f"model.{name} is at least {least}, not {value}")
        if not 0.0 < rate < math.inf or not 0.0 <= final_rate <= rate:
            raise ValueError(f"model.rate is above 0 and model.final_rate in 0..rate, not {rate} and {final_rate}")
        if not 0.0 < layer_decay <= 1.0:
            raise ValueError(f"model.layer_decay lies above 0 and at most at 1, not {layer_decay}")
        if refresh and not has_batch_statistics(self.model):
            raise ValueError("model.refresh measures batch statistics again, and this model has none; set it to 0")
        if not 0.0 <= average < 1.0:
            raise ValueError(f"model.average is a decay in 0..1, or 0 for no averaged copy; not {average}")
        self.average = None
        if average:
            self.average = ModelEmaV3(self.model, decay=average, use_warmup=True, exclude_buffers=True)
            self.average.requires_grad_(False)
        self.rate, self.weight_decay, self.layer_decay = rate, weight_decay, layer_decay
        self.warmup, self.final_rate, self.refresh = warmup, final_rate, refresh
        self.seed = global_seed() if seed is None else seed
        self.counted, self.warned = Counter[tuple[str, str]](), set[str]()
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.long), persistent=False)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def measured(self) -> nn.Module:
        """The model that is measured and kept: the averaged copy where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def fitting(self) -> bool:
        """Whether this is `fit`, its validations included and its first check excluded."""
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    @property
    def progress(self) -> float:
        """The share of training that is over."""
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.trainer.global_step / total) if math.isfinite(total) else 0.0

    def configure_optimizers(self) -> Any:
        """AdamW without decay on norms, biases and positions; the learning rate follows `factor`."""
        spared = self.model.no_weight_decay()
        if self.layer_decay < 1.0:
            groups = param_groups_layer_decay(
                self.model, self.weight_decay, no_weight_decay_list=spared, layer_decay=self.layer_decay
            )
        else:
            groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=spared)
        for group in groups:
            group["lr"] = self.rate * group.pop("lr_scale", 1.0)
        optimizer = AdamW(groups, lr=self.rate, betas=self.betas)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end; give trainer.max_epochs or trainer.max_steps")
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = LambdaLR(optimizer, lambda step: self.factor(step, per_epoch, int(steps)))
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
            raise ValueError("a fused model is for inference and cannot be trained; start from the unfused one")

    def on_train_epoch_start(self) -> None:
        seed = (self.seed * 1_000_003 + self.current_epoch) * 1009 + self.global_rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.advance()
        self.averaged_step = self.trainer.global_step

    def advance(self) -> None:
        advance(self.model, self.progress)
        if self.average is not None:
            advance(self.average.module, self.progress)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, its first step that is not finite remembered; asks the device now and then only."""
        bad = (self.bad_step < 0) & ~loss.detach().isfinite()
        self.bad_step = torch.where(bad, torch.full_like(self.bad_step, self.global_step), self.bad_step)
        if loss.device.type == "cpu" or self.global_step % 50 == 0:
            self.raise_bad_step()
        return loss

    def raise_bad_step(self) -> None:
        if (step := int(self.bad_step.item())) >= 0:
            raise NotFinite(f"the loss was not finite at step {step} (epoch {self.current_epoch}); {HINT}")

    def raise_bad_weights(self) -> None:
        """Stops before weights that are no numbers are measured or kept."""
        self.raise_bad_step()
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise NotFinite(f"the weights are not finite after step {self.global_step - 1}; {HINT}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.averaged_step:
            return  # the gradients of this batch wait for those of the next
        self.averaged_step = self.trainer.global_step
        self.advance()
        if self.average is not None:
            self.average.update(self.model, step=self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self.raise_bad_weights()

    def on_validation_start(self) -> None:
        if not self.fitting:
            return
        self.raise_bad_weights()
        if self.progress == 1.0 and self.refresh:
            self.refresh_statistics()

    def refresh_statistics(self) -> None:
        """Measures batch statistics again on `refresh` training batches of an epoch that training did not see."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(self.current_epoch + 1)
        precision = self.trainer.precision_plugin
        moved = (self.transfer_batch_to_device(precision.convert_input(batch), self.device, 0) for batch in loader)
        inputs = (self.inputs_of(batch) for batch in moved)
        filled = (each for each in inputs if len(each[0]))
        with precision.val_step_context():
            used = refresh_statistics(self.measured, itertools.islice(filled, self.refresh))
        rank_zero_info(f"batch statistics measured again on {used} batches")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, found = self.state_dict(), checkpoint["state_dict"]
        if differ := misfits(own, found):
            raise ValueError(f"--ckpt_path is of another model: '{differ[0]}' differs")

    def check_preprocess(self, preprocess: Preprocess) -> None:
        """ValueError where the data is prepared for another model."""
        for name in preprocess.shared:
            if (given := getattr(preprocess, name)) != (taken := getattr(self.config, name)):
                raise ValueError(f"the data has {given} {name} and the model {taken}; set model.backbone.{name}")

    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """What the model takes of a batch."""
        raise TypeError(f"{type(self).__name__} has no inputs_of")

    @property
    def labels(self) -> Any:
        """What a checkpoint says of the model's outputs."""
        raise TypeError(f"{type(self).__name__} has no labels")

    def note(self, faults: Iterable[str], kind: str, stage: str) -> None:
        """Warns of each fault once, and counts them all; kind is one of `faulty`."""
        faults = list(faults)
        if faults:
            self.counted[stage, kind] += len(faults)
        for fault in sorted(set(faults) - self.warned):
            warnings.warn(fault, stacklevel=2)
        self.warned |= set(faults)

    def report(self, stage: str) -> None:
        """Says how many faults of each kind a stage had, over all ranks."""
        place = f"{stage} of epoch {self.current_epoch}"
        if self.trainer.state.fn != TrainerFn.FITTING:
            place = "test" if self.trainer.testing else "validation"
        for kind in self.faulty:
            total = self.all_gather(torch.tensor(self.counted.pop((stage, kind), 0), device=self.device))
            if number := int(torch.as_tensor(total).sum()):
                rank_zero_warn(f"{number} {kind} were {self.fate(kind, stage)} the {place}")

    def fate(self, kind: str, stage: str) -> str:
        """What became of samples with a fault, as `report` says it."""
        return "skipped in"

    def no_loss(self) -> Tensor:
        """A loss of 0 that every parameter has a part in, for a batch without any sample."""
        return torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum() * 0.0
