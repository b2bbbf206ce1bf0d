"""A loss that brings the tokens of a model in training close to the features of a frozen teacher."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import Context
from zoo.models.trunk import Trunk
from zoo.tensors import to_map, to_tokens, zeroed
from zoo.weights.trunks import load_trunk


@contextmanager
def watched(block: nn.Module) -> Iterator[list[tuple[Tensor, Context]]]:
    """The outputs of a block while this is open, with their Contexts."""
    seen: list[tuple[Tensor, Context]] = []
    hook = block.register_forward_hook(lambda _, inputs, output: seen.append((output, inputs[1])))  # pyright: ignore
    try:
        yield seen
    finally:
        hook.remove()


class Alignment(nn.Module):
    """1 - the cosine similarity of projected tokens and a frozen teacher's features at the same places, the mean over
    real tokens (REPA, Yu et al. 2024, arXiv:2410.06940; for detectors, as in RT-DETRv4).

    The projection is three linear layers with SiLU between them. The teacher is no part of the module: it is not
    trained, and not saved with a run.

    Args:
        dim: channels of the tokens.
        teacher: an image model with maps, of which the last is taken: a preset of the zoo, or timm:NAME.
        weights: its weights, as for `zoo.weights.trunks.load_trunk`; None for random ones.
        channels: channels of the images.
        image: side of the images in pixels, for a teacher's weights that depend on it.
        hidden: channels inside the projection.

    Raises:
        ValueError: the teacher is unknown, or the weights are those of another model.
    """

    def __init__(
        self, dim: int, teacher: str, weights: str | None, channels: int = 3, image: int = 224, hidden: int = 512
    ) -> None:
        super().__init__()
        frozen = Trunk(teacher, channels, image, ())
        if weights is not None:
            load_trunk(frozen, weights, channels)
        self._teacher = (frozen.eval().requires_grad_(False),)  # a tuple hides it from parameters and state dicts
        sizes = [(dim, hidden), (hidden, hidden), (hidden, frozen.channels[0])]
        layers = [each for size in sizes for each in (nn.Linear(*size), nn.SiLU())]
        self.project = nn.Sequential(*layers[:-1])

    def forward(
        self, tokens: Tensor, grid: tuple[int, ...], mask: Tensor | None, images: Tensor, pixels: Tensor | None = None
    ) -> Tensor:
        """The loss of tokens [B, H W, dim] on a grid (H, W).

        Args:
            tokens: of the model in training.
            grid: their height and width.
            mask: which of them are real [B, H W]; None if all are.
            images: what both models see [B, channels, height, width], its sides multiples of the strides of both.
            pixels: which pixels are real [B, height, width]; None if all are.

        Raises:
            ValueError: a side is not a multiple of the teacher's stride.
        """
        (teacher,) = self._teacher
        stride = teacher.strides[-1]
        if any(side % stride for side in images.shape[2:]):
            sides = " x ".join(map(str, images.shape[2:]))
            raise ValueError(f"teacher '{teacher.name}' has the stride {stride}, which does not divide {sides} pixels")
        with torch.no_grad():
            ((wanted, context),) = teacher.to(images.device)(images.float(), pixels)
            wanted = zeroed(wanted, context.mask).float()  # what padding adds to a mean would turn it
            maps = F.interpolate(to_map(wanted, context.grid), size=grid, mode="bilinear", antialias=True)
        similar = F.cosine_similarity(self.project(tokens).float(), to_tokens(maps), dim=-1)
        if mask is None:
            return 1.0 - similar.mean()
        return ((1.0 - similar) * mask).sum() / mask.sum().clamp(min=1)
