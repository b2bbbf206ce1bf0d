"""Attention without softmax, whose products may be taken in either order: the core of the linear mixers."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.tensors import mixing_precision, overwritable, zeroed

PART = 512  # tokens whose features are in memory at once


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    turned: tuple[Tensor, Tensor] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """sum_j (q_i . k_j) v_j / sum_j (q_i . k_j), for query [B, N, H, d], key [B, M, H, d] and value [B, M, H, e], keys
    and queries not negative: [B, N, H, e].

    mask [B, M] is True on real keys. turned replaces query and key only in the numerator (rotary positions); the
    denominator is then at least a hundredth of |q_i| |mean k|, as nothing else bounds the result. The result is
    added to onto [B, N, H, e], which is overwritten if gradients are off. Sums over keys are means, so no number
    grows with their number: half precision holds at any length (the way of Han et al. 2023, arXiv:2308.00442). A query
    that meets no key gives 0. A head costs N M (d + e) or (N + M) d e products, whichever are fewer.
    """
    key = zeroed(key, mask)
    wide, share = torch.promote_types(query.dtype, torch.float32), _share(key, mask)
    # [B, 1, H, d]
    mean = key.mean(1, keepdim=True, dtype=wide) if mask is None else key.sum(1, keepdim=True, dtype=wide) * share
    total = (query * mean).sum(-1, keepdim=True, dtype=wide)  # [B, N, H, 1]
    if turned is not None:
        total = torch.maximum(total, 0.01 * query.to(wide).norm(dim=-1, keepdim=True) * mean.norm(dim=-1, keepdim=True))
    scale = 1.0 / (total + 1e-6 * share)
    highest = query.abs().amax(-1, keepdim=True) if (short := _short(query)) else query
    if turned is not None:
        query, key = turned[0], zeroed(turned[1], mask)
    if short:
        # Keys of about 1, queries that their sum has divided, and half of 1 / M on either side. An overlap counts as at
        # least 1 / 256 of what it could be, or gradients would not fit.
        largest, half = mean.abs().amax(-1, keepdim=True).clamp(min=1e-30), share.sqrt()
        factor = torch.minimum(scale * largest, 256.0 / highest.to(wide).clamp(min=1e-30))
        query, scale = (query * factor).to(query.dtype), torch.ones_like(scale)
        key, value, share = (
            (key * (half / largest)).to(key.dtype),
            (value * half).to(value.dtype),
            torch.ones_like(share),
        )
    mixed, rest = _summed(query, key, value, share)
    scale = (scale * rest).to(mixed.dtype)
    if onto is None:
        return mixed * scale
    return onto.addcmul_(mixed, scale) if overwritable() else torch.addcmul(onto, mixed, scale)


def feature_attention(
    features: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """linear_attention of features(query) and features(key), for query [B, N, H, d], key [B, M, H, d], value [B, M, H,
    e] and a function of single tokens. Without gradients only the features of some tokens are in memory at once."""
    if not overwritable() or _short(query) or max(query.shape[1], key.shape[1]) <= PART:
        return linear_attention(features(query), features(key), value, mask)
    wide, share = torch.promote_types(query.dtype, torch.float32), _share(key, mask)
    mean, summed = value.new_zeros((), dtype=wide), value.new_zeros((), dtype=wide)  # [B, H, 1, f], [B, H, f, e]
    for start in range(0, key.shape[1], PART):
        part = slice(start, start + PART)
        each = zeroed(features(key[:, part]), None if mask is None else mask[:, part]).transpose(1, 2)
        mean = mean + each.sum(2, keepdim=True, dtype=wide) * share
        summed = summed + (each.transpose(-1, -2) @ value[:, part].transpose(1, 2)) * share
    mixed = value.new_empty(*query.shape[:3], value.shape[3])
    for start in range(0, query.shape[1], PART):
        part = slice(start, start + PART)
        each = features(query[:, part]).transpose(1, 2)
        scale = 1.0 / ((each * mean).sum(-1, keepdim=True, dtype=wide) + 1e-6 * share)
        mixed[:, part] = ((each @ summed.to(each.dtype)) * scale.to(each.dtype)).transpose(1, 2)
    return mixed


def mean_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum_j (q_i . k_j) v_j / M over the M real keys, which mask [B, M] tells, for query [B, N, H, d], key [B, M, H, d]
    and value [B, M, H, e]: [B, N, H, e]. It costs as much as linear_attention."""
    key, share = zeroed(key, mask), _share(key, mask)
    if _short(query):
        half = share.sqrt()
        key, value, share = (key * half).to(key.dtype), (value * half).to(value.dtype), torch.ones_like(share)
    mixed, rest = _summed(query, key, value, share)
    return mixed * rest.to(mixed.dtype)


def exponential_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, joint: bool = True
) -> Tensor:
    """sum_jc exp(q_ic + k_jc) v_j / sum_jc exp(q_ic + k_jc), for query [B, N, H, c], key [B, M, H, c] and value
    [B, M, H, e]: [B, N, H, e].

    mask [B, M] is True on real keys; if there is none, all count. joint=False is softmax_c(q_i) softmax_j(k)^T v, where
    each channel has the same weight whatever its keys sum to. The exponents may be of any size: they are taken in
    fp32, and none is above 0.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    if mask is not None:
        hidden = ~(mask | ~mask.any(1, keepdim=True))
        key = key.masked_fill(hidden[:, :, None, None], -torch.inf)
    highest = key.detach().amax(1, keepdim=True)
    key, free = key - highest, overwritable()
    key = key.exp_() if free else key.exp()
    total = key.sum(1, keepdim=True)  # [B, 1, H, c], at least 1
    if joint:
        query = query + (highest + total.log())
    key, query = (key.div_(total) if free else key / total), query.softmax(-1)
    key, query = key.to(value.dtype), query.to(value.dtype)
    return (query.transpose(1, 2) @ (key.permute(0, 2, 3, 1) @ value.transpose(1, 2))).transpose(1, 2)


def _share(key: Tensor, mask: Tensor | None) -> Tensor:
    """One over the number of real keys: a scalar, or [B, 1, 1, 1]."""
    wide = torch.promote_types(key.dtype, torch.float32)
    if mask is None:
        return torch.full((), 1.0 / key.shape[1], dtype=wide, device=key.device)
    return 1.0 / mask.sum(1).clamp(min=1).to(wide)[:, None, None, None]


def _summed(query: Tensor, key: Tensor, value: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of sum_j (q_i . k_j) v_j share: [B, N, H, e], by the cheaper order of the products, and what is left
    to multiply it by."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    queries, keys, width, depth = query.shape[2], key.shape[2], key.shape[3], value.shape[3]
    if queries * keys * (width + depth) < (queries + keys) * width * depth:
        return ((query @ key.transpose(-1, -2)) @ value).transpose(1, 2), share
    summed = (key.transpose(-1, -2) @ value * share).to(query.dtype)
    return (query @ summed).transpose(1, 2), torch.ones_like(share)


def _short(x: Tensor) -> bool:
    """Whether products are taken in fp16, whose range is short."""
    kind = torch.get_autocast_dtype(x.device.type) if mixing_precision(x) else x.dtype
    return kind == torch.float16
