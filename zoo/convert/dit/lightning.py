"""Checkpoints of LightningDiT (hustvl/LightningDiT)."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from zoo.convert.dit.layout import (
    HEAD_NORMS,
    MLP,
    NAMES,
    NORMS,
    PATCHES,
    SWIGLU,
    check_table,
    depth_of,
    halves,
    heads_of,
    narrowed,
    negated,
    neighbours,
    opened,
    read,
    same_but,
    shape_of,
    side_of,
    without,
    written,
)
from zoo.layer import Context
from zoo.models.dit import DiT, DiTConfig
from zoo.models.presets.dit import PRESETS

CHOICES = {
    "mixer": ("softmax", "softmax(qk_norm='rmsnorm')"),
    "ffn": ("mlp(activation='gelu_tanh')", "swiglu(multiple=1)"),
    "norm": ("layernorm(affine=False)", "rmsnorm"),
    "position": ("sincos(order='xy')", "rope(absolute=True)"),
}
"""Our fields for its use_qknorm, use_swiglu, use_rmsnorm and use_rope: without and with."""
TURNS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def from_lightningdit(checkpoint: str | Path | Mapping[str, Tensor], *, heads: int | None = None) -> DiT:
    """Converts a checkpoint of LightningDiT; which of RMSNorm, SwiGLU, rotary positions and norms of queries and keys
    it has follows from its tensors.

    LightningDiT counts time from the noise and predicts data - noise; ours embeds 1 - time, and its last linear is
    negated. Channels of a variance, which it does not use, are dropped. Channels of queries and keys change places:
    LightningDiT rotates neighbours, zoo the two halves of a head.

    `model.preprocess` is None: the mean and deviation of the channels of its latents (VA-VAE's) are not in the file.
    Give them to `zoo.save_model` as `preprocess=LatentPreprocess(...)` of `zoo.inputs.latents`.

    Args:
        checkpoint: the file, which is read without running code, or a state dict; averaged weights are preferred.
        heads: attention heads, if the width is not a published one.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape; or the
            modulation has no shifts.
    """
    state, where = opened(checkpoint, ("ema", "model"))
    state = without(state, "module.")
    dim, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", 4, where)
    if shape_of(state, "blocks.0.adaLN_modulation.1.weight", 2, where)[0] == 4 * dim:
        raise ValueError(f"{where}: a modulation without shifts (wo_shift) is not supported")
    tables = {name: state.pop(name) for name in TURNS if name in state}
    has = {
        "mixer": "blocks.0.attn.q_norm.weight" in state,
        "ffn": "blocks.0.mlp.w12.weight" in state,
        "norm": "blocks.0.norm1.weight" in state,
        "position": bool(tables),
    }
    narrowed(state, channels, patch, where)
    config = replace(
        PRESETS["lightningdit_xl_1"],
        dim=dim,
        depth=depth_of(state),
        heads=heads_of(dim, heads, where),
        image=side_of(state, where) * patch,
        channels=channels,
        patch=patch,
        classes=shape_of(state, "y_embedder.embedding_table.weight", 2, where)[0] - 1,
        **{field: CHOICES[field][given] for field, given in has.items()},
    )
    model = read(state, config, _names(config), where, functools.partial(_from, config))
    for name, wanted in _turns(model).items():
        if name in tables:
            check_table(tables[name], wanted, name, where)
    return model


def to_lightningdit(model: DiT) -> dict[str, Tensor]:
    """The state dict of a model in the layout of LightningDiT, with its tables of positions: the inverse of
    `from_lightningdit`, but for channels that it dropped. ValueError if LightningDiT has no such model."""
    config = model.config
    known = all(getattr(config, field) in pair for field, pair in CHOICES.items())
    if not known or not config.classes or not same_but(config, PRESETS["lightningdit_xl_1"], *CHOICES):
        raise ValueError("only a model with the blocks of LightningDiT, such as lightningdit_xl_1, has its layout")
    return written(model, _names(config), functools.partial(_to, config)) | _turns(model)


def _with(config: DiTConfig, field: str) -> bool:
    return getattr(config, field) == CHOICES[field][1]


def _names(config: DiTConfig) -> dict[str, str]:
    return NAMES | PATCHES | HEAD_NORMS | NORMS | (SWIGLU if _with(config, "ffn") else MLP)


def _from(config: DiTConfig, name: str, tensor: Tensor) -> Tensor:
    tensor = negated(name, tensor)
    return halves(name, tensor, config.dim // config.heads) if _with(config, "position") else tensor


def _to(config: DiTConfig, name: str, tensor: Tensor) -> Tensor:
    tensor = negated(name, tensor)
    return neighbours(name, tensor, config.dim // config.heads) if _with(config, "position") else tensor


def _turns(model: DiT) -> dict[str, Tensor]:
    """Cosine and sine of the angles of the channels of a head, [N, width of a head]; none without rotary positions."""
    rotary = model.position.place(Context(grid=model.config.grid(0))).rotary
    return {} if rotary is None else dict(zip(TURNS, rotary.repeat_interleave(2, -1), strict=True))
