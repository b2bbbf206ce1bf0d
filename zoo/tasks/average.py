"""The averaged copy of the weights."""

from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average(ModelEmaV3):
    """timm's averaged copy, for models that move between devices, are resumed, or are divided over ranks (FSDP2).

    In bfloat16 an update is rounded at random: here as a function of the step, so that a resumed run equals one that
    was never stopped, and on the device of the weights, in the part of each rank.

    Args:
        model: the model whose copy it keeps, in inference mode and without gradients.
        decay: share of the copy that a step keeps; less in the first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True, exclude_buffers=True)
        self.requires_grad_(False)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        device = next(self.module.parameters()).device
        self._sr_generator = torch.Generator(device).manual_seed(step or 0)
        super().update(model, step)

    def _foreach_lerp_(self, ema_values: list[Any], model_values: list[Any], weight: float) -> None:
        super()._foreach_lerp_([_own(each) for each in ema_values], [_own(each) for each in model_values], weight)


def _own(tensor: Any) -> Tensor:
    """The part of a divided tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
