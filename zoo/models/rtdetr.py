"""RT-DETR on any trunk: a hybrid encoder, queries from the best tokens, a decoder that refines their boxes (Zhao et al.
2024, arXiv:2304.08069; RT-DETRv2, Lv et al. 2024, arXiv:2407.17140)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import CHANNELS
from zoo.config import Size
from zoo.kernels import suppressed
from zoo.layer import Carry, Context, Groups, Memory
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.detection import (
    MLP,
    DetectorConfig,
    Noised,
    Predicted,
    Refined,
    Tokens,
    Trained,
    class_head,
    gathered,
    padded,
    shares,
    wide,
)
from zoo.models.distribution import BOXES, Boxes, Delta, Distribution
from zoo.models.neck import NECKS, ConvNorm, Level, Neck
from zoo.models.trunk import Trunk
from zoo.norms import NORMS, LayerNorm
from zoo.spec import Choice, make, parse
from zoo.tensors import exporting, linear, to_map
from zoo.text import unknown

OUTSIDE = -30.0  # logit of a query that an image has no token for
TRIED = 10  # tokens that take part in non-maximum suppression, for each query
INVALID = 1e4  # logits of the anchor of a token that no query should start from


@dataclass(frozen=True, kw_only=True)
class RTDETRConfig(DetectorConfig):
    """A real-time detector: fields of every detector, and those of the neck and of the boxes.

    Args:
        trunk: image model with maps at these strides.
        strides: those of the maps, each twice the one before.
        encoder_dim: channels of the encoder and the neck, where they differ from dim; 0 for dim.
        encoder_depth: number of encoder blocks, on the coarsest map.
        neck: layers of the neck: `csp`, or `elan` as in D-FINE. With the latter, where the encoder has the decoder's
            channels, the decoder reads the maps of the neck as they are.
        neck_depth: RepVGG blocks in each CSP layer of the neck.
        neck_ratio: channels inside these layers, as a share of those of the encoder.
        neck_norm: norm behind every convolution of the neck.
        neck_channel: channel attention behind every layer of the neck.
        proposal_nms: largest IoU of the boxes of two tokens of a level that both become queries, if there are enough
            others; 0.9 in DETA, 1 for the tokens with the highest scores, whatever their boxes.
        box: how the decoder refines boxes: `delta`, or `distribution(bins=32, scale=4.0)` as in D-FINE.
        denoising: whether the model has an embedding of classes for denoising queries in training.
    """

    proposals = True
    decoder_writes = DetectorConfig.decoder_writes | {"mask", "visible"}

    strides: tuple[int, ...] = (8, 16, 32)
    encoder_dim: int = 0
    neck: str = "csp"
    neck_depth: int = 3
    neck_ratio: float = 1.0
    neck_norm: str = "batchnorm"
    neck_channel: str = "none"
    proposal_nms: float = 1.0
    box: str = "delta"
    denoising: bool = True
    cross: str = "deformable"
    position: Choice = "sine(extent=False)"

    def check_sizes(self) -> None:
        super().check_sizes()
        first = self.strides[0] if self.strides else 0
        if first < 1 or self.levels < 2 or self.strides != tuple(first * 2**level for level in range(self.levels)):
            raise ValueError(f"strides must be two or more, each twice the one before, got {self.strides}")
        for name in ("encoder_dim", "neck_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        self.check_share("proposal_nms")
        if not 0.0 < self.neck_ratio <= 8.0:
            raise ValueError(f"neck_ratio must be > 0 and <= 8, got {self.neck_ratio}")
        if self.neck not in NECKS:
            raise ValueError(f"neck: {unknown('name', self.neck, NECKS)}")
        self.check_rows({"neck_norm": NORMS, "neck_channel": CHANNELS, "box": BOXES})
        if NORMS[parse(self.decoder_norm)[0]].batch_statistics:
            able = ", ".join(other for other, row in NORMS.items() if not row.batch_statistics)
            raise ValueError(
                f"decoder_norm '{self.decoder_norm}' takes statistics over denoising queries, which inference does "
                f"not have; choose another ({able})"
            )

    @property
    def levels(self) -> int:
        return len(self.strides)

    @property
    def stride(self) -> int:
        return self.strides[-1]

    @property
    def stages(self) -> tuple[Size, ...]:
        encoder, decoder = super().stages
        return encoder._replace(dim=self.encoder_dim or self.dim), decoder

    def probe_outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores of all tokens, and what the decoder makes of a fixed choice of tokens."""
        assert isinstance(model, RTDETR)
        memory, anchors = model.encode(**inputs)
        scores, tokens = model.rank(memory, anchors)
        index = torch.linspace(0, scores.shape[1] - 1, min(self.queries, scores.shape[1])).long()[None]
        found, _ = model.decode(*model.start(tokens, anchors, index), memory)
        return {"scores": scores, "logits": found.logits[-1], "boxes": found.boxes[-1]}

    def build(self) -> "RTDETR":
        return RTDETR(self)


class RTDETR(Model[RTDETRConfig]):
    """model(images [B, channels, H, W], mask [B, H, W] | None) -> {"logits": [B, Q, classes], "boxes": [B, Q, 4]}.

    H and W are free; sides that the last stride does not divide are padded. Boxes are (centre x, centre y, width,
    height) in 0..1 of each image's own extent: padding and the other images of a batch change nothing at inference. An
    image with fewer tokens than queries has logits of -30 and boxes of 0 in the places of the missing ones.
    """

    replaceable = ("score", "noise")  # of `score` and `scores`

    def __init__(self, config: RTDETRConfig) -> None:
        super().__init__(config)
        dim, inside, first = config.dim, config.stages[0].dim, config.block().place
        self.trunk = Trunk(config.trunk, config.channels, config.image, config.strides, config.trunk_norm == "frozen")
        self.inputs = nn.ModuleList(
            ConvNorm(width, inside, config.neck_norm, place=first) for width in self.trunk.channels
        )
        self.position = make_position(config)
        rates = drop_rates(config.drop_path, config.encoder_depth)
        self.encoder = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(rates))
        hidden = max(1, int(inside * config.neck_ratio + 1e-6))  # rounded down, as published models have it
        neck = (config.neck, hidden, config.neck_depth, config.neck_norm, "silu", config.neck_channel)
        self.neck = Neck(inside, config.levels, *neck, place=first)
        self.levels = None
        if config.neck != "elan" or inside != dim:
            self.levels = nn.ModuleList(ConvNorm(inside, dim, config.neck_norm, place=first) for _ in config.strides)

        self.select, self.select_norm = linear(dim, dim), LayerNorm(dim, eps=1e-5)
        self.score, self.box = class_head(dim, config.classes), MLP(dim, dim, 4, 3, zero=True)
        self.query_code = MLP(4, 2 * dim, dim, 2)
        self.decoder = nn.ModuleList(make_block(config, 1, index, 0.0) for index in range(config.depth))
        self.scores = nn.ModuleList(class_head(dim, config.classes) for _ in range(config.depth))
        self.boxes: Delta | Distribution = make(BOXES, config.box, dim, config.depth, field="box")
        self.noise = nn.Embedding(config.classes, dim) if config.denoising else None

    @property
    def strides(self) -> list[int]:
        return [*self.config.strides]

    @property
    def channels(self) -> list[int]:
        return [self.config.stages[0].dim] * self.config.levels

    def features(self, images: Tensor, layers: Sequence[int] | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The maps behind the neck [B, C, H', W'] at the given levels (all if None; -1 is the coarsest): sides are
        those of the padded images, divided by `strides`."""
        wanted = chosen_layers(layers, self.config.levels, "level")
        levels = self.neck(self.mixed(*padded(images, mask, self.config.channels, self.config.stride)))
        return [to_map(levels[layer][0], levels[layer][1].grid) for layer in wanted]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """images [B, channels, H, W] and a mask [B, H, W] of real pixels -> logits [B, Q, classes], boxes [B, Q, 4]."""
        found = self.predict(images, mask).layers
        return {"logits": found.logits[-1], "boxes": found.boxes[-1]}

    def predict(
        self, images: Tensor, mask: Tensor | None = None, noised: Noised | None = None, tokens: bool = False
    ) -> Trained:
        """What the losses need: the predictions of every decoder layer, of the tokens that the queries start from, and
        of denoising queries; with tokens=True also those of all tokens. In eval mode, only those of the last layer, and
        of tokens with tokens=True."""
        memory, anchors = self.encode(images, mask)
        scores, starts = self.rank(memory, anchors)
        every = None
        if tokens or self.config.proposal_nms < 1.0:
            every = Predicted(scores, self.boxed(starts, anchors))
        index, real = self.best(scores, memory.mask, None if every is None else every.boxes.detach(), memory.grids)
        x, boxes = self.start(starts, anchors, index)
        proposals = hidden(Predicted(gathered(scores, index), boxes), real) if self.training or tokens else None
        asked = None
        if tokens and every is not None:
            around = anchors.sigmoid().where(anchors < INVALID, 0.0)
            asked = Tokens(every, around.expand_as(every.boxes), memory.mask)
        x, boxes = x.detach(), boxes.detach()
        if noised is None:
            found, refined = self.decode(x, boxes, memory, real)
            return Trained(found, proposals, None, refined, tokens=asked)
        assert self.noise is not None
        number = noised.labels.shape[1]
        x = torch.cat([self.noise(noised.labels).to(x.dtype), x], 1)
        boxes = torch.cat([noised.boxes.to(boxes.dtype), boxes], 1)
        kept = torch.ones_like(index, dtype=torch.bool) if real is None else real
        visible = Groups(noised.groups, number // noised.groups)
        found, refined = self.decode(x, boxes, memory, torch.cat([noised.valid, kept], 1), visible)
        parts = slice(number), slice(number, None)
        first, last = (Predicted(*(each[:, :, part] for each in found)) for part in parts)
        return Trained(last, proposals, first, part_of(refined, parts[1]), part_of(refined, parts[0]), asked)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> tuple[Memory, Tensor]:
        """The memory of the decoder, and each token's anchor box as logits [1 or B, M, 4]."""
        images, mask = padded(images, mask, self.config.channels, self.config.stride)
        levels = self.neck(self.mixed(images, mask))
        if self.levels is None:
            tokens = torch.cat([x for x, _ in levels], 1)
        else:
            tokens = torch.cat([each(x, place) for each, (x, place) in zip(self.levels, levels, strict=True)], 1)
        grids = tuple(place.grid for _, place in levels)
        real = extent = reach = None
        if mask is not None:
            real = torch.cat([place.mask for _, place in levels], 1)  # pyright: ignore
            extent = shares(mask)
            reach = extent[:, None].expand(-1, len(grids), -1)
        memory = Memory(tokens, real, None, grids, None, reach)
        return memory, anchors_of(grids, extent, tokens.device)

    def mixed(self, images: Tensor, mask: Tensor | None) -> list[Level]:
        """The levels of padded images in front of the neck, the coarsest one behind the encoder."""
        levels = self.trunk(images, mask)
        levels = [(each(x, context), context) for each, (x, context) in zip(self.inputs, levels, strict=True)]
        x, context = levels[-1]
        inside = self.position.place(context)
        return [*levels[:-1], (self.run(self.encoder, self.position(x, inside), inside), context)]

    def rank(self, memory: Memory, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The class logits [B, M, classes] of every token, and what the queries start from [B, M, D]."""
        usable = (anchors < INVALID).all(-1, keepdim=True)
        tokens = self.select(memory.tokens * usable.to(memory.tokens.dtype))
        tokens = self.select_norm(tokens, Context(grid=(tokens.shape[1],)))
        return self.score(tokens), tokens

    def best(
        self, scores: Tensor, mask: Tensor | None, boxes: Tensor | None = None, grids: Sequence[tuple[int, ...]] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens with the highest scores [B, Q], and which of them are real [B, Q]; None if all are.

        With `proposal_nms`, by the boxes of all tokens [B, M, 4] and the grids of the levels, tokens whose boxes
        overlap better ones come behind all others.
        """
        ranks = scores.detach().amax(-1)
        if mask is not None:
            ranks = ranks.masked_fill(~mask, -torch.inf)
        if self.config.proposal_nms < 1.0 and boxes is not None:
            levels = torch.cat([ranks.new_full(grid, index).flatten() for index, grid in enumerate(grids)]).long()
            corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
            limits = self.config.proposal_nms, TRIED * self.config.queries
            ranks = suppressed(corners.clamp(0.0, 1.0), ranks, levels.expand_as(ranks), *limits)
        # An exported program takes any number of tokens, so it always adds some.
        missing = self.config.queries if exporting() else self.config.queries - ranks.shape[1]
        if missing > 0:
            ranks = F.pad(ranks, (0, missing), value=-torch.inf)
        top = ranks.topk(self.config.queries, 1)
        if mask is None and missing <= 0:
            return top.indices, None
        return top.indices.clamp(max=scores.shape[1] - 1), top.values > -torch.inf

    def start(self, tokens: Tensor, anchors: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The first queries [B, Q, D] and their boxes [B, Q, 4] from the tokens at `index`."""
        chosen = gathered(tokens, index)
        return chosen, self.boxed(chosen, gathered(anchors, index))

    def boxed(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """The boxes that tokens propose [B, N, 4]."""
        return (wide(self.box(tokens)) + anchors).sigmoid()

    def decode(
        self, x: Tensor, boxes: Tensor, memory: Memory, mask: Tensor | None = None, visible: Groups | None = None
    ) -> tuple[Predicted, Refined | None]:
        """The predictions after each decoder block, [layers, B, Q, ...], from queries and boxes; in eval mode only the
        last ones. In training, distributions come with their own, and their start is one more prediction."""
        if mask is not None:
            boxes = torch.where(mask[..., None], boxes, 0.5)
        found: list[Predicted] = []
        steps: list[Boxes] = []
        last, carry = Boxes(boxes), Carry()
        for number, block in enumerate(self.decoder):
            fixed = last.boxes.detach()
            context = Context(
                grid=(x.shape[1],),
                mask=mask,
                code=self.boxes.coded(self.query_code(fixed.to(x.dtype))),
                memory=memory._replace(reference=fixed),
                visible=visible,
                carry=carry,
            )
            x = self.run((block,), x, context)
            last = self.boxes(number, x, last)
            if self.training or number + 1 == len(self.decoder):
                logits = self.scores[number](x)
                if self.training and number == 0 and last.first is not None:
                    found.append(Predicted(logits, last.first))
                found.append(Predicted(self.boxes.scored(number, logits, last), last.boxes))
                steps.append(last)
        predicted = hidden(Predicted(*(torch.stack(each) for each in zip(*found, strict=True))), mask)
        if not self.training or last.first is None or isinstance(self.boxes, Delta):
            return predicted, None
        bins = torch.stack([each.bins for each in steps if each.bins is not None])
        return predicted, Refined(bins, last.first.detach(), mask, self.boxes.offsets(bins), self.boxes.scale)


def part_of(refined: Refined | None, part: slice) -> Refined | None:
    """That of some of the queries."""
    if refined is None:
        return None
    real = None if refined.real is None else refined.real[:, part]
    return Refined(refined.bins[:, :, part], refined.first[:, part], real, refined.offsets, refined.scale)


def hidden(predicted: Predicted, mask: Tensor | None) -> Predicted:
    """The predictions with logits of OUTSIDE and boxes of 0 where the mask [B, Q] is False."""
    if mask is None:
        return predicted
    absent = ~mask[..., None]
    return Predicted(predicted.logits.masked_fill(absent, OUTSIDE), predicted.boxes.masked_fill(absent, 0.0))


def anchors_of(grids: tuple[tuple[int, ...], ...], extent: Tensor | None, device: torch.device) -> Tensor:
    """A box around each token as logits: its centre, and 0.05 times 2 to its level as width and height.

    Boxes that reach within 0.01 of an edge of the image, or beyond, have logits of INVALID.
    """
    parts = []
    for level, (rows, columns) in enumerate(grids):
        down = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        along = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        centre = torch.stack([along.expand(rows, -1), down[:, None].expand(-1, columns)], -1).flatten(0, 1)[None]
        if extent is not None:
            centre = centre / extent[:, None]
        parts.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2**level)], -1))
    anchors = torch.cat(parts, 1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return torch.where(inside, torch.special.logit(anchors.clamp(0.01, 0.99)), INVALID)
