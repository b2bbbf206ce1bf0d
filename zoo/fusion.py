"""Folds layers that are affine at inference into their neighbours, exactly."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.layer import Fold, Layer
from zoo.norms import Affine, Norm
from zoo.tensors import fingerprint

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
    """The norm as a plain affine map if it is one at inference, else itself."""
    if isinstance(norm, Affine) or (affine := norm.affine()) is None:
        return norm
    layer = Affine(len(affine[0])).to(affine[0])
    with torch.no_grad():
        layer.weight.copy_(affine[0])
        layer.bias.copy_(affine[1])
    return layer


def not_affine(norm: Norm) -> str:
    return f"{type(norm).__name__} is not affine"


def fold_site(
    layer: nn.Module, site: str, target: nn.Linear | nn.Conv1d | nn.Conv2d, rows: slice = slice(None)
) -> list[Fold]:
    """Folds the norm in a site after a linear or a convolution into those of its rows that the norm follows."""
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
    """Leaves a norm where it is, as a plain affine map if it is one."""
    setattr(layer, site, plain(getattr(layer, site)))
    return Fold(site, None, reason)


def fold_residual(residual: Any) -> list[Fold]:
    """Folds the affine layers in a residual of block.py into the linears of its branch."""
    done = [fold for leaf in residual.leaves for fold in _fold_inner(residual, leaf)]
    if isinstance(residual.before, Norm):
        done.append(_fold_before(residual, residual.before))
    if isinstance(residual.after, Norm):
        done.append(_fold_behind(residual, "after", residual.after.affine()))
    if residual.layer_scale is not None:
        if residual.channel is not None:
            done.append(Fold("layer_scale", None, "channel attention is between it and the branch"))
        elif residual.after is not None:
            done.append(Fold("layer_scale", None, "a norm is between it and the branch"))
        else:
            scale = residual.layer_scale.detach()
            done.append(_fold_behind(residual, "layer_scale", (scale, torch.zeros_like(scale))))
    if isinstance(residual.total, Norm):
        done.append(keep(residual, "total", "the stream reads it"))
    return done


def _fold_inner(residual: Any, leaf: Layer) -> list[Fold]:
    norm, outputs = getattr(leaf, "inner", None), leaf.outputs()
    if not isinstance(norm, Norm) or isinstance(outputs, str):
        return []
    name = "branch.inner" if leaf is residual.branch else f"branch.branches.{residual.leaves.index(leaf)}.inner"
    if (affine := norm.affine()) is None:
        return [Fold(name, None, not_affine(norm))]
    fold_in(outputs[0], *affine)
    setattr(leaf, "inner", None)  # noqa: B010
    return [Fold(name, "the output linear")]


def _fold_before(residual: Any, norm: Norm) -> Fold:
    inputs = residual.branch.inputs()
    if (affine := norm.affine()) is None:
        return Fold("before", None, not_affine(norm))
    if residual.stream:
        return keep(residual, "before", "the stream reads it")
    if residual.modulation is not None:
        return keep(residual, "before", "the modulation reads it")
    if residual.adds_code and any("code" in leaf.reads for leaf in residual.leaves):
        return keep(residual, "before", "the branch adds code before its linear")
    if isinstance(inputs, str):
        return keep(residual, "before", inputs)
    for layer in inputs:
        fold_in(layer, *affine)
    residual.before = None
    return Fold("before", "the branch's input linears")


def _fold_behind(residual: Any, site: str, affine: tuple[Tensor, Tensor] | None) -> Fold:
    outputs = residual.branch.outputs()
    norm = getattr(residual, site)
    if affine is None:
        return Fold(site, None, not_affine(norm))
    if isinstance(outputs, str):
        return keep(residual, site, outputs) if isinstance(norm, Norm) else Fold(site, None, outputs)
    scale, shift = affine
    for number, layer in enumerate(outputs):
        fold_out(layer, scale, shift if number == 0 else torch.zeros_like(shift))
    setattr(residual, site, None)
    return Fold(site, "the branch's output linears")


def fold_last(steps: nn.ModuleList, reader: nn.Linear, into: str) -> list[Fold]:
    """Folds the norm at the end of a block of these steps into its only reader, a linear called `into`."""
    number, last = len(steps) - 1, steps[-1]
    alone = isinstance(last, Norm)
    norm: Any = last if alone else getattr(last, "total", None)
    if not isinstance(norm, Norm) or (affine := norm.affine()) is None:
        return []
    fold_in(reader, *affine)
    if alone:
        del steps[-1]
        return [Fold(f"steps.{number}", into)]
    setattr(last, "total", None)  # noqa: B010
    return [Fold(f"steps.{number}.total", into)]


def fold_norm(owner: nn.Module, site: str, reader: nn.Linear | None, into: str) -> list[Fold]:
    """Folds the norm in a site into its only reader, a linear called `into`, if there is one."""
    norm = getattr(owner, site)
    if not isinstance(norm, Norm):
        return []
    if (affine := norm.affine()) is None:
        return [Fold(site, None, not_affine(norm))]
    if reader is None:
        return [keep(owner, site, f"the model has no {into}")]
    fold_in(reader, *affine)
    setattr(owner, site, None)
    return [Fold(site, f"the {into}")]


def fuse(model: Model) -> Model:
    """A copy in eval mode whose affine norms and scales are folded into the layers beside them; outputs stay the same.

    `model.fusion` of the copy lists, for each layer, what it went into or why it stayed. ValueError while a blend of
    prepbn is above 0, and for a quantized model. A fused model is for inference; it can be saved and loaded, and not
    trained further.
    """
    if quantized := [name for name, each in model.named_modules() if callable(getattr(each, "weight", None))]:
        raise ValueError(
            f"'{quantized[0]}' is quantized and cannot be folded into; fuse the model before quantizing it"
        )
    model = copy.deepcopy(model).eval()
    origin: Any = getattr(model, "origin", None)
    if origin is not None and origin.weights != fingerprint(model):
        origin = None
    report: list[Fold] = []
    for name, module in list(model.named_modules()):
        step: Callable[[], list[Fold]] | None = getattr(module, "fold", None)
        if step is not None:
            prefix = f"{name}." if name else ""
            report += [Fold(prefix + fold.layer, fold.into, fold.reason) for fold in step()]
    object.__setattr__(model, "fusion", report)
    if origin is not None:
        object.__setattr__(model, "origin", origin._replace(weights=fingerprint(model)))
    return model
