"""Attention by a memory that tokens correct one after another, computed by chunks of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.tensors import unmixed

CHUNK = 32  # tokens; a power of two
SEGMENT = 16 * CHUNK  # tokens whose products are in memory at once


def delta_attention(query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
    """q_i S_i with S_i = S_(i-1) + b_i k_i (v_i - k_i S_(i-1)) and S_0 = 0, for query and key [B, N, H, d], keys of
    length 1 at most, value [B, N, H, e] and rate b [B, N, H, 1] in 0..1: [B, N, H, e].

    Products are taken in the dtype of the inputs, in mixed precision too; memory is linear in N, and N / 32 steps
    depend on each other (Yang et al. 2024, arXiv:2406.06484).
    """
    memory = query.new_zeros(query.shape[0] * query.shape[2], query.shape[3], value.shape[3])
    parts = []
    with unmixed(query):
        for q, k, v, b in zip(*(part.split(SEGMENT, 1) for part in (query, key, value, rate)), strict=True):
            mixed, memory = segment(q, k, v, b, memory)
            parts.append(mixed)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def segment(query: Tensor, key: Tensor, value: Tensor, rate: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The result for some tokens and the memory [B H, d, e] after them."""
    (batch, number, heads), count = query.shape[:3], max(1, -(-query.shape[1] // CHUNK))
    margin = (0, 0, 0, 0, 0, count * CHUNK - number)
    # [chunks, B H, CHUNK, width]
    query, key, value, rate = (
        F.pad(part, margin).unflatten(1, (count, CHUNK)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        for part in (query, key, value, rate)
    )
    scaled = key * rate
    solved = inverse(scaled @ key.transpose(-1, -2))
    # What a chunk adds to the memory S before it: key^T (wanted - known S).
    wanted, known = solved @ (value * rate), solved @ scaled
    memories, changes = [], []
    for keys, new, old in zip(key.transpose(-1, -2), wanted, known, strict=True):
        memories.append(memory)
        changes.append(torch.baddbmm(new, old, memory, alpha=-1))
        memory = torch.baddbmm(memory, keys, changes[-1])
    inside = (query @ key.transpose(-1, -2)).tril()
    mixed = query @ torch.stack(memories) + inside @ torch.stack(changes)
    # [chunks, B H, CHUNK, e] -> [B, N, H, e]
    return mixed.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :number], memory


def inverse(x: Tensor) -> Tensor:
    """(1 + A)^-1 for the part A below the diagonal of x [..., n, n], n a power of two: from the inverses of blocks of
    the diagonal to those of blocks twice as large, since a series in A would cancel. ONNX has no triangular solve."""
    places = torch.arange(x.shape[-1], device=x.device)

    def beside(size: int) -> Tensor:
        rows, columns = places[:, None] // size, places // size
        return x * ((rows // 2 == columns // 2) & (rows > columns))

    found, size = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - beside(1), 2
    while size < x.shape[-1]:
        found, size = found - found @ beside(size) @ found, 2 * size
    return found
