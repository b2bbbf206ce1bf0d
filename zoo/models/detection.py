"""What detectors share: the predictions of queries."""

from typing import NamedTuple

from torch import Tensor


class Predicted(NamedTuple):
    """Predictions of queries. Boxes are (centre x, centre y, width, height) in 0..1 of each image's own extent."""

    logits: Tensor  # [..., B, Q, classes]
    boxes: Tensor  # [..., B, Q, 4]


class Noised(NamedTuple):
    """Denoising queries: the labels and boxes of objects, with noise (DN-DETR, Li et al. 2022, arXiv:2203.01305).

    They come in groups that do not see each other. `Truth` objects g = 0 .. G - 1 stand in each group twice: with
    little noise at g, with much at G + g (contrastive denoising, DINO, Zhang et al. 2023, arXiv:2203.03605).
    """

    labels: Tensor  # [B, groups * 2 G] int64, the index of a class
    boxes: Tensor  # [B, groups * 2 G, 4]
    valid: Tensor  # [B, groups * 2 G], False where an image has fewer than G objects
    groups: int


class Trained(NamedTuple):
    """What a detector predicts in training, for its losses."""

    layers: Predicted  # after each decoder layer: [L, B, Q, ...]
    proposals: Predicted | None  # of the tokens that the queries start from: [B, Q, ...]
    noised: Predicted | None  # of the denoising queries after each decoder layer: [L, B, groups * 2 G, ...]
