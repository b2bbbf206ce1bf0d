"""What detectors share: the predictions of queries, padded images, heads and places of boxes.

Boxes are (centre x, centre y, width, height) in 0..1 of each image's own extent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.choices import BlockConfig
from zoo.config import ModelConfig, Size
from zoo.models.convolutional import TIMM
from zoo.norms import NORMS
from zoo.spec import Choice, check, parse
from zoo.stems.images import checked, padding_of
from zoo.tensors import exporting, relu
from zoo.text import unknown

TRUNK_NORMS = ("batch", "frozen")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(ModelConfig):
    """What the configs of detectors share. The choices of blocks that every family shares are those of the encoder;
    `cross` and the `decoder_` fields are those of the decoder.

    Args:
        trunk: image model that gives the maps: a preset of the zoo with any of its fields, or timm:NAME.
        trunk_norm: batch for norms of the trunk that learn from batches, frozen for those with running statistics to
            stay as they are, as usual for a pretrained trunk.
        dim: channels of tokens and queries.
        depth: number of decoder blocks.
        heads: attention heads of a block.
        image: side of the images in pixels, for weights that depend on it; any other size works too.
        channels: channels of the images.
        classes: number of classes.
        queries: number of queries.
        detection_nms: largest IoU of two detections of a class in an answer; 0.7 in DETA, 1 for all detections.
        encoder_depth: number of encoder blocks.
        decoder_mixer: self-attention of the queries.
        decoder_ffn: feed-forward layer of the decoder.
        decoder_norm: norm of the decoder.
    """

    task = "detect"
    input = "boxes"
    argument = "images"
    labels = "categories"
    provides = frozenset({"memory"})
    shown = ("trunk", *ModelConfig.shown, "cross", "queries", "classes")
    losses: ClassVar[tuple[str, ...]] = ("vfl", "mal", "focal", "ia_bce")  # of classes; the first is the usual one
    proposals: ClassVar[bool] = False  # whether queries start from tokens that are trained to propose objects
    decoder_writes: ClassVar[frozenset[str]] = frozenset({"memory", "code"})

    trunk: str
    trunk_norm: str = "batch"
    dim: int = 256
    depth: int = 6
    heads: int = 8
    image: int = 640
    channels: int = 3
    classes: int = 80
    queries: int = 300
    detection_nms: float = 1.0
    encoder_depth: int = 1
    decoder_mixer: str = "softmax"
    decoder_ffn: str = "mlp(activation='relu')"
    decoder_norm: str = "layernorm(eps=1e-05)"
    cross: str = "softmax"
    norm: Choice = "layernorm(eps=1e-05)"
    placement: Choice = "post"

    def check_sizes(self) -> None:
        for name in ("image", "channels", "classes", "queries", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.encoder_depth < 0:
            raise ValueError(f"encoder_depth must be >= 0, got {self.encoder_depth}")
        self.check_share("detection_nms")
        if self.trunk_norm not in TRUNK_NORMS:
            raise ValueError(f"trunk_norm: {unknown('name', self.trunk_norm, TRUNK_NORMS)}")
        if not self.trunk.startswith(TIMM):
            parse(self.trunk)
        self.check_rows({"decoder_norm": NORMS})

    def check_share(self, name: str) -> None:
        """ValueError if a field is not > 0 and <= 1."""
        if not 0.0 < getattr(self, name) <= 1.0:
            raise ValueError(f"{name} must be > 0 and <= 1, got {getattr(self, name)}")

    def check_rows(self, tables: Mapping[str, Mapping[str, type]]) -> None:
        """ValueError if a field does not name a row of its table."""
        for name, table in tables.items():
            try:
                check(table, getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @property
    def levels(self) -> int:
        """How many maps the decoder reads."""
        return 1

    @property
    def stride(self) -> int:
        """That of the map that the encoder reads."""
        return 32

    @property
    def words(self) -> list[str]:
        return [*super().words, "cross"]

    @property
    def stages(self) -> tuple[Size, ...]:
        return Size(self.dim, self.encoder_depth, self.heads), Size(self.dim, self.depth, self.heads)

    def grid(self, stage: int) -> tuple[int, ...]:
        side = -(-self.image // self.stride)
        return (side, side) if stage == 0 else (self.queries,)

    def path(self, stage: int, index: int) -> str:
        return f"{('encoder', 'decoder')[stage]}.{index}"

    def block(self, stage: int = 0, index: int = 0) -> BlockConfig:
        if stage == 0:
            return super().block(stage, index)
        place = replace(self.place(stage, index), axes=1, levels=self.levels, order=index, last=index == self.depth - 1)
        try:
            return BlockConfig(
                dim=self.dim,
                heads=self.heads,
                place=place,
                layout=("mixer", "cross", "ffn"),
                mixer=self.decoder_mixer,
                cross=self.cross,
                ffn=self.decoder_ffn,
                norm=self.decoder_norm,
                placement="post",
                dropout=self.dropout,
                writes=self.decoder_writes,
            )
        except ValueError as error:
            raise ValueError(f"decoder: {error}") from None

    @property
    def labelled(self) -> int:
        return self.classes

    @property
    def pipeline_tag(self) -> str:
        return "object-detection"

    def call(self, prepared: str) -> str:
        number = "classes + 1" if self.losses == ("softmax",) else "classes"
        return f"found = model({prepared})  # logits [B, queries, {number}] and boxes [B, queries, 4]"

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"images": torch.randn((1, self.channels, 96, 64), generator=generator, device="cpu")}


class Predicted(NamedTuple):
    """Predictions of queries."""

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


class Refined(NamedTuple):
    """The distributions by which decoder layers refine boxes (D-FINE, Peng et al. 2024, arXiv:2410.13842)."""

    bins: Tensor  # logits of the offsets of each side after each layer: [L, B, Q, 4, bins]
    first: Tensor  # the boxes that they refine [B, Q, 4]
    real: Tensor | None  # [B, Q], False for queries that an image has no token or object for; None if all are real
    offsets: Tensor  # of the bins [bins], in units of the width or height of `first` / scale
    scale: float


class Tokens(NamedTuple):
    """The predictions of all tokens that queries may start from."""

    predicted: Predicted  # [B, M, ...]
    anchors: Tensor  # the box around each token [B, M, 4]; 0 for a token that no query should start from
    real: Tensor | None  # [B, M], False on padding; None if all are real


class Trained(NamedTuple):
    """What a detector predicts in training, for its losses.

    Where boxes are refined by distributions, the first of the layers is their start, and the others belong to those of
    `refined`.
    """

    layers: Predicted  # after each decoder layer: [L, B, Q, ...]
    proposals: Predicted | None  # of the tokens that the queries start from: [B, Q, ...]
    noised: Predicted | None  # of the denoising queries after each decoder layer: [L, B, groups * 2 G, ...]
    refined: Refined | None = None  # of the layers
    refined_noised: Refined | None = None  # of the denoising queries
    tokens: Tokens | None = None  # where they were asked for


def xavier(inputs: int, outputs: int, bias: float = 0.0) -> nn.Linear:
    """A linear map with Xavier's uniform weights, and this bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def class_head(dim: int, classes: int) -> nn.Linear:
    """From a query to its class logits, all of which start near a probability of 0.01."""
    return xavier(dim, classes, -math.log((1 - 0.01) / 0.01))


class MLP(nn.Module):
    """`depth` linear maps with ReLU between them, `hidden` channels wide; with zero=True the result is 0 at first."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int, zero: bool = False) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(xavier(one, other) for one, other in zip(sizes[:-1], sizes[1:], strict=True))
        if zero:
            nn.init.zeros_(self.layers[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


def wide(x: Tensor) -> Tensor:
    """x in at least single precision, for boxes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logit(boxes: Tensor, eps: float = 1e-5) -> Tensor:
    """The inverse of the sigmoid, of values clamped to eps from 0 and 1."""
    boxes = boxes.clamp(0, 1)
    return torch.log(boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps))


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [1 or B, M, D] at index [B, Q]: [B, Q, D]."""
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def padded(images: Tensor, mask: Tensor | None, channels: int, stride: int) -> tuple[Tensor, Tensor | None]:
    """The images and the mask with sides that the stride divides, zeros and False at the right and the bottom. The
    mask is None if every pixel is real."""
    images = checked(images, mask, channels)
    padding = padding_of(images.shape[2:], stride)
    if not exporting() and not any(padding):
        return images, mask
    if mask is None:
        mask = torch.ones_like(images[:, 0], dtype=torch.bool)
    return F.pad(images, padding), F.pad(mask, padding)


def shares(mask: Tensor) -> Tensor:
    """How much of the width and of the height of each mask [B, H, W] is real: [B, 2] in 0..1."""
    return torch.stack([mask.any(1).float().mean(1), mask.any(2).float().mean(1)], -1)
