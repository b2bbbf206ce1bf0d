"""Random predictions of a detector, in which gradients end."""

import torch
from torch import Tensor

from helpers import random_boxes
from zoo.models.detection import Predicted, Tokens
from zoo.outputs.boxes import Truth

CLASSES, QUERIES, LAYERS = 5, 9, 3


def predictions(*shape: int, classes: int = CLASSES) -> Predicted:
    return Predicted((2 * torch.randn(*shape, classes) - 1).requires_grad_(), random_boxes(*shape).requires_grad_())


def all_tokens(truth: Truth, real: Tensor | None = None) -> Tokens:
    """Predictions of 40 tokens, half of whose anchors are near objects."""
    images, most = truth.labels.shape
    anchors = random_boxes(images, 40)
    if most:
        near = truth.boxes[:, torch.arange(20) % most] * (1 + 0.15 * torch.randn(images, 20, 4))
        anchors[:, 20:] = near.where(near.sum(-1, keepdim=True) > 0, anchors[:, 20:])
    return Tokens(predictions(images, 40), anchors, real)
