"""Speech encoders: Conformer (Gulati et al. 2020, arXiv:2005.08100), Squeezeformer (Kim et al. 2022, arXiv:2206.00888)
and Fast Conformer (Rekesh et al. 2023, arXiv:2305.05084), with a CTC or an RNN-T head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.block import Block, drop_rates, run
from zoo.config import TABLES, BlockConfig
from zoo.fusion import fold_in, keep
from zoo.heads import SPEECH_HEADS, CTCHead
from zoo.layer import Chunks, Context, Fold, Layer, check, compiling, linear, make, mask_of, parse
from zoo.models.rates import Reduce, Strided
from zoo.norms import NORMS, Norm
from zoo.positions import POSITIONS
from zoo.streaming import Stream
from zoo.subsampling import SUBSAMPLINGS

CONFORMER = ("half", "mixer", "conv", "half", "norm")
SQUEEZEFORMER = ("mixer", "ffn", "conv", "ffn")


@dataclass(frozen=True, kw_only=True)
class ConformerConfig(BlockConfig):
    """A speech encoder and its head.

    vocabulary counts the outputs, the blank being the last; 0 leaves the head away. head is `ctc` or `transducer`.
    unet halves the frame rate before the block of index `reduce` (None: half the depth less one) and restores it
    before the last block; reduce_left is how many of the four frames around a kept one that the halving reads lie in
    front of it. first_norm puts a norm behind the subsampling. scale_input multiplies the tokens by sqrt(dim).
    strided names blocks whose convolution halves the frame rate for good and leads from one of widths, a number a
    stage, to the next; mixers has a mixer a stage then, where they differ (Efficient Conformer).
    chunk, in tokens, makes a model that streams: each token sees its own chunk and `left` tokens in front of the chunk,
    and convolutions are causal, so the look-ahead is chunk - 1 tokens. frames is the size of a table of `learned`
    positions.
    """

    axes = 1

    layout: tuple[str, ...] = CONFORMER
    mixer: str = "relative"
    ffn: str = "mlp(activation='silu')"
    norm: str = "layernorm(eps=1e-5)"
    position: str = "none"
    dropout: float = 0.1
    mels: int = 80
    vocabulary: int = 129
    head: str = "ctc"
    subsampling: str = "conv4"
    widths: tuple[int, ...] = ()
    strided: tuple[int, ...] = ()
    mixers: tuple[str, ...] = ()
    scale_input: bool = True
    first_norm: bool = False
    unet: bool = False
    reduce: int | None = None
    reduce_left: int = 3
    chunk: int | None = None
    left: int = 70
    frames: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.mels, self.frames) < 1 or self.vocabulary < 0 or self.vocabulary == 1:
            raise ValueError("mels and frames are at least 1; vocabulary is at least 2, a token and the blank, or 0")
        if "cross" in self.words or self.modulate:
            raise ValueError("a speech encoder has no memory for 'cross' to read, and nothing to modulate blocks with")
        for field, table in (("subsampling", SUBSAMPLINGS), ("head", SPEECH_HEADS)):
            try:
                check(table, getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if self.frames != 512 and parse(self.position)[0] != "learned":
            raise ValueError(f"frames={self.frames} would be ignored: position '{self.position}' has no table")
        if not self.vocabulary and self.head != "ctc":
            raise ValueError(f"head '{self.head}' would be ignored: vocabulary is 0")
        self._check_stages()
        self._check_unet()
        self._check_chunk()

    def _check_stages(self) -> None:
        if not self.strided:
            if self.widths or self.mixers:
                raise ValueError("widths and mixers would be ignored: strided names no block at which stages end")
            return
        if self.mixers and self.mixer != "relative":
            raise ValueError(f"mixer '{self.mixer}' would be ignored: mixers names one a stage; set mixers=() or those")
        stages = len(self.strided) + 1
        if len(self.widths) != stages or self.widths[0] != self.dim or len(self.mixers) not in (0, stages):
            raise ValueError(
                f"widths has a number for each of {stages} stages, the first being dim={self.dim}, and mixers a name "
                f"each or none; not {self.widths} and {self.mixers}"
            )
        if list(self.strided) != sorted({*self.strided}) or not 0 <= self.strided[0] <= self.strided[-1] < self.depth:
            raise ValueError(f"strided lists rising indices of blocks, 0..{self.depth - 1}, not {self.strided}")
        if self.unet or self.chunk is not None:
            raise ValueError("strided: a model with stages has neither a temporal U-Net nor chunks")
        if self.layout != CONFORMER or self.placement != "pre" or parse(self.conv)[0] != "glu":
            raise ValueError("strided: stages need Conformer's layout, placement 'pre' and conv 'glu'")
        if self.position != "none" or self.channel != "none" or self.layer_scale is not None:
            raise ValueError("strided: stages take position 'none', channel 'none' and no layer_scale")
        for index in range(self.depth):
            self.at(index)

    def at(self, index: int, after: int = 0) -> "ConformerConfig":
        """What the block of an index is, its stage spelt out; after=1 for what follows its convolution."""
        stage = sum(block < index + after for block in self.strided)
        if not self.strided:
            return self
        mixer = self.mixers[stage] if self.mixers else self.mixer
        return replace(self, dim=self.widths[stage], mixer=mixer, widths=(), strided=(), mixers=())

    @property
    def width(self) -> int:
        """The width of the last block."""
        return self.widths[-1] if self.widths else self.dim

    def _check_unet(self) -> None:
        if not self.unet:
            if self.reduce is not None or self.reduce_left != 3:
                raise ValueError("reduce and reduce_left would be ignored: unet is False")
            return
        if not 0 <= self.reduce_left <= 4:
            raise ValueError(f"reduce_left lies in 0..4, not {self.reduce_left}")
        if self.depth < 2:
            raise ValueError(f"unet: reduce has no block to stand before; depth is at least 2, not {self.depth}")
        if not 0 <= self.reduced < self.depth - 1:
            raise ValueError(
                f"reduce: the rate is halved before block {self.reduced} and restored before the last of {self.depth}, "
                f"block {self.depth - 1}; choose reduce in 0..{self.depth - 2}, or a greater depth"
            )

    def _check_chunk(self) -> None:
        if self.chunk is None:
            if self.left != 70:
                raise ValueError(f"left={self.left} would be ignored: chunk is None")
            return
        if self.chunk < 1 or self.left < 0 or self.left % self.chunk:
            raise ValueError(f"chunk is at least 1 and divides left, not chunk={self.chunk} and left={self.left}")
        if self.unet:
            raise ValueError("unet: the temporal U-Net reads later frames, which a model with chunks may not")
        options = check(SUBSAMPLINGS, self.subsampling)
        if options["padding"] != "causal":
            raise ValueError("subsampling: a model with chunks takes padding='causal'; others read later frames")
        if parse(options["channel"])[0] != "none":
            raise ValueError("subsampling: channel attention reads the whole utterance; a model with chunks cannot")
        if check(TABLES["mixer"], self.mixer).get("window"):
            raise ValueError(f"mixer '{self.mixer}': a model with chunks would ignore the window; set chunk and left")
        if parse(self.position)[0] not in ("none", "rope"):
            raise ValueError(f"position '{self.position}' counts from the start of a stream; choose rope or none")

    @property
    def writes(self) -> frozenset[str]:
        return super().writes | ({"visible"} if self.chunk is not None else set())

    @property
    def reduced(self) -> int:
        """The index of the first block at half the frame rate."""
        return self.depth // 2 - 1 if self.reduce is None else self.reduce

    @property
    def visible(self) -> Chunks | None:
        return None if self.chunk is None else Chunks(self.chunk, self.left)

    @property
    def transducer(self) -> bool:
        """Whether the head is an RNN-T's, so that the model's first output is tokens."""
        return self.vocabulary > 0 and parse(self.head)[0] == "transducer"

    @property
    def outputs(self) -> int:
        """The last size of the model's first output: the vocabulary, or the width of the tokens."""
        return self.vocabulary if self.vocabulary and not self.transducer else self.width

    @property
    def stride(self) -> int:
        """Frames of the features to one output."""
        return 2 ** (SUBSAMPLINGS[parse(self.subsampling)[0]].stages + len(self.strided))

    def build(self) -> "Conformer":
        return Conformer(self)


class Encoded(NamedTuple):
    """Tokens [B, T', dim] with their Context, and how many of each clip are real, or None for all."""

    tokens: Tensor
    context: Context
    lengths: Tensor | None


class Conformer(nn.Module):
    """model(features [B, T, mels], lengths [B] or None) -> (logits [B, T', vocabulary], lengths [B]).

    lengths counts the real frames of each clip, None stands for all; what lies beyond changes nothing. Without a head
    (vocabulary = 0), and with an RNN-T head, the first output is the encoder's tokens [B, T', dim]; `model.head` then
    makes logits of them and of targets.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make(SUBSAMPLINGS, config.subsampling, config.mels, config.dim)
        self.scale = math.sqrt(config.dim) if config.scale_input else 1.0
        self.position = make(POSITIONS, config.position, config.dim, config.head_dim, (config.frames,), 0)
        self.first: Norm | None = make(NORMS, config.norm, config.dim) if config.first_norm else None
        self.blocks = nn.ModuleList(
            Strided(config.at(index), config.at(index, 1), rate)
            if index in config.strided
            else Block(config.at(index), rate)
            for index, rate in enumerate(drop_rates(config.drop_path, config.depth))
        )
        self.reduce = Reduce(config.dim, config.reduce_left) if config.unet else None
        self.recover = linear(config.dim, config.dim) if config.unet else None
        self.head = make(SPEECH_HEADS, config.head, config.width, config.vocabulary) if config.vocabulary else None
        self.checkpointing = False
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.address = name

    def embed(self, features: Tensor, lengths: Tensor | None, visible: Chunks | None = None) -> tuple[Tensor, Context]:
        """Tokens behind the subsampling, and the Context of the first blocks."""
        if features.ndim != 3 or features.shape[2] != self.config.mels:
            raise ValueError(f"the model takes features [B, T, {self.config.mels}], not {list(features.shape)}")
        mask = None
        if lengths is not None:
            if lengths.shape != features.shape[:1]:
                raise ValueError(f"lengths has one number a clip, not the shape {list(lengths.shape)}")
            known = lengths.device.type == "cpu" and not compiling()
            if known and bool((lengths > features.shape[1]).any()):
                raise ValueError(f"a clip of {int(lengths.max())} frames does not fit features {list(features.shape)}")
            # Where it costs nothing to know, clips without padding take the way without masks.
            if not known or self.training or bool((lengths < features.shape[1]).any()):
                mask = mask_of(lengths, features.shape[1])
        x, mask = self.stem(features, mask)
        context = self.position.place(Context(grid=(x.shape[1],), mask=mask))
        return self.start(x, context), context._replace(visible=self.chunks(visible))

    def chunks(self, visible: Chunks | None) -> Chunks | None:
        """The chunks to work in, those of the config or, in a model that has some, others."""
        if visible is None:
            return self.config.visible
        if self.config.chunk is None:
            raise ValueError("visible: this model was not made to work in chunks; its config has no chunk")
        if visible.chunk < 1 or visible.left < 0 or visible.left % visible.chunk:
            raise ValueError(f"visible: chunk is at least 1 and divides left, not {visible}")
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
        """What the given blocks make (the last where None; -1 is the last), each at its own frame rate.

        visible replaces the chunks of the config, for a model that has some.
        """
        wanted = (-1,) if layers is None else layers
        if bad := [layer for layer in wanted if not -self.config.depth <= layer < self.config.depth]:
            raise ValueError(f"layers: there is no block {bad[0]}; the model has {self.config.depth} blocks, from 0")
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
            if isinstance(block, Strided):
                pair: Any = run((block,), x, context, self.checkpointing and self.training)
                x, context = pair
                real = None if real is None else (real + 1) // 2
            else:
                x = run((block,), x, context, self.checkpointing and self.training)
            made.append(Encoded(x, context, real))
        return [made[layer] for layer in wanted]

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, visible: Chunks | None = None
    ) -> tuple[Tensor, Tensor]:
        x, _, real = self.encode(features, lengths, visible)[0]
        if real is None:
            real = torch.full((x.shape[0],), self.tokens(features.shape[1]), dtype=torch.long, device=x.device)
        return self.logits(x), real

    def logits(self, tokens: Tensor) -> Tensor:
        """A CTC head's logits of tokens; without one the tokens."""
        return self.head(tokens) if isinstance(self.head, CTCHead) else tokens

    def tokens(self, lengths: Any) -> Any:
        """Tokens that so many frames become, of a number or a tensor of them."""
        lengths = self.stem.tokens(lengths)
        for _ in self.config.strided:
            lengths = (lengths + 1) // 2
        return lengths

    def state(self, batch: int, visible: Chunks | None = None) -> dict[str, Tensor]:
        """What a stream remembers, before its first chunk: a dict of tensors of fixed sizes."""
        visible = self.chunks(visible)
        if visible is None:
            raise ValueError("this model was not made to stream; its config has no chunk")
        cache = self.stem.state(batch)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                cache |= {f"{name}.{slot}": tensor for slot, tensor in module.state(batch, visible).items()}
        return cache

    def step(self, features: Tensor, mask: Tensor, cache: dict[str, Tensor], visible: Chunks) -> Tensor:
        """The logits [B, chunk, vocabulary] of the next chunk [B, stride * chunk, mels]; cache is changed in place.

        The first chunk begins with stride - 1 frames that the mask [B, stride * chunk] calls padding, as the last one
        ends with what is missing.
        """
        x, mask = self.stem(features, mask, cache)
        context = self.position.place(Context(grid=(visible.left + x.shape[1],)))
        context = context._replace(grid=(x.shape[1],), mask=mask, visible=visible, cache=cache)
        x = self.start(x, context)
        for block in self.blocks:
            x = block(x, context)
        return self.logits(x)

    def stream(self, batch: int = 1, visible: Chunks | None = None) -> Stream:
        """Takes features in pieces of any size and gives logits as soon as a chunk is whole."""
        return Stream(self, batch, self.chunks(visible))

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that weight decay leaves alone."""
        ends = ("position.table", ".content", ".offset")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """How deep each parameter lies, in the form that timm's layer-wise decay reads."""
        return {
            "stem": r"^(?:stem|first|position)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:reduce|recover)", (99999,))],
        }

    def fold(self) -> list[Fold]:
        """Folds the norm at the end of the last block into a CTC head, which alone reads it."""
        done = [] if self.first is None else [keep(self, "first", "the stream reads it")]
        last: Any = self.blocks[-1]
        steps = last.back.steps if isinstance(last, Strided) else last.steps
        norm = steps[-1] if isinstance(steps[-1], Norm) else steps[-1].total
        if not isinstance(norm, Norm) or not isinstance(self.head, CTCHead):
            return done
        name = f"blocks.{self.config.depth - 1}.{'back.' if isinstance(last, Strided) else ''}steps.{len(steps) - 1}"
        name += "" if norm is steps[-1] else ".total"
        if (affine := norm.affine()) is None:
            return done
        fold_in(self.head, *affine)
        if norm is steps[-1]:
            del steps[-1]
        else:
            setattr(steps[-1], "total", None)  # noqa: B010
        return [*done, Fold(name, "the head")]


def _conformer(dim: int, depth: int, heads: int, **fields: Any) -> ConformerConfig:
    return ConformerConfig(dim=dim, depth=depth, heads=heads, conv="glu(kernel=31)", **fields)


def _transducer(dim: int, depth: int, heads: int, hidden: int) -> ConformerConfig:
    return _conformer(dim, depth, heads, head=f"transducer(hidden={hidden})", vocabulary=1025)


def _squeezeformer(dim: int, depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        layout=SQUEEZEFORMER,
        conv="swish(kernel=31)",
        placement="scaled",
        subsampling="depthwise4",
        first_norm=True,
        unet=True,
    )


def _efficient(widths: tuple[int, ...], strided: tuple[int, ...], depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(
        dim=widths[0],
        depth=depth,
        heads=heads,
        widths=widths,
        strided=strided,
        mixers=("grouped(size=3)", "relative", "relative"),
        conv="glu(kernel=15)",
        subsampling="conv2",
        vocabulary=257,
    )


def _fastconformer(dim: int, depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(dim=dim, depth=depth, heads=heads, conv="glu(kernel=9)", subsampling="depthwise8")


PRESETS: dict[str, ConformerConfig] = {
    "conformer_s": _transducer(144, 16, 4, 320),
    "conformer_m": _transducer(256, 16, 4, 640),
    "conformer_l": _transducer(512, 17, 8, 640),
    "conformer_ctc_s": _conformer(144, 16, 4),
    "conformer_ctc_m": _conformer(256, 16, 4),
    "conformer_ctc_l": _conformer(512, 18, 8),
    "squeezeformer_xs": _squeezeformer(144, 16, 4),
    "squeezeformer_s": _squeezeformer(196, 18, 4),
    "squeezeformer_sm": _squeezeformer(256, 16, 4),
    "squeezeformer_m": _squeezeformer(324, 20, 4),
    "squeezeformer_ml": _squeezeformer(512, 18, 8),
    "squeezeformer_l": _squeezeformer(640, 22, 8),
    "efficient_conformer_s": _efficient((120, 168, 240), (4, 9), 15, 4),
    "fastconformer_s": _fastconformer(176, 16, 4),
    "fastconformer_m": _fastconformer(256, 16, 4),
    "fastconformer_l": _fastconformer(512, 17, 8),
}
