"""timm's MetaFormer and DaVit as pyramids of ours. Tensors are copied or reshaped, never recomputed."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.convert.timm.parts import (
    SUPPORTED,
    activation_of,
    check_axes,
    fill,
    norm_of,
    one,
    spelled,
    with_width,
)
from zoo.ffns import FFNS
from zoo.heads import HEADS
from zoo.mixers import MIXERS
from zoo.models.pyramid import Pyramid, PyramidConfig
from zoo.tensors import shapes_alone

# Our names and timm's, in the order in which they are replaced.
_NAMES = (
    ("stem.reduction.after.", "stem.norm."),
    ("stem.reduction.conv.", "stem.conv."),
    (".reduction.before.", ".downsample.norm."),
    (".reduction.conv.", ".downsample.conv."),
)
_METAFORMER = (
    *_NAMES,
    (".steps.0.before.", ".norm1."),
    (".steps.0.branch.expand.", ".token_mixer.pwconv1."),
    (".steps.0.branch.activation.", ".token_mixer.act1."),
    (".steps.0.branch.conv.", ".token_mixer.dwconv."),
    (".steps.0.branch.qkv.", ".token_mixer.qkv."),
    (".steps.0.branch.out.", ".token_mixer.pwconv2."),  # .proj. in attention
    (".steps.0.shortcut", ".res_scale1.scale"),
    (".steps.0.layer_scale", ".layer_scale1.scale"),
    (".steps.1.before.", ".norm2."),
    (".steps.1.branch.expand.", ".mlp.fc1."),
    (".steps.1.branch.activation.", ".mlp.act."),
    (".steps.1.branch.out.", ".mlp.fc2."),
    (".steps.1.shortcut", ".res_scale2.scale"),
    (".steps.1.layer_scale", ".layer_scale2.scale"),
    ("head.expand.", "head.fc.fc1."),
    ("head.inner.", "head.fc.norm."),
    ("head.out.", "head.fc."),  # .fc.fc2. behind an MLP
)
_DAVIT = (
    *_NAMES,
    (".steps.0.branch.conv.", ".cpe1.proj."),
    (".steps.1.before.", ".norm1."),
    (".steps.1.branch.qkv.", ".attn.qkv."),
    (".steps.1.branch.out.", ".attn.proj."),
    (".steps.2.branch.conv.", ".cpe2.proj."),
    (".steps.3.before.", ".norm2."),
    (".steps.3.branch.expand.", ".mlp.fc1."),
    (".steps.3.branch.out.", ".mlp.fc2."),
    ("head.out.", "head.fc."),
)
# Biases that timm omits together: zeros then.
_BIASES = (
    r"stages\..*\.token_mixer\.qkv\.bias",
    r"stages\..*\.token_mixer\.proj\.bias",
    r"stages\..*\.attn\.qkv\.bias",
)


class _Facts(NamedTuple):
    """The facts that the shapes of the tensors do not show, mostly per stage."""

    mixers: list[tuple[str, ...]]  # the mixers that a stage's blocks take in turn
    heads: list[int]  # 0 where the mixer has none
    norms: list[str]
    final_norm: str
    activation: str


def from_model(model: Any) -> Pyramid:
    """The Pyramid of a MetaFormer or DaVit of timm with known parts; ValueError if the zoo does not support it."""
    davit = type(model).__name__ == "DaVit"
    return _fill(dict(model.state_dict()), _read_davit(model) if davit else _read_metaformer(model), davit)


def from_state(tensors: Mapping[str, Tensor]) -> Pyramid:
    """The Pyramid of the state dict of a MetaFormer or DaVit of timm, the usual where tensors are unclear."""
    davit = "stages.0.blocks.0.0.norm1.weight" in tensors
    if not davit and "stages.0.blocks.0.norm1.weight" not in tensors:
        raise ValueError(f"{SUPPORTED}; this one has no 'stages.0.blocks.0.norm1.weight'")
    return _fill(tensors, _assume_davit(tensors) if davit else _assume_metaformer(tensors), davit)


def _read_metaformer(model: Any) -> _Facts:
    stages = [list(stage.blocks) for stage in model.stages]
    mixers = [(one("token mixer per stage", [_mixer(block.token_mixer) for block in blocks]),) for blocks in stages]
    heads = [one("number of heads per stage", [_heads(block.token_mixer) for block in blocks]) for blocks in stages]
    norms, activation = _read_both(model, stages)
    ends = [model.head.norm, *([model.head.fc.norm] if hasattr(model.head.fc, "norm") else [])]
    return _Facts(mixers, heads, norms, one("norm in the head", [_norm(norm) for norm in ends]), activation)


def _read_davit(model: Any) -> _Facts:
    stages = [[block for turn in stage.blocks for block in turn] for stage in model.stages]
    if any(block.mlp is None for blocks in stages for block in blocks):
        raise ValueError("from_timm needs a DaVit with feed-forward layers, not one with ffn=False")
    turns = [[tuple(_mixer(block.attn) for block in turn) for turn in stage.blocks] for stage in model.stages]
    mixers = [one("order of attention per stage", each) for each in turns]
    heads = [one("number of heads per stage", [_heads(block.attn) for block in blocks]) for blocks in stages]
    norms, activation = _read_both(model, stages)
    end = getattr(model.head, "norm", model.norm_pre) if type(model.norm_pre) is nn.Identity else model.norm_pre
    return _Facts(mixers, heads, norms, _norm(end), activation)


def _read_both(model: Any, stages: list[list[Any]]) -> tuple[list[str], str]:
    """The norm of each stage, shared by the reduction before it if that has one, and the activation."""
    norms = []
    for front, blocks in zip([model.stem, *(stage.downsample for stage in model.stages[1:])], stages, strict=True):
        parts = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        parts += [norm for norm in [getattr(front, "norm", None)] if isinstance(norm, nn.LayerNorm | nn.GroupNorm)]
        norms.append(one("norm per stage, including the one before it,", [_norm(norm) for norm in parts]))
    return norms, one("activation", [activation_of(block.mlp.act) for blocks in stages for block in blocks])


def _mixer(part: Any) -> str:
    """Our mixer of the same kind; its widths are read from the tensors."""
    name = type(part).__name__
    if name == "Pooling":
        return "pool" if part.pool.kernel_size == 3 else f"pool(size={part.pool.kernel_size})"
    if name == "WindowAttention":
        high, wide = part.window_size
        if high != wide:
            raise ValueError(f"from_timm needs square windows, got {high} x {wide}")
        return f"window(size={high})"
    return {"Identity": "identity", "SepConv": "sepconv", "Attention": "softmax"}.get(name, "channel")


def _heads(part: Any) -> int:
    return getattr(part, "num_heads", 0)


def _norm(layer: Any) -> str:
    """As norm_of, for norms with a weight: without one, the tensors would not show them."""
    if getattr(layer, "weight", None) is None:
        raise ValueError(
            "from_timm needs a MetaFormer or DaVit whose norms have a weight, with the last norm in or before the head"
        )
    return norm_of(layer, *(["bias=False"] if layer.bias is None else []))


def _assume_metaformer(tensors: Mapping[str, Tensor]) -> _Facts:
    mixers, heads, norms = [], [], []
    for stage, dim in enumerate(_dims(tensors)):
        block = f"stages.{stage}.blocks.0"
        convolves = f"{block}.token_mixer.pwconv1.weight" in tensors
        mixer = "sepconv" if convolves else "softmax" if f"{block}.token_mixer.qkv.weight" in tensors else "pool"
        biased = f"{block}.norm1.bias" in tensors
        if mixer == "pool" and not biased:
            raise ValueError(
                f"'{block}.norm1.bias' is missing: PoolFormerV2 is not supported; for others give the model itself"
            )
        mixers.append((mixer,))
        heads.append(_usual_heads(dim) if mixer == "softmax" else 0)
        norms.append("groupnorm" if mixer == "pool" else "layernorm" if biased else "layernorm(bias=False)")
    final_norm = "layernorm" if "head.norm.bias" in tensors else "layernorm(bias=False)"
    star = "stages.0.blocks.0.mlp.act.scale" in tensors
    return _Facts(mixers, heads, norms, final_norm, "star_relu" if star else "gelu")


def _assume_davit(tensors: Mapping[str, Tensor]) -> _Facts:
    heads = [_usual_heads(dim) for dim in _dims(tensors)]
    parts = [re.match(r"stages\.\d+\.blocks\.\d+\.(\d+)\.", name) for name in tensors]
    if {part[1] for part in parts if part} != {"0", "1"}:
        raise ValueError("a state dict must have window and channel attention in turns; give the model itself")
    norm = "layernorm(eps=1e-05)"
    return _Facts([("window(size=7)", "channel")] * len(heads), heads, [norm] * len(heads), norm, "gelu")


def _usual_heads(dim: int) -> int:
    if dim % 32:
        raise ValueError(
            f"a state dict does not hold its number of heads, and width {dim} has no usual one; give the model itself"
        )
    return dim // 32


def _shape(tensors: Mapping[str, Tensor], name: str, *axes: int) -> torch.Size:
    """The shape of a tensor; ValueError if it is missing or has another number of axes than one of those."""
    if name not in tensors:
        raise ValueError(f"'{name}' is missing; {SUPPORTED}")
    check_axes(tensors, name, *axes)
    return tensors[name].shape


def _dims(tensors: Mapping[str, Tensor]) -> list[int]:
    """The channels of each stage."""
    stages = len({name.split(".")[1] for name in tensors if re.match(r"stages\.\d+\.", name)})
    fronts = ["stem.conv.weight", *(f"stages.{stage}.downsample.conv.weight" for stage in range(1, stages))]
    return [_shape(tensors, front, 4)[0] for front in fronts]


def _configure(tensors: Mapping[str, Tensor], facts: _Facts, davit: bool) -> PyramidConfig:
    """The config of a model with these tensors; ValueError if the zoo does not support it."""
    dims, depth, heads, mixers, ffns, placements = _dims(tensors), [], [], [], [], []
    unit = r"\d+\.\d+" if davit else r"\d+"
    for stage, dim in enumerate(dims):
        inside = (re.match(rf"stages\.{stage}\.blocks\.{unit}\.", name) for name in tensors)
        depth.append(len({match[0] for match in inside if match}))
        block = f"stages.{stage}.blocks.0.0" if davit else f"stages.{stage}.blocks.0"
        turns = tuple(_mixer_of(tensors, f"{block}.token_mixer", mixer, dim) for mixer in facts.mixers[stage])
        heads.append(facts.heads[stage] or max(1, dim // (64 if "pool" in facts.mixers[stage] else 32)))
        mixers.append(turns if turns[1:] else turns[0])
        ffns.append(_ffn_of(tensors, f"{block}.mlp", facts.activation, dim))
        placements.append("res_scale" if f"{block}.res_scale1.scale" in tensors else "pre")
    classes, head = _head_of(tensors, dims[-1], facts.final_norm)
    if davit:
        kernel = _shape(tensors, "stages.1.downsample.conv.weight", 4)[-1] if len(dims) > 1 else 2
        reduction = "conv" if kernel == 2 else f"conv(kernel={kernel}, padding={kernel // 2 if kernel % 2 else 0})"
        stem, layout = "conv(kernel=7, padding=3)", ("conv", "mixer", "conv", "ffn")
    else:
        bare = "stem.norm.weight" not in tensors  # nor is there one in front of the stages then
        reduction = spelled("conv", ["kernel=3", "padding=1", *(["before=False"] if bare else [])])
        stem = spelled("conv", ["kernel=7", "padding=2", *(["after=False"] if bare else [])])
        layout = ("mixer", "ffn")
    return PyramidConfig(
        dim=tuple(dims),
        depth=tuple(depth),
        heads=tuple(heads),
        layout=layout,
        mixer=_choice(mixers),
        conv="depthwise" if davit else "glu",
        ffn=_choice(ffns),
        norm=_choice(facts.norms),
        placement=_choice(placements),
        stem=stem,
        reduction=reduction if dims[1:] else "conv",
        head=head,
        final_norm="" if facts.final_norm == facts.norms[-1] else facts.final_norm,
        layer_scale=1e-5 if "stages.0.blocks.0.layer_scale1.scale" in tensors else None,
        channels=_shape(tensors, "stem.conv.weight", 4)[1],
        classes=classes,
    )


def _choice(names: list[Any]) -> Any:
    """One name for all stages if they have the same."""
    return names[0] if len(set(names)) == 1 and isinstance(names[0], str) else tuple(names)


def _mixer_of(tensors: Mapping[str, Tensor], part: str, name: str, dim: int) -> str:
    """The mixer with the options that the tensors show."""
    if name == "softmax" and not {f"{part}.qkv.bias", f"{part}.proj.bias"} & tensors.keys():
        return "softmax(bias=False)"
    if name != "sepconv":
        return name
    hidden, kernel = _shape(tensors, f"{part}.pwconv1.weight", 4)[0], _shape(tensors, f"{part}.dwconv.weight", 4)[-1]
    return with_width(MIXERS, name, 2.0, hidden, [] if kernel == 7 else [f"kernel={kernel}"], dim, 1)


def _ffn_of(tensors: Mapping[str, Tensor], part: str, activation: str, dim: int) -> str:
    options = [] if activation == "gelu" else [f"activation={activation!r}"]
    if f"{part}.fc1.bias" not in tensors:
        options.append("bias=False")
    elif f"{part}.fc2.bias" not in tensors:
        options.append("out_bias=False")
    return with_width(FFNS, "mlp", 4.0, _shape(tensors, f"{part}.fc2.weight", 2, 4)[1], options, dim)


def _head_of(tensors: Mapping[str, Tensor], dim: int, norm: str) -> tuple[int, str]:
    """The number of classes and the head."""
    if "head.fc.fc2.weight" in tensors:
        classes, hidden = _shape(tensors, "head.fc.fc2.weight", 2)
        return classes, with_width(HEADS, "mlp", 4.0, hidden, [], dim, classes, norm)
    classes = _shape(tensors, "head.fc.weight", 2)[0] if "head.fc.weight" in tensors else 0
    return classes, "linear" if "norm_pre.weight" in tensors else "linear(mean_first=True)"


def _fill(tensors: Mapping[str, Tensor], facts: _Facts, davit: bool) -> Pyramid:
    """The model with timm's tensors: each is used, and each of ours is filled."""
    config = _configure(tensors, facts, davit)
    with shapes_alone():
        model = config.build()

    def unit(match: re.Match[str]) -> str:
        number, turns = int(match[2]), len(facts.mixers[int(match[1])])
        return f"stages.{match[1]}.blocks.{number // turns}.{number % turns}."

    def find(key: str, slot: Tensor, take: Callable[..., Tensor], like: Tensor | None) -> tuple[str, Tensor]:
        name = re.sub(r"stages\.(\d+)\.blocks\.(\d+)\.", unit, key) if davit else key
        for ours, theirs in _DAVIT if davit else _METAFORMER:
            name = name.replace(ours, theirs)
        if ".pwconv2." in name and facts.mixers[int(name.split(".")[1])] == ("softmax",):
            name = name.replace("pwconv2", "proj")
        if config.head.startswith("mlp"):
            name = re.sub(r"^head\.fc\.(weight|bias)", r"head.fc.fc2.\1", name)
        if config.head == "linear":
            name = name.replace("head.norm.", "norm_pre.")
        value = take(name, like)
        if value.ndim == 4 and slot.ndim == 2 and value.shape[2:] == (1, 1):
            value = value.flatten(1)  # a 1 x 1 convolution is a linear map
        return name, value

    return fill(model, tensors, _BIASES, find)
