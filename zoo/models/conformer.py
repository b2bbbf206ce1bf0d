"""Speech encoders: Conformer (Gulati et al. 2020, arXiv:2005.08100), Squeezeformer (Kim et al. 2022, arXiv:2206.00888)
and Fast Conformer (Rekesh et al. 2023, arXiv:2305.05084), with a CTC or an RNN-T head."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import keep
from zoo.heads import SPEECH_HEADS
from zoo.layer import Carry, Chunks, Context, Fold, Layer, halved
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.conformer_config import ConformerConfig
from zoo.models.rates import Reduce, Strided
from zoo.models.streaming import Stream
from zoo.norms import NORMS, Norm
from zoo.spec import make
from zoo.stems import SUBSAMPLINGS
from zoo.tensors import check_floats, compiling, like, linear, mask_of


class Encoded(NamedTuple):
    """Tokens [B, T', dim] with their Context, and the number of valid ones of each clip, or None for all."""

    tokens: Tensor
    context: Context
    lengths: Tensor | None


class Conformer(Model[ConformerConfig]):
    """model(features [B, T, mels], lengths [B] or None) -> (logits [B, T', vocabulary], lengths [B]).

    lengths has the valid frames of each clip, None for all; later frames change nothing. Without a head
    (vocabulary = 0), and with an RNN-T head, the first output is the encoder's tokens [B, T', dim]; `model.head` then
    makes logits of them and of targets.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__(config)
        first = config.block()
        self.stem = make(SUBSAMPLINGS, config.subsampling, config.mels, config.dim, field="subsampling")
        self.scale = math.sqrt(config.dim) if config.scale_input else 1.0
        self.position = make_position(config)
        self.first: Norm | None = make(NORMS, first.norm, config.dim, first.place) if config.first_norm else None
        self.blocks = nn.ModuleList(
            Strided(config.at(index), config.block(config.strided.index(index) + 1), rate)
            if index in config.strided
            else make_block(config, *config.stage_of(index), rate)
            for index, rate in enumerate(drop_rates(config.drop_path, config.depth))
        )
        self.reduce = Reduce(config.dim, config.reduce_left) if config.unet else None
        self.recover = linear(config.dim, config.dim) if config.unet else None
        self.head = None
        if config.vocabulary:
            self.head = make(SPEECH_HEADS, config.head, config.width, config.vocabulary, field="head")
        self.name_layers()

    @property
    def strides(self) -> list[int]:
        strides, stride = [], 2**self.stem.stages
        for index, block in enumerate(self.blocks):
            halved = self.reduce is not None and self.config.reduced <= index < self.config.depth - 1
            stride *= block.stride  # pyright: ignore[reportOperatorIssue]
            strides.append(2 * stride if halved else stride)
        return strides

    @property
    def channels(self) -> list[int]:
        stages = [sum(block <= index for block in self.config.strided) for index in range(self.config.depth)]
        return [self.config.stages[stage].dim for stage in stages]

    def embed(self, features: Tensor, lengths: Tensor | None, visible: Chunks | None = None) -> tuple[Tensor, Context]:
        """Tokens after the subsampling, and the Context of the first blocks."""
        if features.ndim != 3 or features.shape[2] != self.config.mels:
            raise ValueError(f"features must be [B, T, {self.config.mels}], got {list(features.shape)}")
        check_floats(features, "features")
        mask = None
        if lengths is not None:
            if lengths.shape != features.shape[:1]:
                raise ValueError(f"lengths must have one number per clip, got shape {list(lengths.shape)}")
            known = lengths.device.type == "cpu" and not compiling()
            if known and bool((lengths > features.shape[1]).any()):
                raise ValueError(f"a clip of {int(lengths.max())} frames does not fit features {list(features.shape)}")
            # If it costs nothing to know, clips without padding skip the masks.
            if not known or self.training or bool((lengths < features.shape[1]).any()):
                mask = mask_of(lengths, features.shape[1])
        x, mask = self.stem(features, mask)
        context = self.position.place(Context(grid=(x.shape[1],), mask=mask, carry=Carry()))
        return self.start(x, context), context._replace(visible=self.chunks(visible))

    def chunks(self, visible: Chunks | None) -> Chunks | None:
        """The chunks to work in, those of the config or, in a model that has some, others."""
        if visible is None:
            return self.config.visible
        if self.config.chunk is None:
            raise ValueError("visible: this model does not work in chunks; its config has no chunk")
        if visible.chunk < 1 or visible.left < 0 or visible.left % visible.chunk:
            raise ValueError(f"visible: chunk must be >= 1 and divide left, got {visible}")
        return visible

    def start(self, x: Tensor, context: Context) -> Tensor:
        x = self.position(x * self.scale if self.scale != 1.0 else x, context)
        x = F.dropout(x, self.config.dropout, self.training)
        return x if self.first is None else self.first(x, context)

    def encode(
        self,
        features: Tensor,
        lengths: Tensor | None = None,
        visible: Chunks | None = None,
        layers: Sequence[int] | None = None,
    ) -> list[Encoded]:
        """The outputs of the given blocks (the last if None; -1 is the last), each at its own frame rate.

        visible replaces the chunks of the config, for a model that has some.
        """
        wanted = chosen_layers((-1,) if layers is None else layers, self.config.depth, "block")
        x, context = self.embed(features, lengths, visible)
        real = None if lengths is None else self.stem.tokens(lengths)
        saved, made = (x, context, real), []
        for index, block in enumerate(self.blocks):
            if self.reduce is not None and index == self.config.reduced:
                saved = (x, context, real)
                x, context = self.reduce(x, context)
                context = self.position.place(context)
                real = None if real is None else (real + 1) // 2
            if self.recover is not None and index == self.config.depth - 1:
                twice = torch.arange(saved[0].shape[1], device=x.device) // 2
                x = saved[0] + self.recover(x.index_select(1, twice))
                context, real = saved[1:]
            x = self.run((block,), x, context)
            if block.stride == 2:
                context = halved(context)
                real = None if real is None else (real + 1) // 2
            made.append(Encoded(x, context, real))
        return [made[layer] for layer in wanted]

    def features(
        self, inputs: Tensor, layers: Sequence[int] | None = None, lengths: Tensor | None = None
    ) -> list[Tensor]:
        """The tokens after the given blocks (all if None; -1 is the last), not normalized, as maps [B, C, T'] at
        `strides`, of log-mel features [B, T, mels]."""
        wanted = range(self.config.depth) if layers is None else layers
        return [each.tokens.transpose(1, 2) for each in self.encode(inputs, lengths, layers=wanted)]

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, visible: Chunks | None = None
    ) -> tuple[Tensor, Tensor]:
        """features [B, T, mels] and lengths [B] -> logits [B, T', vocabulary], or tokens [B, T', dim], and lengths."""
        x, _, real = self.encode(features, lengths, visible)[0]
        if real is None:
            real = torch.full((x.shape[0],), self.tokens(features.shape[1]), dtype=torch.long, device=x.device)
        return self.logits(x), real

    def logits(self, tokens: Tensor) -> Tensor:
        """A CTC head's logits of tokens; without one the tokens."""
        return self.head(tokens) if self.head is not None and self.head.framewise else tokens

    def tokens(self, lengths: Any) -> Any:
        """The number of tokens of this many frames, for a number or a tensor of them."""
        lengths = self.stem.tokens(lengths)
        for _ in self.config.strided:
            lengths = (lengths + 1) // 2
        return lengths

    def state(self, batch: int, visible: Chunks | None = None) -> dict[str, Tensor]:
        """The memory of a stream before its first chunk: a dict of tensors of fixed sizes."""
        visible = self.chunks(visible)
        if visible is None:
            raise ValueError("this model cannot stream; its config has no chunk")
        kind = like(self)
        cache = self.stem.state(batch, kind)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                cache |= {f"{name}.{slot}": tensor for slot, tensor in module.state(batch, visible, kind).items()}
        return cache

    def step(self, features: Tensor, mask: Tensor, cache: dict[str, Tensor], visible: Chunks) -> Tensor:
        """The logits [B, chunk, vocabulary] of the next chunk [B, stride * chunk, mels]; cache is changed in place.

        The first chunk begins with stride - 1 frames that the mask [B, stride * chunk] marks as padding, as the
        last one is padded at its end.
        """
        x, mask = self.stem(features, mask, cache)
        context = self.position.place(Context(grid=(visible.left + x.shape[1],)))
        context = context._replace(grid=(x.shape[1],), mask=mask, visible=visible, cache=cache, carry=Carry())
        return self.logits(self.run(self.blocks, self.start(x, context), context))

    def stream(self, batch: int = 1, visible: Chunks | None = None) -> Stream:
        """Takes features in pieces of any size and gives logits as soon as a chunk is complete."""
        return Stream(self, batch, self.chunks(visible))

    def no_weight_decay(self) -> set[str]:
        ends = ("position.table", ".content", ".offset")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        return {
            "stem": r"^(?:stem|first|position)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:reduce|recover)", (99999,))],
        }

    def fold(self) -> list[Fold]:
        """Folds the norm at the end of the last block into a CTC head, its only reader."""
        done = [] if self.first is None else [keep(self, "first", "the stream reads it")]
        if self.head is not None and self.head.framewise:
            last: Any = self.blocks[-1]
            name = f"blocks.{self.config.depth - 1}."
            done += [fold._replace(layer=name + fold.layer) for fold in last.fold_last(self.head, "the head")]
        return done
