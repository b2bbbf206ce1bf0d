"""Routing of tokens to experts without a capacity: the experts that each token chooses, the products of each expert
with its own tokens, and the losses that keep a router healthy."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from zoo.tensors import compiling, single, unmixed


class Routes(NamedTuple):
    """The `top` experts of each token. A token has one slot for each of them, the most probable first."""

    experts: Tensor  # [B, N, top]
    gates: Tensor  # [B, N, top], their probabilities in at least fp32; 0 on padded tokens
    probabilities: Tensor  # [B, N, E], of all experts


class Grouped(NamedTuple):
    """The slots of real tokens, ordered by expert, and by token for the same expert."""

    slots: Tensor  # [M], places in [B * N * top]
    sizes: list[int]  # how many of them each expert has


def logits_of(router: nn.Linear, x: Tensor) -> Tensor:
    """The logits [B, N, E] of tokens, computed in the dtype of the router's weights even in mixed precision, since a
    rounded logit may choose another expert (Fedus et al. 2021, arXiv:2101.03961). They are at least fp32."""
    with unmixed(x):
        logits = router(x if callable(router.weight) else x.to(router.weight.dtype))
    return single(logits)


def route(logits: Tensor, top: int, mask: Tensor | None = None) -> Routes:
    """The most probable experts of each token by logits [B, N, E]; mask [B, N] is True on real tokens."""
    probabilities = logits.softmax(-1)
    gates, experts = probabilities.topk(top, -1)
    if mask is not None:
        gates = gates.masked_fill(~mask[..., None], 0.0)
    return Routes(experts, gates, probabilities)


def balance_loss(routes: Routes, mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e p_e, with f_e the share of expert e in all choices of real tokens and p_e its mean probability: 1
    if the experts are used alike, E / top if all tokens are sure of the same ones (Fedus et al. 2021,
    arXiv:2101.03961)."""
    number, top = routes.probabilities.shape[-1], routes.experts.shape[-1]
    chosen = F.one_hot(routes.experts, number).sum(-2)
    return number * (_mean(chosen, mask, routes) / top * _mean(routes.probabilities, mask, routes)).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over real tokens of the squared log-sum-exp of logits [B, N, E], which keeps them small (Zoph et al.
    2022, arXiv:2202.08906)."""
    squares = logits.logsumexp(-1).square()
    if mask is None:
        return squares.sum() / max(1, squares.numel())
    return squares.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _mean(x: Tensor, mask: Tensor | None, routes: Routes) -> Tensor:
    """The mean of x [B, N, E] over real tokens: [E]."""
    x = x.to(routes.probabilities.dtype)
    if mask is None:
        return x.sum((0, 1)) / max(1, x.shape[0] * x.shape[1])
    return x.masked_fill(~mask[..., None], 0.0).sum((0, 1)) / mask.sum().clamp(min=1)


def spread(values: Tensor, experts: Tensor, number: int) -> Tensor:
    """Values [B, N, top, C] of each token's experts [B, N, top] among all of them, [B, N, number, C], 0 for others."""
    wide = values.new_zeros(*values.shape[:2], number, values.shape[-1])
    return wide.scatter(2, experts[..., None].expand_as(values), values)


def every_expert(*layers: nn.Linear) -> bool:
    """Whether linears of all experts are applied to all tokens, so that no size depends on a value: in a compiled or
    exported program, where quantization has replaced their weights, and for tensors that have only a shape."""
    return compiling() or any(callable(layer.weight) or isinstance(layer.weight, FakeTensor) for layer in layers)


def grouped(experts: Tensor, number: int, mask: Tensor | None = None) -> Grouped:
    """The slots of real tokens by expert, of experts [B, N, top] among `number`. It waits for an accelerator."""
    if mask is not None:
        experts = experts.masked_fill(~mask[..., None], number)
    flat = experts.flatten()
    sizes = flat.bincount(minlength=number + 1).tolist()[:number]
    return Grouped(flat.argsort(stable=True)[: sum(sizes)], sizes)


def apart(rows: Tensor, weights: Tensor, biases: Tensor | None, sizes: list[int]) -> Tensor:
    """Each expert's linear on its own rows [M, C], which are ordered by expert: [M, D]. weights [E, D, C], biases
    [E, D]."""
    shifts = [None] * len(sizes) if biases is None else biases.unbind()
    parts = zip(rows.split(sizes), weights.unbind(), shifts, strict=True)
    return torch.cat([F.linear(*part) for part in parts])


def to_slots(rows: Tensor, found: Grouped, shape: torch.Size) -> Tensor:
    """Rows [M, C] that are ordered by expert, in their slots: [*shape, C], 0 on padded tokens. Each slot is written
    once, so that a sum over them is the same in every run."""
    slots = rows.new_zeros(shape.numel(), rows.shape[-1]).index_copy(0, found.slots, rows)
    return slots.view(*shape, rows.shape[-1])
