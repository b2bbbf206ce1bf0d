"""Attention maps: the weights of each layer, and what the last tokens attend to through all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.base import noting


def maps(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, Tensor]:
    """The attention weights of every layer that has explicit ones, from one forward in eval mode without gradients.

    Weights have the shape [B, heads, queries, keys], prefix tokens first, and their keys are the paths of the layers in
    the model. Rows sum to one where the mixer's weights do. Rows of padded queries mean nothing. Those of `grouped`
    are between groups of frames, and those of `moa` are of each token's chosen experts, the most probable first. A
    mixer without weights, such as linear attention, gives none.

    Args:
        model: a model of the zoo.
        inputs, named: the arguments of its forward.

    Raises:
        ValueError: no layer of the model has explicit weights.
    """
    training = [part for part in model.modules() if part.training]
    try:
        with noting(model.eval()) as notes, torch.no_grad():
            model(*inputs, **named)
    finally:
        for part in training:
            part.training = True
    end = ".weights"
    found = {name.removesuffix(end): value for name, value in notes.items() if name.endswith(end)}
    if not found:
        raise ValueError("no layer of this model has explicit attention weights; a model with mixer 'softmax' has some")
    return found


def rollout(weights: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """How much each token of the last layer depends on each token before the first one, by its attention weights alone:
    the product over the layers of residual * 1 + (1 - residual) * A, where A is the mean over the heads (Abnar and
    Zuidema 2020, arXiv:2005.00928).

    Args:
        weights: [B, heads, N, N] of each layer, from the first to the last. Negative weights count by their size.
        residual: the share of the residual connection.

    Returns:
        [B, N, N], whose rows sum to one; with residual=0 zeros for a token without weights.
    """
    if not weights or any(
        each.shape[-2:] != weights[0].shape[-2:] or each.shape[-1] != each.shape[-2] for each in weights
    ):
        shapes = ", ".join(str(list(each.shape)) for each in weights) or "none"
        raise ValueError(f"rollout needs weights [B, heads, N, N] of the same tokens, got {shapes}")
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual must be from 0 to 1, got {residual}")
    same = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    product = same
    for each in weights:
        mean = each.abs().mean(1)
        mean = mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)
        product = (residual * same + (1 - residual) * mean) @ product
    return product / product.sum(-1, keepdim=True).clamp(min=1e-12)
