"""Folding what is affine at inference into its neighbours, exactly."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from zoo.layer import Fold
from zoo.norms import Affine, Norm

Model = TypeVar("Model", bound=nn.Module)


def ensure_bias(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Tensor:
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return layer.bias


@torch.no_grad()
def fold_in(layer: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Makes layer(x) what layer(scale * x + shift) was."""
    ensure_bias(layer).add_(layer.weight @ shift)
    layer.weight.mul_(scale)


@torch.no_grad()
def fold_out(layer: nn.Linear | nn.Conv1d | nn.Conv2d, scale: Tensor, shift: Tensor, rows: slice = slice(None)) -> None:
    """Makes layer(x) what scale * layer(x) + shift was, for the given output rows."""
    bias = ensure_bias(layer)
    layer.weight[rows] *= scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias[rows] = bias[rows] * scale + shift


def plain(norm: Norm) -> Norm:
    """The norm as a plain affine map where inference makes it one, else itself."""
    if isinstance(norm, Affine) or (affine := norm.affine()) is None:
        return norm
    layer = Affine(len(affine[0])).to(affine[0])
    with torch.no_grad():
        layer.weight.copy_(affine[0])
        layer.bias.copy_(affine[1])
    return layer


def not_affine(norm: Norm) -> str:
    return f"{type(norm).__name__} is no affine map"


def fold_site(
    layer: nn.Module, site: str, target: nn.Linear | nn.Conv1d | nn.Conv2d, rows: slice = slice(None)
) -> list[Fold]:
    """Folds the norm in a site behind a linear or a convolution into those of its rows that the norm follows."""
    norm = getattr(layer, site)
    if not isinstance(norm, Norm):
        return []
    if (affine := norm.affine()) is None:
        return [Fold(site, None, not_affine(norm))]
    repeats = len(target.weight[rows]) // len(affine[0])
    fold_out(target, affine[0].repeat(repeats), affine[1].repeat(repeats), rows)
    setattr(layer, site, None)
    return [Fold(site, "the projection in front of it")]


def keep(layer: nn.Module, site: str, reason: str) -> Fold:
    """Leaves a norm where it is, as a plain affine map where it is one."""
    setattr(layer, site, plain(getattr(layer, site)))
    return Fold(site, None, reason)


def fuse(model: Model) -> Model:
    """A copy in eval mode whose affine norms and scales are folded into the layers beside them; outputs stay the same.

    `model.fusion` of the copy lists, for each layer, what it went into or why it stayed. ValueError while a blend of
    prepbn is above 0. A fused model is for inference; it can be saved and loaded, and not trained further.
    """
    model = copy.deepcopy(model).eval()
    report: list[Fold] = []
    for name, module in list(model.named_modules()):
        step: Callable[[], list[Fold]] | None = getattr(module, "fold", None)
        if step is not None:
            prefix = f"{name}." if name else ""
            report += [Fold(prefix + fold.layer, fold.into, fold.reason) for fold in step()]
    object.__setattr__(model, "fusion", report)
    return model
