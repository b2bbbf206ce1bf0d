"""What every task shares: the model from its name, the optimizer, the schedule, the averaged copy, the progress."""

import math
import random
from dataclasses import fields, replace
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from zoo.block import BlockConfig
from zoo.layer import advance
from zoo.models import create_model
from zoo.norms import BatchNorm, refresh_statistics
from zoo.weights import Checkpoint, load_checkpoint


class NotFinite(ValueError):
    """The loss is not a number."""


class Task(lightning.LightningModule):
    """A model in training. `backbone` is literally the call of `zoo.create_model`.

    Every step advances the model (and its averaged copy) to the share of training that is over. Randomness is a
    function of seed and epoch, so a run resumed at the end of an epoch gives the same weights as one that never stopped.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        weights: str | None,
        rate: float,
        weight_decay: float,
        layer_decay: float,
        warmup: float,
        final_rate: float,
        average: float,
        checkpointing: bool,
        refresh: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.backbone, self.start = dict(backbone), None
        if weights is None:
            if "name" not in backbone:
                raise ValueError("model.backbone needs a name, as in --model.backbone.name=vit_tiny")
            self.model = create_model(**backbone)
        else:
            self.start = load_checkpoint(weights)
            self.model = adapted(self.start, {k: v for k, v in backbone.items() if k != "name"}, weights)
        if checkpointing:
            if not hasattr(self.model, "checkpointing"):
                raise ValueError(f"{type(self.model).__name__} has no activation checkpointing")
            self.model.checkpointing = True
        if not 0.0 <= average < 1.0:
            raise ValueError(f"model.average is a decay in 0..1, or 0 for no averaged copy; not {average}")
        self.average = None
        if average:
            self.average = ModelEmaV3(self.model, decay=average, use_warmup=True, exclude_buffers=True)
            self.average.requires_grad_(False)
        self.rate, self.weight_decay, self.layer_decay = rate, weight_decay, layer_decay
        self.warmup, self.final_rate, self.refresh, self.seed = warmup, final_rate, refresh, seed
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.long), persistent=False)

    @property
    def config(self) -> BlockConfig:
        return self.model.config  # pyright: ignore[reportReturnType]

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
        """AdamW without decay on norms, biases and positions; a linear warm-up (in epochs), then half a cosine."""
        spared = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()  # pyright: ignore
        if self.layer_decay < 1.0:
            groups = param_groups_layer_decay(self.model, self.weight_decay, spared, layer_decay=self.layer_decay)
        else:
            groups = param_groups_weight_decay(self.model, self.weight_decay, spared)
        for group in groups:
            group["lr"] = self.rate * group.pop("lr_scale", 1.0)
        optimizer = AdamW(groups, lr=self.rate)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end; give trainer.max_epochs or trainer.max_steps")
        warmup = round(steps * self.warmup / max(1, self.trainer.max_epochs or 1))
        low = self.final_rate / self.rate

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            share = (step - warmup) / max(1, steps - warmup)
            return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, share))) / 2

        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    def on_fit_start(self) -> None:
        if self.start is not None and self.start.config["fused"]:
            raise ValueError("a fused model is for inference and cannot be trained; start from the unfused one")

    def on_train_epoch_start(self) -> None:
        seed = (self.seed * 1_000_003 + self.current_epoch) * 1009 + self.global_rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.advance()

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
            hint = "lower model.rate, raise model.warmup, or clip with trainer.gradient_clip_val"
            raise NotFinite(f"the loss was not finite at step {step} (epoch {self.current_epoch}); {hint}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.advance()
        if self.average is not None:
            self.average.update(self.model, step=self.trainer.global_step)

    def on_validation_start(self) -> None:
        self.raise_bad_step()
        last = self.trainer.max_epochs is not None and self.current_epoch + 1 == self.trainer.max_epochs
        if self.fitting and last and self.refresh and any(isinstance(m, BatchNorm) for m in self.modules()):
            self.refresh_statistics()

    def refresh_statistics(self) -> None:
        """Measures batch statistics anew on `refresh` training batches of an epoch that training did not see."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(self.current_epoch + 1)
        batches = (self.input_of(self.transfer_batch_to_device(batch, self.device, 0)) for batch in loader)
        used = refresh_statistics(
            self.measured, (batch for batch, _ in zip(batches, range(self.refresh), strict=False))
        )
        rank_zero_info(f"batch statistics measured anew on {used} batches")

    def input_of(self, batch: Any) -> Tensor:
        """What the model takes of a batch."""
        raise TypeError(f"{type(self).__name__} has no input_of")


def adapted(start: Checkpoint, choices: dict[str, Any], name: str) -> nn.Module:
    """The checkpoint's model with some fields of its config replaced; only its head may be new.

    ValueError where a choice changes any other weight.
    """
    config: BlockConfig = start.model.config  # pyright: ignore[reportAssignmentType]
    known = [field.name for field in fields(config)]
    if unknown := [choice for choice in choices if choice not in known]:
        raise ValueError(f"model.backbone has no field '{unknown[0]}'; it has: {', '.join(known)}")
    wanted = replace(config, **choices)
    if wanted == config:
        return start.model
    if start.config["fused"]:
        raise ValueError(f"{name} is fused, and a fused model keeps its config; start from the unfused one")
    model = wanted.build()
    state = start.model.state_dict()
    own = model.state_dict()
    fresh = [key for key in own if key not in state or own[key].shape != state[key].shape]
    if other := [key for key in fresh if not key.startswith("head")]:
        raise ValueError(f"{name} has no weights for '{other[0]}' of the model that model.backbone asks for")
    model.load_state_dict({key: value for key, value in state.items() if key in own and key not in fresh}, strict=False)
    if fresh:
        rank_zero_info(f"started from {name} with a new head")
    return model
