"""Checkpoints of JiT (LTH14/JiT)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from zoo.convert.dit.layout import (
    HEAD_NORMS,
    NAMES,
    NORMS,
    SWIGLU,
    depth_of,
    halves,
    neighbours,
    opened,
    read,
    same_but,
    shape_of,
    side_of,
    without,
    written,
)
from zoo.inputs.images import ImagePreprocess
from zoo.models.dit import DiT
from zoo.models.presets.dit import PRESETS

ALL = NAMES | SWIGLU | NORMS | HEAD_NORMS
ALL |= {"stem.conv": "x_embedder.proj1", "stem.out": "x_embedder.proj2", "tokens": "in_context_posemb"}
BLOCKS = {768: 4, 1024: 8, 1280: 10}
"""The first block that sees the class tokens, of the published widths."""


def from_jit(
    checkpoint: str | Path | Mapping[str, Tensor], *, class_block: int | None = None, noise: float = 1.0
) -> DiT:
    """Converts a checkpoint of JiT; the model predicts data, as theirs.

    JiT counts time from the noise; ours embeds 1 - time. Channels of queries and keys change places: JiT rotates
    neighbours, zoo the two halves of a head. `model.preprocess` is that of its images.

    Args:
        checkpoint: the file, which is read without running code, or a state dict, of the whole denoiser or of its
            network; the first average is preferred.
        class_block: the first block that sees the class tokens, if the width is not a published one.
        noise: JiT's standard deviation of the noise, 1 at 256 pixels and 2 at 512. The model's noise has 1: its images
            are those of JiT, from -1 to 1, divided by this number.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    _check_noise(noise)
    state, where = opened(checkpoint, ("model_ema1", "model"))
    state = without(state, "net.")
    bottleneck, channels, patch, _ = shape_of(state, "x_embedder.proj1.weight", 4, where)
    dim = shape_of(state, "x_embedder.proj2.weight", 4, where)[0]
    width = shape_of(state, "blocks.0.attn.q_norm.weight", 1, where)[0]
    tokens = shape_of(state, "in_context_posemb", 3, where)[1] if "in_context_posemb" in state else 0
    if not tokens:
        class_block = 0
    elif class_block is None and dim not in BLOCKS:
        raise ValueError(f"{where}: the width {dim} is not a published one; give class_block")
    config = replace(
        PRESETS["jit_b_16"],
        dim=dim,
        depth=depth_of(state),
        heads=max(1, dim // width),
        image=side_of(state, where) * patch,
        channels=channels,
        patch=patch,
        bottleneck=bottleneck,
        class_tokens=tokens,
        class_block=BLOCKS[dim] if class_block is None else class_block,
        classes=shape_of(state, "y_embedder.embedding_table.weight", 2, where)[0] - 1,
    )

    def change(name: str, tensor: Tensor) -> Tensor:
        return halves(name, _scaled(name, tensor, noise), config.dim // config.heads)

    model = read(state, config, ALL, where, change)
    if channels in (1, 3):
        mean, std = (0.5,) * channels, (0.5 * noise,) * channels
        model.preprocess = ImagePreprocess(size=config.image, channels=channels, mean=mean, std=std, crop=1.0)
    return model


def to_jit(model: DiT, *, noise: float = 1.0) -> dict[str, Tensor]:
    """The state dict of a model in the layout of JiT's network, with its table of positions: the inverse of `from_jit`.
    ValueError if the model does not have JiT's blocks."""
    _check_noise(noise)
    config, free = model.config, ("bottleneck", "class_tokens", "class_block")
    if not same_but(config, PRESETS["jit_b_16"], *free) or not config.classes or not config.bottleneck:
        raise ValueError("only a model with the blocks of JiT, such as jit_b_16, has its layout")

    def change(name: str, tensor: Tensor) -> Tensor:
        tensor = neighbours(name, _scaled(name, tensor, 1 / noise), config.dim // config.heads)
        return tensor[..., None, None] if name == "stem.out.weight" else tensor

    return written(model, ALL, change)


def _check_noise(noise: float) -> None:
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be > 0, got {noise}")


def _scaled(name: str, tensor: Tensor, noise: float) -> Tensor:
    """The weights of a model whose images and noise are divided by a number."""
    if name == "stem.conv.weight":
        return tensor * noise
    return tensor / noise if name.startswith("out.") else tensor
