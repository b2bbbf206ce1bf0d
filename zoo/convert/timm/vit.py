"""timm's models as ours. Tensors are copied, joined or padded with zeros, never recomputed."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert.timm import eva as timm_eva
from zoo.convert.timm import pyramid as timm_pyramid
from zoo.convert.timm.parts import (
    SUPPORTED,
    TABLE,
    Facts,
    activation_of,
    check_axes,
    fill,
    norm_of,
    one,
    packed,
    placement_of,
    spelled,
    tensors_of,
    with_width,
)
from zoo.convert.timm.places import check_parts
from zoo.ffns import FFNS
from zoo.models.pyramid import Pyramid
from zoo.models.vit import ViT, ViTConfig
from zoo.spec import parse
from zoo.tensors import shapes_alone

# Our names and timm's, in the order in which they are replaced.
_NAMES = (
    ("stem.conv.", "patch_embed.proj."),
    ("head_distilled.", "head_dist."),
    (".steps.0.before.", ".norm1."),
    (".steps.0.branch.qkv.", ".attn.qkv."),
    (".steps.0.branch.query.", ".attn.q_norm."),
    (".steps.0.branch.key.", ".attn.k_norm."),
    (".steps.0.branch.inner.", ".attn.norm."),
    (".steps.0.branch.out.", ".attn.proj."),
    (".steps.0.layer_scale", ".ls1.gamma"),
    (".steps.1.before.", ".norm2."),
    (".steps.0.after.", ".norm1."),
    (".steps.1.after.", ".norm2."),
    (".steps.1.branch.expand.", ".mlp.fc1."),
    (".steps.1.branch.inner.", ".mlp.norm."),
    (".steps.1.branch.out.", ".mlp.fc2."),
    (".steps.1.layer_scale", ".ls2.gamma"),
    ("first_norm.", "norm_pre."),
    ("pooler.query", "attn_pool.latent"),
    ("pooler.attention.queries.", "attn_pool.q."),
    ("pooler.attention.out.", "attn_pool.proj."),
    ("pooler.ffn.expand.", "attn_pool.mlp.fc1."),
    ("pooler.ffn.out.", "attn_pool.mlp.fc2."),
    ("pooler.norm.", "attn_pool.norm."),
)
# Biases that timm omits together: zeros then.
_BIASES = (
    r"blocks\.\d+\.attn\.qkv\.bias",
    r"blocks\.\d+\.(attn\.proj|mlp\.fc\w+)\.bias",
    r"(blocks\.\d+\.(norm[12]|attn\.norm|mlp\.norm)|norm|fc_norm)\.bias",
)
_NEEDED = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight")
_PREFIX = ("cls_token", "dist_token", "reg_token")
_AXES = dict(zip(_NEEDED, (4, 2, 2), strict=True)) | dict.fromkeys((*_PREFIX, "pos_embed"), 3)


def from_timm(
    model: nn.Module | Mapping[str, Tensor],
    *,
    heads: int | None = None,
    pool: str | None = None,
    norm: str | None = None,
    activation: str | None = None,
) -> ViT | Pyramid:
    """Converts a timm model: for images [B, channels, H, W] the outputs equal timm's in eval mode.

    `model` is timm's VisionTransformer, VisionTransformerDistilled or Eva, which become a ViT, or MetaFormer or DaVit,
    which become a Pyramid, or the state dict of one, except of Eva; it is not changed and shares no memory with the
    result, which has its dtype and device. Dropout and stochastic depth, which act only in training, are not copied.

    Supported parts of vision transformers: class token, registers, distillation token and head, pooling by token or
    average with the norm on either side of it or by attention of one query (SigLIP), a norm before the blocks (CLIP),
    position table (with or without rows for the prefix) or none, layer scale, norms of queries and keys, norms inside
    both branches, LayerNorm or RMSNorm of any eps, MLP or SwiGLU of any width, missing biases (as zeros), any patch,
    depth, channels and classes. Outputs are equal at every size whose sides the patch divides, as timm's are with
    dynamic_img_size=True. Of Eva (EVA, EVA-02, DINOv3) also rotary positions of the kinds `cat` and `dinov3`, and norms
    inside the feed-forward alone or behind the branches; not mixed rotary positions, gates and shared keys.

    Supported parts of MetaFormer (PoolFormer, ConvFormer, CAFormer): pooling, no mixer, separable convolution and
    attention of any size, layer scale, scaled shortcuts, group or layer norm, MLP with or without biases, either head;
    PoolFormerV2 has no counterpart. From DaViT: any order of window and channel attention, windows of any size, norm
    before or after pooling; Florence-2's has no counterpart. Sides of images that 4 divides give timm's outputs, and
    with windows those whose every grid the windows divide (224 for 7): timm attends to the padding of others.

    A state dict does not hold everything. The keywords, only for vision transformers, give the rest:

    - heads: by default of width 64, where the attention is 128 to 1024 wide; else it must be given (norms of queries
      and keys tell it too). A few models of timm have other heads, vit_base_patch16_gap_224 among them.
    - pool: "token", "avg" or "map", timm's global_pool. By default "map" where there is attention pooling, and "token"
      where there is a class token and no fc_norm.
    - norm: "layernorm" by default, otherwise for example "layernorm(eps=1e-05)", as CLIP has, or "rmsnorm". It must be
      given where a norm is before the blocks.
    - activation of the MLP: "gelu" by default. SwiGLU has silu, its two halves packed or apart.

    The norms are taken to stand before the branches, attention to have no rotary positions, and the images to be
    square. State dicts of MetaFormer and DaVit are taken to be as in timm's presets: heads of width 32, pooling over
    3 x 3, windows of 7 x 7 in turns with attention between channels, GELU unless it has StarReLU, the usual norms.
    Models that differ are given themselves.

    ValueError, in one line, where something has no counterpart (gates, images that are not square, other classes of
    models or layers, ...), or where a tensor is missing, left over or of a wrong shape.
    """
    given = (heads, pool, norm, activation) != (None,) * 4
    if isinstance(model, nn.Module):
        if given:
            raise ValueError("heads, pool, norm and activation are for a state dict; omit them where a model is given")
        check_parts(model)
        if type(model).__name__ in ("MetaFormer", "DaVit"):
            return timm_pyramid.from_model(model)
        if type(model).__name__ == "Eva":
            facts, tensors = timm_eva.read(model)
        else:
            facts, tensors = _read(model), dict(model.state_dict())
    else:
        tensors = tensors_of(model)
        if "stem.conv.weight" in tensors:
            if given:
                raise ValueError("heads, pool, norm and activation are for vision transformers; give the model itself")
            return timm_pyramid.from_state(tensors)
        _check_state(tensors)
        facts = _assume(tensors, heads, pool, norm, activation)
    return _fill(_configure(tensors, facts), facts, tensors)


def _read(model: Any) -> Facts:
    """The facts of a model of known parts; ValueError if their combination has no counterpart."""
    distilled = type(model).__name__ == "VisionTransformerDistilled"
    if model.global_pool not in ("token", "avg", "map"):
        raise ValueError(f"from_timm needs a model that pools by 'token', 'avg' or 'map', got {model.global_pool!r}")
    if model.global_pool != "token" and model.pool_include_prefix and model.num_prefix_tokens:
        raise ValueError("from_timm does not support pool_include_prefix=True, only pooling of the grid's tokens")
    fc_norm = type(model.fc_norm) is not nn.Identity
    if model.global_pool == "map" and fc_norm:
        raise ValueError("from_timm does not support fc_norm behind attention pooling")
    if fc_norm == (type(model.norm) is not nn.Identity):
        raise ValueError("from_timm needs a model with one final norm, 'norm' or 'fc_norm', not none or both")
    if distilled and (fc_norm or model.no_embed_class):
        raise ValueError(
            "from_timm does not support distilled models with fc_norm or no_embed_class, which timm cannot run"
        )
    sides, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if sides[0] != sides[1] and model.pos_embed is not None:
        raise ValueError(f"from_timm needs a position table of square images, got {sides[0]} x {sides[1]}")
    if sides[0] % patch[0] or sides[1] % patch[1]:
        raise ValueError(
            f"from_timm needs an image size that the patch divides, got {sides[0]} x {sides[1]} and patch {patch[0]}"
        )
    blocks = list(model.blocks)
    pools = [] if model.attn_pool is None else [model.attn_pool]
    if any((each.latent_len, each.pool, each.pos_embed) != (1, "token", None) for each in pools):
        raise ValueError("from_timm needs attention pooling of one query without positions")
    heads = one("number of heads", [part.num_heads for part in [*(block.attn for block in blocks), *pools]])
    norms = [part for block in blocks for part in (block.norm1, block.norm2, block.attn.norm, block.mlp.norm)]
    norms += [model.norm_pre, model.norm, model.fc_norm, *(pool.norm for pool in pools)]
    norm = one("norm", [norm_of(part) for part in norms if type(part) is not nn.Identity])
    pairs = [one("norm of queries and keys", [norm_of(b.attn.q_norm), norm_of(b.attn.k_norm)]) for b in blocks]
    qk_norm = one("norm of queries and keys", pairs)
    if qk_norm not in ("none", "layernorm"):
        raise ValueError(f"from_timm needs 'layernorm' with eps 1e-06 for queries and keys, got '{qk_norm}'")
    placement = placement_of(
        one("norm inside attention", [type(block.attn.norm) is not nn.Identity for block in blocks]),
        one("norm inside mlp", [type(block.mlp.norm) is not nn.Identity for block in blocks]),
    )
    gated = one("kind of mlp", [type(part.mlp).__name__ for part in [*blocks, *pools]]) != "Mlp"
    mlps = [part.mlp for part in [*blocks, *pools]]
    activation = one("activation", [activation_of(mlp.act) for mlp in mlps])
    if gated and (activation != "silu" or getattr(blocks[0].mlp, "gate_last", False)):
        raise ValueError("from_timm supports gated feed-forward layers only with silu on the first half (SwiGLU)")
    scale = getattr(blocks[0].ls1, "init_values", None)
    position = "none" if model.pos_embed is None else TABLE
    return Facts(
        heads, model.global_pool, norm, activation, fc_norm, qk_norm != "none", placement, scale, sides[0], position
    )


def _check_state(tensors: Mapping[str, Tensor]) -> None:
    """ValueError if the names or axes that the config is read from are not those of timm's models."""
    if missing := [name for name in _NEEDED if name not in tensors]:
        raise ValueError(f"{SUPPORTED}; this one has no '{missing[0]}'")
    for name, axes in _AXES.items():
        if name in tensors:
            check_axes(tensors, name, axes)


def _assume(
    tensors: Mapping[str, Tensor], heads: int | None, pool: str | None, norm: str | None, activation: str | None
) -> Facts:
    """The facts of a state dict: from its names, then from the arguments, then the usual ones."""
    width, patch = len(tensors["blocks.0.attn.qkv.weight"]) // 3, tensors["patch_embed.proj.weight"].shape[-1]
    fc_norm, qk_norm = "fc_norm.weight" in tensors, "blocks.0.attn.q_norm.weight" in tensors
    if heads is None:
        if qk_norm:
            heads = width // len(tensors["blocks.0.attn.q_norm.weight"])
        elif width % 64 == 0 and 128 <= width <= 1024:
            heads = width // 64
        else:
            raise ValueError(
                f"a state dict does not hold its number of heads, and width {width} has no usual one; give heads="
            )
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the {width} channels of the queries, got {heads}")
    pooled = "attn_pool.latent" in tensors
    if pool is None:
        pool = "map" if pooled else "token" if "cls_token" in tensors and not fc_norm else "avg"
    if pool not in ("token", "avg", "map") or (pool != "token" and "dist_token" in tensors):
        raise ValueError(f"pool must be 'token', 'avg' or 'map', and 'token' for a distilled model, got {pool!r}")
    if (pool == "map") != pooled:
        raise ValueError(f"pool is 'map' for models with 'attn_pool.latent', and only for these, got {pool!r}")
    if norm is None and "norm_pre.weight" in tensors:
        raise ValueError("a state dict does not hold eps; give norm=, which for CLIP is 'layernorm(eps=1e-05)'")
    if fc_norm == ("norm.weight" in tensors) or (fc_norm and "dist_token" in tensors):
        raise ValueError("from_timm needs a model with one final norm: 'norm', or 'fc_norm' if it is not distilled")
    if norm is None and "blocks.0.norm1.bias" not in tensors:
        raise ValueError("a norm without a bias is ambiguous; give norm='rmsnorm' or 'layernorm', or the model itself")
    norm = norm or "layernorm"
    if parse(norm)[0] not in ("layernorm", "rmsnorm"):
        raise ValueError(f"norm must be 'layernorm' or 'rmsnorm', with or without options, got {norm!r}")
    if qk_norm and norm != "layernorm":
        raise ValueError(f"from_timm needs 'layernorm' with eps 1e-06 for queries and keys, got '{norm}'")
    placement = placement_of(*(f"blocks.0.{name}.norm.weight" in tensors for name in ("attn", "mlp")))
    gated = "blocks.0.mlp.fc1_g.weight" in tensors or packed(tensors)
    if gated and activation not in (None, "silu"):
        raise ValueError(f"from_timm supports gated feed-forward layers only with silu (SwiGLU), got {activation!r}")
    if "pos_embed" not in tensors:
        raise ValueError("without 'pos_embed' the positions are unknown; give the model itself")
    prefix = sum(_count(tensors, name) for name in _PREFIX)
    rows = tensors["pos_embed"].shape[1]
    squares = [side for side in {rows, rows - prefix} if side > 0 and math.isqrt(side) ** 2 == side]
    if len(squares) != 1:
        raise ValueError(
            f"'pos_embed' has {rows} rows, not a square grid after {prefix} prefix tokens; give the model itself"
        )
    side = math.isqrt(squares[0]) * patch
    scale = 1e-5 if "blocks.0.ls1.gamma" in tensors else None
    return Facts(heads, pool, norm, activation or "gelu", fc_norm, qk_norm, placement, scale, side, TABLE)


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    return tensors[name].shape[1] if name in tensors else 0


def _configure(tensors: Mapping[str, Tensor], facts: Facts) -> ViTConfig:
    """The config of a model with these tensors; ValueError if the zoo does not support it."""
    stem = tensors["patch_embed.proj.weight"]
    dim, channels, patch, across = stem.shape
    if patch != across:
        raise ValueError(f"from_timm needs square patches, got {patch} x {across}")
    if "reg_token" in tensors and "dist_token" in tensors:
        raise ValueError("from_timm needs either registers or a distillation token, not both")
    head_dim = len(tensors["blocks.0.attn.qkv.weight"]) // 3 // facts.heads
    options = ["qk_norm='layernorm'"] if facts.qk_norm else []
    options += [f"head_dim={head_dim}"] if head_dim * facts.heads != dim else []
    pool = {"avg": "norm_after_mean" if facts.fc_norm else "mean", "map": "attention"}.get(facts.pool, facts.pool)
    return ViTConfig(
        dim=dim,
        depth=_depth(tensors),
        heads=facts.heads,
        mixer=spelled("softmax", options),
        ffn=_feed_forward(tensors, facts.activation, dim),
        norm=facts.norm,
        placement=facts.placement,
        position=facts.position,
        layer_scale=facts.layer_scale,
        image=facts.image,
        patch=patch,
        channels=channels,
        classes=len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        pool="distilled" if "dist_token" in tensors else pool,
        class_token="cls_token" in tensors,
        first_norm="norm_pre.weight" in tensors,
        registers=_count(tensors, "reg_token"),
    )


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """The number of blocks; ValueError if one between the first and the last has no tensor."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    if missing := sorted({*range(len(numbers))} - numbers):
        raise ValueError(f"'blocks.{missing[0]}' has no tensors, but 'blocks.{max(numbers)}' has; {SUPPORTED}")
    return len(numbers)


def _feed_forward(tensors: Mapping[str, Tensor], activation: str, dim: int) -> str:
    """Our feed-forward with this many hidden channels."""
    hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    gated = "blocks.0.mlp.fc1_g.weight" in tensors or packed(tensors)
    name, usual = ("swiglu", 8 / 3) if gated else ("mlp", 4.0)
    options = [] if gated or activation == "gelu" else [f"activation={activation!r}"]
    return with_width(FFNS, name, usual, hidden, options, dim)


def _fill(config: ViTConfig, facts: Facts, tensors: Mapping[str, Tensor]) -> ViT:
    """The model of the config with timm's tensors: each is used, and each of ours is filled."""
    with shapes_alone():
        model = config.build()
    apart, values = "blocks.0.mlp.fc1_g.weight" in tensors, dict[str, Tensor]()

    def find(key: str, slot: Tensor, take: Callable[..., Tensor], like: Tensor | None) -> tuple[str, Tensor]:
        name = key
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        if facts.fc_norm and name.startswith("norm."):
            name = f"fc_{name}"
        if key == "tokens":
            parts = [take(part) for part in _PREFIX if part in tensors]
            return name, _joined(parts, 1, "the tokens in front of the grid")
        if key == "position.table":
            value = take("pos_embed")
            if value.shape[1] == slot.shape[1] - config.prefix:
                value = F.pad(value, (0, 0, config.prefix, 0))
            return name, value
        if key.startswith("pooler.attention.keys."):
            kind = key.rpartition(".")[2]
            keys, values[kind] = take(f"attn_pool.kv.{kind}").chunk(2)
            return f"attn_pool.kv.{kind}", keys
        if key.startswith("pooler.attention.values."):
            kind = key.rpartition(".")[2]
            return f"attn_pool.kv.{kind}", values[kind]
        if apart and ".mlp.fc1." in name:
            halves = [take(name.replace("fc1", part), _half(like)) for part in ("fc1_g", "fc1_x")]
            return name, _joined(halves, 0, f"the halves of '{name}'")
        return name, take(name, like)

    return fill(model, tensors, _BIASES, find)


def _joined(parts: list[Tensor], axis: int, what: str) -> Tensor:
    if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) != 1:
        raise ValueError(f"{what} do not fit each other: {', '.join(str(list(part.shape)) for part in parts)}")
    return torch.cat(parts, axis)


def _half(like: Tensor | None) -> Tensor | None:
    return None if like is None else like[: len(like) // 2]
