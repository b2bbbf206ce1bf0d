"""The config of speech encoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.choices import BlockConfig
from zoo.config import Config, FlatConfig, Size
from zoo.heads import SPEECH_HEADS
from zoo.layer import Chunks
from zoo.positions import POSITIONS, Position
from zoo.spec import Choice, check, names_of, parse
from zoo.stems import SUBSAMPLINGS

if TYPE_CHECKING:
    from zoo.models.conformer import Conformer

CONFORMER = ("half", "mixer", "conv", "half", "norm")
SQUEEZEFORMER = ("mixer", "ffn", "conv", "ffn")


@dataclass(frozen=True, kw_only=True)
class ConformerConfig(FlatConfig):
    """A speech encoder and its head. With `strided`, a tuple of choices has an entry for each stage.

    Args:
        mels: mel bands of the features.
        vocabulary: number of outputs; the blank is the last of them; 0 omits the head.
        head: from tokens to logits over the vocabulary.
        subsampling: from speech features to tokens.
        widths: channels of each stage, for a model with `strided` blocks (Efficient Conformer).
        strided: indices of the blocks whose convolution halves the frame rate and leads to the next of `widths`.
        scale_input: whether the tokens are multiplied by sqrt(dim).
        first_norm: whether a norm follows the subsampling.
        unet: whether the frame rate is halved before the block `reduce` and restored before the last block.
        reduce: index of the block before which `unet` halves the frame rate; None for half the depth minus one.
        reduce_left: how many of the four frames that the halving reads are before the kept one.
        chunk: tokens in a chunk of a streaming model, in which a token sees its own chunk and `left` tokens before it
            and convolutions are causal; the look-ahead is chunk - 1 tokens; None for a model of whole utterances.
        left: tokens before its own chunk that a token of a streaming model sees.
        frames: rows of the table of `learned` positions.
    """

    axes = 1
    task = "transcribe"
    input = "audio"
    argument = "features"
    labels = "tokenizer"
    counted = "vocabulary"
    shown = (*FlatConfig.shown, "layout", "conv", "conv_norm", "head", "vocabulary")

    layout: tuple[str, ...] = CONFORMER
    mixer: Choice = "relative"
    ffn: Choice = "mlp(activation='silu')"
    norm: Choice = "layernorm(eps=1e-5)"
    position: Choice = "none"
    dropout: float = 0.1
    mels: int = 80
    vocabulary: int = 129
    head: str = "ctc"
    subsampling: str = "conv4"
    widths: tuple[int, ...] = ()
    strided: tuple[int, ...] = ()
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
            raise ValueError("mels and frames must be >= 1, and vocabulary 0 or >= 2 (a token and the blank)")
        for field, table in (("subsampling", SUBSAMPLINGS), ("head", SPEECH_HEADS)):
            try:
                check(table, getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if self.frames != 512 and not self.row_of_position.sized:
            raise ValueError(f"frames={self.frames} would be ignored: position '{self.position}' has no table")
        if not self.vocabulary and self.head != "ctc":
            raise ValueError(f"head '{self.head}' would be ignored: vocabulary is 0")
        self._check_strided()
        self._check_unet()
        self._check_chunk()

    @classmethod
    def migrated(cls, values: Mapping[str, Any], base: Config | None = None) -> dict[str, Any]:
        given = super().migrated(values, base)
        stages = base.strided if isinstance(base, ConformerConfig) else ()
        # Until format 2, one mixer for each stage, or none for `mixer` everywhere.
        mixers = given.pop("mixers") if isinstance(given.get("mixers"), list | tuple) else None
        if mixers:
            if given.get("mixer", "relative") != "relative":
                raise ValueError(f"mixer '{given['mixer']}' would be ignored: mixers gives one for each stage")
            if not given.get("strided", stages):
                raise ValueError("mixers would be ignored: strided lists no block at which a stage ends")
            given["mixer"] = mixers
        elif mixers is not None and stages:
            given.setdefault("mixer", "relative")
        return given

    @property
    def stages(self) -> tuple[Size, ...]:
        if not self.strided:
            return super().stages
        ends = (*(block + 1 for block in self.strided), self.depth)
        starts = (0, *ends[:-1])
        # The last stage may be half a strided block and no whole one.
        depths = [end - start for start, end in zip(starts, ends, strict=True)]
        return tuple(Size(width, depth, self.heads) for width, depth in zip(self.widths, depths, strict=True))

    @property
    def staged(self) -> bool:
        return bool(self.strided)

    def grid(self, stage: int) -> tuple[int]:
        return (-(-self.frames // 2**stage),)

    def at(self, index: int) -> BlockConfig:
        """The block of an index in the whole model."""
        return self.block(*self.stage_of(index))

    def part(self, stage: int, index: int) -> int:
        return int(self.unet and self.reduced <= index < self.depth - 1)

    def stage_of(self, index: int) -> tuple[int, int]:
        """The stage of a block, and its index there."""
        stage = sum(block < index for block in self.strided)
        return stage, index - sum(size.depth for size in self.stages[:stage])

    @property
    def width(self) -> int:
        """The width of the last block."""
        return self.stages[-1].dim

    @property
    def row_of_position(self) -> type[Position]:
        return POSITIONS[parse(self.chosen("position", 0, 0))[0]]

    def check_sizes(self) -> None:
        if not self.strided:
            if self.widths:
                raise ValueError("widths would be ignored: strided lists no block at which a stage ends")
            return
        stages = len(self.strided) + 1
        if len(self.widths) != stages or self.widths[0] != self.dim:
            raise ValueError(
                f"widths must have {stages} numbers, one per stage, starting with dim={self.dim}, got {self.widths}"
            )
        if list(self.strided) != sorted({*self.strided}) or not 0 <= self.strided[0] <= self.strided[-1] < self.depth:
            raise ValueError(
                f"strided must list increasing block indices from 0 to {self.depth - 1}, got {self.strided}"
            )
        if self.unet or self.chunk is not None:
            raise ValueError("strided: a model with stages cannot have a temporal U-Net or chunks")
        if self.layout != CONFORMER or self.layer_scale is not None:
            raise ValueError("strided: stages need Conformer's layout, without layer_scale")
        for name, needed in (("placement", "pre"), ("conv", "glu"), ("position", "none"), ("channel", "none")):
            if any(parse(each)[0] != needed for each in names_of(getattr(self, name))):
                raise ValueError(f"strided: stages need {name} '{needed}', got '{self.described(name)}'")

    def _check_strided(self) -> None:
        """ValueError if a choice is used by no block: a strided one takes its mixer from the stage that it ends, and
        its convolution from the one that it leads to."""
        blocks = [self.at(index) for index in range(self.depth)] if self.strided else []
        for name in ("mixer", "conv", "conv_norm") if blocks else ():
            whole = [block for index, block in enumerate(blocks) if name == "mixer" or index not in self.strided]
            used = {getattr(block, name) for block in whole}
            if name != "mixer":
                used |= {getattr(self.block(stage + 1), name) for stage in range(len(self.strided))}
            if unused := [each for each in names_of(getattr(self, name)) if each not in used]:
                raise ValueError(f"{name} '{unused[0]}' would be ignored: no block has it, as strided cuts the stages")

    def _check_unet(self) -> None:
        if not self.unet:
            if self.reduce is not None or self.reduce_left != 3:
                raise ValueError("reduce and reduce_left would be ignored: unet is False")
            return
        if not 0 <= self.reduce_left <= 4:
            raise ValueError(f"reduce_left must be from 0 to 4, got {self.reduce_left}")
        if self.depth < 2:
            raise ValueError(f"unet: reduce needs depth >= 2, got depth={self.depth}")
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
            raise ValueError(f"chunk must be >= 1 and divide left, got chunk={self.chunk} and left={self.left}")
        if self.unet:
            raise ValueError("unet: the temporal U-Net reads later frames, which a model with chunks cannot")
        options = check(SUBSAMPLINGS, self.subsampling)
        if options["padding"] != "causal":
            raise ValueError(
                "subsampling: a model with chunks needs padding='causal'; other padding reads later frames"
            )
        if parse(options["channel"])[0] != "none":
            raise ValueError("subsampling: channel attention reads the whole utterance; a model with chunks cannot")
        options = check(POSITIONS, self.chosen("position", 0, 0))
        if not self.row_of_position.streams_of(**options):
            able = " or ".join(name for name, row in POSITIONS.items() if row.streams)
            raise ValueError(f"position '{self.position}' counts from the start of a stream; choose {able}")

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

    @property
    def labelled(self) -> int:
        return self.vocabulary

    @property
    def pipeline_tag(self) -> str:
        return "automatic-speech-recognition" if self.vocabulary else "feature-extraction"

    def call(self, prepared: str) -> str:
        made = "logits" if self.vocabulary and not self.transducer else "tokens"
        return f"{made}, lengths = model({prepared})"

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"features": torch.randn(1, 131, self.mels, generator=generator, device="cpu")}

    def probe_outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made, _ = model(**inputs)
        if self.transducer:  # the probe covers the head too
            made = model.head(made, torch.zeros(1, 2, dtype=torch.long))  # pyright: ignore[reportCallIssue]
        return {"output": made}

    def build(self) -> "Conformer":
        from zoo.models.conformer import Conformer

        return Conformer(self)
