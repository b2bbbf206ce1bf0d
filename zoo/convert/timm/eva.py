"""timm's Eva (EVA, EVA-02, DINOv3) in the layout of its VisionTransformer."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.timm.parts import TABLE, Facts, activation_of, norm_of, one, placement_of, spelled


def read(model: Any) -> tuple[Facts, dict[str, Tensor]]:
    """The facts and the tensors of an Eva of known parts, named and ordered as those of a VisionTransformer; ValueError
    if their combination has no counterpart."""
    blocks = list(model.blocks)
    fc_norm = type(model.fc_norm) is not nn.Identity
    if model.global_pool not in ("token", "avg", "map"):
        raise ValueError(f"from_timm needs a model that pools by 'token', 'avg' or 'map', got {model.global_pool!r}")
    if fc_norm == (type(model.norm) is not nn.Identity):
        raise ValueError("from_timm needs a model with one final norm, 'norm' or 'fc_norm', not none or both")
    if model.global_pool == "map" and (fc_norm or model.num_prefix_tokens):
        raise ValueError("from_timm does not support attention pooling over a class token, or fc_norm behind it")
    if any(getattr(block.attn, "gate", None) is not None for block in blocks):
        raise ValueError("from_timm does not support gates of attention")
    if any(getattr(block.attn, "num_kv_heads", block.attn.num_heads) != block.attn.num_heads for block in blocks):
        raise ValueError("from_timm does not support heads that share keys in an Eva")
    pools = [] if model.attn_pool is None else [model.attn_pool]
    heads = one("number of heads", [part.num_heads for part in [*(block.attn for block in blocks), *pools]])
    norms = [part for block in blocks for part in (block.norm1, block.norm2, block.attn.norm, block.mlp.norm)]
    norms += [model.norm_pre, model.norm, model.fc_norm, *(pool.norm for pool in pools)]
    norm = one("norm", [norm_of(part) for part in norms if type(part) is not nn.Identity])
    pairs = [norm_of(part) for block in blocks for part in (block.attn.q_norm, block.attn.k_norm)]
    if (qk_norm := one("norm of queries and keys", pairs)) not in ("none", "layernorm"):
        raise ValueError(f"from_timm needs 'layernorm' with eps 1e-06 for queries and keys, got '{qk_norm}'")
    mlps = [part.mlp for part in [*blocks, *pools]]
    gated = one("kind of mlp", [type(mlp).__name__ for mlp in mlps]) != "Mlp"
    activation = one("activation", [activation_of(mlp.act) for mlp in mlps])
    if gated and (activation != "silu" or any(getattr(mlp, "gate_last", False) for mlp in mlps)):
        raise ValueError("from_timm supports gated feed-forward layers only with silu on the first half (SwiGLU)")
    placement = placement_of(
        one("norm inside attention", [type(block.attn.norm) is not nn.Identity for block in blocks]),
        one("norm inside mlp", [type(block.mlp.norm) is not nn.Identity for block in blocks]),
    )
    if one("kind of block", [type(block).__name__ for block in blocks]) == "EvaBlockPostNorm":
        if placement != "pre":
            raise ValueError("from_timm does not support norms inside the branches with norms behind them")
        placement = "res_post"
    scales = [getattr(block, name, None) for block in blocks for name in ("gamma_1", "gamma_2")]
    scaled = one("use of layer scale", [scale is not None for scale in scales])
    facts = Facts(
        heads=heads,
        pool=model.global_pool,
        norm=norm,
        activation=activation,
        fc_norm=fc_norm,
        qk_norm=qk_norm != "none",
        placement=placement,
        layer_scale=blocks[0].init_values if scaled else None,
        image=_side(model),
        position=_position(model),
    )
    return facts, _tensors(model, heads)


def _side(model: Any) -> int:
    sides, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if sides[0] != sides[1] or sides[0] % patch[0]:
        raise ValueError(f"from_timm needs square images that the patch divides, got {sides[0]} x {sides[1]}")
    return sides[0]


def _position(model: Any) -> str:
    """Our position; ValueError if timm's has no counterpart."""
    rope, table = model.rope, model.pos_embed is not None
    if rope is None:
        return TABLE if table else "none"
    plain = (rope.grid_offset, rope.grid_indexing, rope.normalize_coords) == (0.0, "ij", "separate")
    base = [] if rope.temperature == 10000 else [f"base={float(rope.temperature or 0)!r}"]
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        if not plain or table or rope.min_period is not None or not rope.temperature:
            raise ValueError("from_timm needs rotary positions of DINOv3 with a temperature, each axis by itself")
        return spelled("rope", [*base, "centred=True"])
    if not plain or rope.in_pixels or rope.linear_bands or rope.grid_type != "index":
        raise ValueError("from_timm needs rotary positions that count the rows and columns of tokens from 0")
    if rope.ref_feat_shape is not None:
        side = one("side of the grid of rotary positions", list(rope.ref_feat_shape))
        base.append(f"reference={side}")
    return spelled("learned_rope" if table else "rope", [*(["antialias=True"] if table else []), *base])


def _tensors(model: Any, heads: int) -> dict[str, Tensor]:
    """The state dict with one projection to queries, keys and values. Rotary positions that turn neighbouring channels
    turn channels half a head apart here, so queries and keys are reordered."""
    found = dict(model.state_dict())
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", block.attn
        width = attn.head_dim * heads
        for kind in ("weight", "bias"):
            parts = _parts(found, name, kind, width)
            if parts is None:
                continue
            if model.rope is not None and not attn.rotate_half:
                parts[:2] = [_halves(part, attn.head_dim) for part in parts[:2]]
            found[f"{name}.qkv.{kind}"] = torch.cat(parts)
        if model.rope is not None and not attn.rotate_half:
            for key in [key for key in found if re.match(rf"{re.escape(name)}\.[qk]_norm\.", key)]:
                found[key] = _halves(found[key], attn.head_dim)
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in found.items()}


def _parts(found: dict[str, Tensor], name: str, kind: str, width: int) -> list[Tensor] | None:
    """The weights or biases of queries, keys and values, taken out; None if there are none."""
    if f"{name}.qkv.{kind}" in found:
        return list(found.pop(f"{name}.qkv.{kind}").split(width))
    names = [f"{name}.{each}_proj.{kind}" for each in "qkv"]
    if kind == "bias" and f"{name}.q_bias" in found:
        names = [f"{name}.{each}_bias" for each in "qkv"]
    given = [found.pop(each, None) for each in names]
    like = next((each for each in given if each is not None), None)
    return None if like is None else [torch.zeros_like(like) if each is None else each for each in given]


def _halves(rows: Tensor, width: int) -> Tensor:
    """Rows of heads of this width, in each the even ones before the odd ones."""
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)
