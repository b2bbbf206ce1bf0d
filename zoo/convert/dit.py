"""Checkpoints of DiT, SiT and REPA, in their original layout and in that of diffusers, as ours, and the way back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.source import Source, state_dict_of
from zoo.layer import Context
from zoo.models.dit import DiT, DiTConfig
from zoo.text import unknown

KINDS = ("dit", "sit", "repa")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
FIELDS: dict[str, dict[str, Any]] = {
    "dit": {"time": "sincos(count=True)", "schedule": "ddpm", "prediction": "noise"},
    "sit": {"time": "sincos(scale=1.0, reverse=True)"},
    "repa": {"time": "sincos(scale=1.0)"},
}
_BRANCHES = {
    "steps.0.branch.qkv": "attn.qkv",
    "steps.0.branch.out": "attn.proj",
    "steps.1.branch.expand": "mlp.fc1",
    "steps.1.branch.out": "mlp.fc2",
    "steps.0.modulation": "adaLN_modulation.1.0",  # the first half of adaLN_modulation.1
    "steps.1.modulation": "adaLN_modulation.1.1",
}
_WHOLE = {
    "stem.conv": "x_embedder.proj",
    "time.expand": "t_embedder.mlp.0",
    "time.out": "t_embedder.mlp.2",
    "label_table": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}


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
    and REPA's projections, are dropped.

    Args:
        checkpoint: the file, which is read without running code, or a state dict; averaged weights are preferred.
        kind: dit, sit or repa: the files do not differ in names.
        heads: attention heads, if the width is not a published one.
        image: side of the latents, if the file has no table of positions.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    where = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = (
        checkpoint
        if isinstance(checkpoint, Mapping)
        else state_dict_of(Path(checkpoint).expanduser(), ("ema", "model"))
    )
    return _converted(dict(state), kind, heads, image, where)


def from_diffusers(
    state: Mapping[str, Tensor], *, heads: int | None = None, image: int = 32, shift: float = 0.0
) -> DiT:
    """Converts the state dict of diffusers' DiTTransformer2DModel.

    diffusers computes another function than the original with the same weights: its frequencies of the time are
    those of shift=1, and the eps of the second norm of a block is 1e-5, here 1e-6. Its blocks each hold the
    embeddings of time and label, which must be equal.

    Args:
        state: the state dict.
        heads: attention heads, if the width is not a published one.
        image: side of the latents.
        shift: 1 for the times of diffusers, 0 for those that the weights were trained with.

    Raises:
        ValueError: in one line: a tensor is missing, unused or of a wrong shape, or the embeddings differ.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.*)", name)
        if block is not None:
            first = state.get(f"transformer_blocks.0.norm1.emb.{block[2]}")
            if first is None or not torch.equal(first, tensor):
                raise ValueError(f"the state dict: '{name}' differs from that of block 0")
        for theirs, ours in _DIFFUSERS:
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    for name in [name for name in found if ".attn.to_q." in name]:
        parts = [name.replace(".to_q.", f".to_{each}.") for each in "qkv"]
        if missing := [part for part in parts if part not in found]:
            raise ValueError(f"the state dict: the tensor '{missing[0]}' is missing")
        found[name.replace(".to_q.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return _converted(found, "dit", heads, image, "the state dict", shift)


_DIFFUSERS = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.attn."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)


def to_dit(model: DiT) -> dict[str, Tensor]:
    """The state dict of a model in the original layout, with its table of positions: the inverse of `from_dit`, but for
    channels that it dropped. ValueError if the model is not one of the three kinds."""
    config = model.config
    kind = next((each for each, fields in FIELDS.items() if _is(config, fields)), None)
    plain = DiTConfig(dim=config.dim, depth=config.depth, heads=config.heads)
    same = ("layout", "mixer", "ffn", "norm", "placement", "modulation", "position", "channel", "class_tokens", "until")
    if kind is None or any(getattr(config, name) != getattr(plain, name) for name in (*same, "bottleneck")):
        raise ValueError(f"only a model with the blocks of DiT and the times of {', '.join(KINDS)} has its layout")
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        part = tensor.detach().clone()
        if name.startswith("out.") and kind == "sit":
            part = -part
        found[_original(name)] = part
    for name in [name for name in found if ".adaLN_modulation.1.0." in name]:
        second = found.pop(name.replace(".1.0.", ".1.1."))
        found[name.replace(".1.0.", ".1.")] = torch.cat([found.pop(name), second])
    return found | {"pos_embed": _table(model)}


def _is(config: DiTConfig, fields: Mapping[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in {**_DEFAULTS, **fields}.items())


_DEFAULTS = {"schedule": "linear", "prediction": "velocity"}


def _original(name: str) -> str:
    """The original's name of one of our tensors."""
    path, _, leaf = name.rpartition(".")
    if (block := re.match(r"blocks\.(\d+)\.(.*)", path)) is not None:
        return f"blocks.{block[1]}.{_BRANCHES[block[2]]}.{leaf}"
    return f"{_WHOLE[path]}.{leaf}"


def _table(model: DiT) -> Tensor:
    """The fixed table of positions at the config's own size: [1, N, dim]."""
    grid = model.config.grid(0)
    tokens = model.out.weight.new_zeros(1, grid[0] * grid[1], model.config.dim)
    return model.position(tokens, Context(grid=grid))


def _converted(
    state: dict[str, Tensor], kind: str, heads: int | None, image: int | None, where: str, shift: float = 0.0
) -> DiT:
    if kind not in KINDS:
        raise ValueError(f"kind: {unknown('name', kind, KINDS)}")
    config = _config(state, kind, heads, image, where, shift)
    positions = state.pop("pos_embed", None)
    if kind == "repa":
        state = {name: each for name, each in state.items() if not name.startswith("projectors.")}
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.adaLN_modulation\.1\.\w+", name)]:
        halves = state.pop(name).chunk(2)
        for index, half in enumerate(halves):
            state[name.replace("modulation.1.", f"modulation.1.{index}.")] = half
    if kind != "dit":
        _narrow(state, config, kind == "sit", where)
    source = Source(state, where)
    model = config.build().to(source.dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(source.take([_original(name)], tensor.shape))
    source.finish()
    if positions is not None and not torch.allclose(positions.double().cpu(), _table(model).double(), atol=1e-3):
        raise ValueError(f"{where}: 'pos_embed' is not the fixed table of sines and cosines")
    return model.eval()


def _config(
    state: Mapping[str, Tensor], kind: str, heads: int | None, image: int | None, where: str, shift: float
) -> DiTConfig:
    def shape(name: str, axes: int) -> torch.Size:
        if name not in state or state[name].ndim != axes:
            raise ValueError(f"{where}: the tensor '{name}' is missing, or does not have {axes} axes")
        return state[name].shape

    dim, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    if heads is None and dim not in HEADS:
        raise ValueError(f"{where}: the width {dim} is not a published one; give heads")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    rows = shape("final_layer.linear.weight", 2)[0]
    variance = rows == 2 * channels * patch**2
    if "pos_embed" in state:
        side = round(shape("pos_embed", 3)[1] ** 0.5)
        image = side * patch
    fields: dict[str, Any] = FIELDS[kind] | ({"variance": variance} if kind == "dit" else {})
    if shift:
        fields |= {"time": f"sincos(count=True, shift={shift})"}
    return DiTConfig(
        dim=dim,
        depth=depth,
        heads=heads or HEADS[dim],
        image=image or 32,
        channels=channels,
        patch=patch,
        classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        **fields,
    )


def _narrow(state: dict[str, Tensor], config: DiTConfig, negated: bool, where: str) -> None:
    """Drops the second half of the output channels, if there is one, and turns the velocity round."""
    for leaf in ("weight", "bias"):
        name = f"final_layer.linear.{leaf}"
        if name not in state:
            raise ValueError(f"{where}: the tensor '{name}' is missing")
        tensor = state[name]
        if len(tensor) == 2 * config.channels * config.patch**2:
            tensor = tensor.unflatten(0, (config.patch**2, 2, config.channels))[:, 0].flatten(0, 1)
        state[name] = -tensor if negated else tensor
