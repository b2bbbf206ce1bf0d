"""What the layouts share: names of tensors, modulations in one linear, tables of positions, and heads that rotate."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.source import Source, state_dict_of
from zoo.inputs.latents import LatentPreprocess
from zoo.layer import Context
from zoo.models.diffusion import DiffusionConfig
from zoo.models.dit import DiT, DiTConfig

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24, 1792: 28}
"""Attention heads of the published widths."""

SIZES = ("dim", "depth", "heads", "image", "channels", "classes", "patch", "drop_path", "dropout")
"""Fields of a config that every layout leaves free."""

VAE, SCALE = "stabilityai/sd-vae-ft-ema", 0.18215
"""The autoencoder of Stable Diffusion's latents, and what its published models multiply them by."""

NAMES = {
    "steps.0.branch.qkv": "attn.qkv",
    "steps.0.branch.out": "attn.proj",
    "steps.0.modulation": "adaLN_modulation.1.0",  # the first half of adaLN_modulation.1
    "steps.1.modulation": "adaLN_modulation.1.1",
    "time.expand": "t_embedder.mlp.0",
    "time.out": "t_embedder.mlp.2",
    "label_table": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
PATCHES = {"stem.conv": "x_embedder.proj"}
MLP = {"steps.1.branch.expand": "mlp.fc1", "steps.1.branch.out": "mlp.fc2"}
SWIGLU = {"steps.1.branch.expand": "mlp.w12", "steps.1.branch.out": "mlp.w3"}
NORMS = {"steps.0.before": "norm1", "steps.1.before": "norm2", "norm": "final_layer.norm_final"}
HEAD_NORMS = {"steps.0.branch.query": "attn.q_norm", "steps.0.branch.key": "attn.k_norm"}

Change = Callable[[str, Tensor], Tensor]
"""The name of one of our tensors, and the tensor, to the tensor in the other layout."""


def opened(checkpoint: str | Path | Mapping[str, Tensor], keys: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The state dict of a file, under one of the keys, the first that it has, or the given one; and what errors call
    it."""
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint), "the state dict"
    return state_dict_of(Path(checkpoint).expanduser(), keys), str(checkpoint)


def of_stable_diffusion(config: DiffusionConfig) -> LatentPreprocess | None:
    """How the published models prepare the latents of Stable Diffusion; None for a model of other channels."""
    if config.channels != 4:
        return None
    return LatentPreprocess(size=config.image, std=(1 / SCALE,) * 4, decoder=VAE)


def without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state dict without a prefix that all names have."""
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def shape_of(state: Mapping[str, Tensor], name: str, axes: int, where: str) -> torch.Size:
    """The shape of a tensor; ValueError if it is missing or has another number of axes."""
    if name not in state or state[name].ndim != axes:
        raise ValueError(f"{where}: the tensor '{name}' is missing, or does not have {axes} axes")
    return state[name].shape


def depth_of(state: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def side_of(state: Mapping[str, Tensor], where: str) -> int:
    """The tokens on a side of the square that the table of positions is for."""
    return round(shape_of(state, "pos_embed", 3, where)[1] ** 0.5)


def heads_of(dim: int, heads: int | None, where: str) -> int:
    if heads is None and dim not in HEADS:
        raise ValueError(f"{where}: the width {dim} is not a published one; give heads")
    return heads or HEADS[dim]


def narrowed(state: dict[str, Tensor], outputs: int, patch: int, where: str) -> None:
    """Drops the second half of the output channels, which the model does not use, if there is one."""
    for leaf in ("weight", "bias"):
        name = f"final_layer.linear.{leaf}"
        if name not in state:
            raise ValueError(f"{where}: the tensor '{name}' is missing")
        if len(tensor := state[name]) == 2 * outputs * patch**2:
            state[name] = tensor.unflatten(0, (patch**2, 2, outputs))[:, 0].flatten(0, 1)


def same_but(config: DiTConfig, base: DiTConfig, *free: str) -> bool:
    """Whether two configs are equal in all fields but these and the SIZES."""
    names = [each.name for each in fields(DiTConfig) if each.name not in (*SIZES, *free)]
    return all(getattr(config, name) == getattr(base, name) for name in names)


def unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


def negated(name: str, tensor: Tensor) -> Tensor:
    """The same with the output negated, for models that predict data - noise."""
    return -tensor if name.startswith("out.") else tensor


def _theirs(name: str, names: Mapping[str, str]) -> str:
    """The other layout's name of one of our tensors."""
    path, _, leaf = name.rpartition(".")
    if not path:
        return names[leaf]
    if (block := re.match(r"blocks\.(\d+)\.(.*)", path)) is not None:
        return f"blocks.{block[1]}.{names[block[2]]}.{leaf}"
    return f"{names[path]}.{leaf}"


@torch.no_grad()
def filled(
    state: dict[str, Tensor], config: DiffusionConfig, theirs: Callable[[str], str], where: str, change: Change
) -> Any:
    """The model of a config with the tensors of a state dict; `theirs` gives the other layout's name of one of ours.
    ValueError if a tensor is missing, unused or of a wrong shape."""
    for name in [name for name in state if re.search(r"\.\d+\.adaLN_modulation\.1\.\w+$", name)]:
        for index, half in enumerate(state.pop(name).chunk(2)):
            state[name.replace("modulation.1.", f"modulation.1.{index}.")] = half
    source = Source(state, where)
    model = config.build().to(source.dtype)
    for name, tensor in model.state_dict().items():
        tensor.copy_(change(name, source.take([theirs(name)], tensor.shape)))
    source.finish()
    return model.eval()


def renamed(model: nn.Module, theirs: Callable[[str], str], change: Change) -> dict[str, Tensor]:
    """The state dict of a model in another layout: the inverse of `filled`."""
    found = {theirs(name): change(name, each.detach().clone()) for name, each in model.state_dict().items()}
    for name in [name for name in found if ".adaLN_modulation.1.0." in name]:
        second = found.pop(name.replace(".1.0.", ".1.1."))
        found[name.replace(".1.0.", ".1.")] = torch.cat([found.pop(name), second])
    return found


def read(
    state: dict[str, Tensor], config: DiTConfig, names: Mapping[str, str], where: str, change: Change = unchanged
) -> DiT:
    """As `filled`; a table of positions in the state dict must be the fixed one."""
    positions = state.pop("pos_embed", None)
    model = filled(state, config, partial(_theirs, names=names), where, change)
    if positions is not None:
        check_table(positions, table(model), "pos_embed", where)
    return model


def written(model: DiT, names: Mapping[str, str], change: Change = unchanged) -> dict[str, Tensor]:
    """As `renamed`, with the table of positions."""
    return renamed(model, partial(_theirs, names=names), change) | {"pos_embed": table(model)}


def table(model: DiT) -> Tensor:
    """The fixed table of positions at the config's own size: [1, N, dim]."""
    grid = model.config.grid(0)
    tokens = model.out.weight.new_zeros(1, grid[0] * grid[1], model.config.dim)
    return model.position(tokens, Context(grid=grid))


def check_table(found: Tensor, wanted: Tensor, name: str, where: str) -> None:
    if found.shape != wanted.shape or not torch.allclose(found.double().cpu(), wanted.double().cpu(), atol=1e-3):
        raise ValueError(f"{where}: '{name}' is not the fixed table of sines and cosines")


def halves(name: str, tensor: Tensor, width: int) -> Tensor:
    """Weights of a layout that rotates neighbouring channels of a head, (0, 1), (2, 3) .., for ours, which rotates the
    first half with the second. A head has `width` channels."""
    return _regrouped(name, tensor, (width // 2, 2))


def neighbours(name: str, tensor: Tensor, width: int) -> Tensor:
    """The inverse of `halves`."""
    return _regrouped(name, tensor, (2, width // 2))


def _regrouped(name: str, tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
    if ".branch.qkv." in name:
        rows = 2 * len(tensor) // 3  # queries and keys
    elif name.endswith((".branch.query.weight", ".branch.key.weight")):
        rows = len(tensor)
    else:
        return tensor
    turned = tensor[:rows].unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)
    return torch.cat([turned, tensor[rows:]])
