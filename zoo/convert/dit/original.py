"""Checkpoints of DiT, SiT and REPA in their original layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert.dit.layout import (
    MLP,
    NAMES,
    PATCHES,
    depth_of,
    heads_of,
    narrowed,
    negated,
    of_stable_diffusion,
    opened,
    read,
    same_but,
    shape_of,
    side_of,
    unchanged,
    written,
)
from zoo.models.dit import DiT, DiTConfig
from zoo.text import unknown

KINDS: dict[str, dict[str, Any]] = {
    "dit": {"time": "sincos(count=True)", "schedule": "ddpm", "prediction": "noise"},
    "sit": {"time": "sincos(scale=1.0, reverse=True)"},
    "repa": {"time": "sincos(scale=1.0)"},
}
ALL = NAMES | PATCHES | MLP


def from_dit(
    checkpoint: str | Path | Mapping[str, Tensor],
    kind: str = "dit",
    *,
    heads: int | None = None,
    image: int | None = None,
) -> DiT:
    """Converts a checkpoint of the original DiT, of SiT or of REPA; the model gives what theirs gives.

    Time 0 is data here, in all three. Of DiT, step k of 0 .. 999 is the time (k + 1) / 1000. SiT counts from the noise
    and predicts data - noise; ours embeds 1 - time, and its last linear is negated. The channels that SiT does not use,
    and REPA's projections, are dropped. A model of 4 channels has `model.preprocess`, that of Stable Diffusion's
    latents, so that `zoo.save_model` makes a checkpoint for `zoo generate sample`.

    Args:
        checkpoint: the file, which is read without running code, or a state dict; averaged weights are preferred.
        kind: dit, sit or repa: the files do not differ in names.
        heads: attention heads, if the width is not a published one.
        image: side of the latents, if the file has no table of positions.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    state, where = opened(checkpoint, ("ema", "model"))
    return converted(state, kind, heads, image, where)


def to_dit(model: DiT) -> dict[str, Tensor]:
    """The state dict of a model in the original layout, with its table of positions: the inverse of `from_dit`, but for
    channels that it dropped. ValueError if the model is not one of the three kinds."""
    for kind, fields in KINDS.items():
        plain = DiTConfig(dim=4, depth=1, heads=1, **fields)
        if same_but(model.config, plain, *(["variance"] if kind == "dit" else [])) and model.config.classes:
            return written(model, ALL, negated if kind == "sit" else unchanged)
    raise ValueError(f"only a model with the blocks of DiT, classes and the times of {', '.join(KINDS)} has its layout")


def converted(
    state: dict[str, Tensor], kind: str, heads: int | None, image: int | None, where: str, shift: float = 0.0
) -> DiT:
    """The model of a state dict; shift is that of the frequencies of the time."""
    if kind not in KINDS:
        raise ValueError(f"kind: {unknown('name', kind, KINDS)}")
    dim, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", 4, where)
    heads = heads_of(dim, heads, where)
    rows = shape_of(state, "final_layer.linear.weight", 2, where)[0]
    if "pos_embed" in state:
        image = side_of(state, where) * patch
    fields: dict[str, Any] = KINDS[kind] | ({"variance": rows == 2 * channels * patch**2} if kind == "dit" else {})
    if shift:
        fields |= {"time": f"sincos(count=True, shift={shift})"}
    config = DiTConfig(
        dim=dim,
        depth=depth_of(state),
        heads=heads,
        image=image or 32,
        channels=channels,
        patch=patch,
        classes=shape_of(state, "y_embedder.embedding_table.weight", 2, where)[0] - 1,
        **fields,
    )
    if kind == "repa":
        state = {name: each for name, each in state.items() if not name.startswith("projectors.")}
    if kind != "dit":
        narrowed(state, channels, patch, where)
    model = read(state, config, ALL, where, negated if kind == "sit" else unchanged)
    model.preprocess = of_stable_diffusion(config)
    return model
