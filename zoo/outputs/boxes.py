"""Objects of images: what a detector is trained on."""

from typing import NamedTuple

from torch import Tensor


class Truth(NamedTuple):
    """The objects of a batch, padded to the number of the image with most of them.

    Boxes are (centre x, centre y, width, height) in 0..1 of each image's own extent, without its padding.
    """

    labels: Tensor  # [B, G] int64, the index of a class
    boxes: Tensor  # [B, G, 4] float32
    valid: Tensor  # [B, G], True on real objects
