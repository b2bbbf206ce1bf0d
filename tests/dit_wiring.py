"""The published wiring of LightningDiT and JiT in fp64, from formulas and tensors in their names."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normed(state: State, name: str, x: Tensor) -> Tensor:
    """RMSNorm with a weight, or LayerNorm without one."""
    if (weight := state.get(f"{name}.weight")) is not None:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def stored(table: Tensor) -> Tensor:
    """As rounded by files in fp32."""
    return table.float().double()


def positions(side: int, dim: int) -> Tensor:
    """[side^2, dim]: sines and cosines of x, then those of y."""
    rates = 10000.0 ** (-torch.arange(dim // 4).double() / (dim // 4))
    y, x = torch.arange(side**2) // side, torch.arange(side**2) % side
    parts = [wave(place[:, None] * rates) for place in (x, y) for wave in (torch.sin, torch.cos)]
    return stored(torch.cat(parts, 1))


def angles(side: int, width: int) -> Tensor:
    """[side^2, width / 2]: y times the rates of a quarter of the head's channels, then x."""
    rates = 10000.0 ** (-torch.arange(width // 4).double() / (width // 4))
    y, x = torch.arange(side**2) // side, torch.arange(side**2) % side
    return torch.cat([place[:, None] * rates for place in (y, x)], 1)


def turned(x: Tensor, side: int) -> Tensor:
    """[B, H, N, d] with neighbouring channels as complex numbers; tokens before the grid stay."""
    angle = angles(side, x.shape[-1])
    turns = torch.complex(stored(angle.cos()), stored(angle.sin()))
    turns = torch.cat([turns.new_ones(x.shape[2] - len(turns), turns.shape[1]), turns])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def timed(state: State, time: Tensor) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(128).float() / 128)  # in fp32, as published
    place = time.float()[:, None] * rates
    waves = torch.cat([place.cos(), place.sin()], 1).double()
    return linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", waves)))


def attention(state: State, name: str, x: Tensor, heads: int, side: int, rotary: bool) -> Tensor:
    shape = (*x.shape[:2], heads, x.shape[2] // heads)
    q, k, v = (part.view(shape).transpose(1, 2) for part in linear(state, f"{name}.qkv", x).chunk(3, -1))
    if f"{name}.q_norm.weight" in state:
        q, k = normed(state, f"{name}.q_norm", q), normed(state, f"{name}.k_norm", k)
    if rotary:
        q, k = turned(q, side), turned(k, side)
    share = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(shape[-1]), -1)
    return linear(state, f"{name}.proj", (share @ v).transpose(1, 2).reshape(x.shape))


def feed(state: State, name: str, x: Tensor) -> Tensor:
    if f"{name}.w12.weight" in state:
        gate, value = linear(state, f"{name}.w12", x).chunk(2, -1)
        return linear(state, f"{name}.w3", silu(gate) * value)
    hidden = linear(state, f"{name}.fc1", x)
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return linear(state, f"{name}.fc2", hidden)


def block(state: State, index: int, x: Tensor, c: Tensor, heads: int, side: int, rotary: bool) -> Tensor:
    name = f"blocks.{index}"
    parts = linear(state, f"{name}.adaLN_modulation.1", silu(c))[:, None].chunk(6, -1)
    shift, scale, gate = parts[:3]
    y = normed(state, f"{name}.norm1", x) * (1 + scale) + shift
    x = x + gate * attention(state, f"{name}.attn", y, heads, side, rotary)
    shift, scale, gate = parts[3:]
    y = normed(state, f"{name}.norm2", x) * (1 + scale) + shift
    return x + gate * feed(state, f"{name}.mlp", y)


def patches(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C p p]."""
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, H', W', p, p]
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def ending(state: State, x: Tensor, c: Tensor, side: int, patch: int) -> Tensor:
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, -1)
    x = normed(state, "final_layer.norm_final", x) * (1 + scale) + shift
    x = linear(state, "final_layer.linear", x).unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    return torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3)


def lightningdit(state: State, x: Tensor, time: Tensor, labels: Tensor, heads: int, depth: int, patch: int) -> Tensor:
    """data - noise at a time that counts from the noise."""
    side = x.shape[2] // patch
    c = timed(state, time) + state["y_embedder.embedding_table.weight"][labels]
    tokens = linear(state, "x_embedder.proj", patches(x, patch)) + state["pos_embed"]
    for index in range(depth):
        tokens = block(state, index, tokens, c, heads, side, "feat_rope.freqs_cos" in state)
    return ending(state, tokens, c, side, patch)


def jit(state: State, x: Tensor, time: Tensor, labels: Tensor, heads: int, depth: int, start: int) -> Tensor:
    """Data at a time that counts from the noise; patches of 2; class tokens from block `start` on."""
    side = x.shape[2] // 2
    label = state["y_embedder.embedding_table.weight"][labels]
    c = timed(state, time) + label
    narrow = patches(x, 2) @ state["x_embedder.proj1.weight"].flatten(1).T
    tokens = linear(state, "x_embedder.proj2", narrow) + state["pos_embed"]
    for index in range(depth):
        if index == start:
            tokens = torch.cat([label[:, None] + state["in_context_posemb"], tokens], 1)
        tokens = block(state, index, tokens, c, heads, side, True)
    return ending(state, tokens[:, -(side**2) :], c, side, 2)


def weights(dim: int, depth: int, outputs: int, classes: int, *, norms: bool, heads: int = 0) -> dict[str, Tensor]:
    """Random tensors that both have, heads > 0 for norms of queries and keys: none is zero, gains are near 1."""
    shapes: dict[str, tuple[int, ...]] = {"t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim)}
    gains = {"final_layer.norm_final": dim} if norms else {}
    for index in range(depth):
        own = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "adaLN_modulation.1": (6 * dim, dim)}
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in own.items()}
        if norms:
            gains |= {f"blocks.{index}.norm{each}": dim for each in (1, 2)}
        if heads:
            gains |= {f"blocks.{index}.attn.{each}_norm": dim // heads for each in "qk"}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * dim, dim), "final_layer.linear": (outputs, dim)}
    state = {f"{name}.weight": 1 + 0.3 * torch.randn(width).double() for name, width in gains.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, dim).double()
    return state | linears(shapes)


def linears(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape).double() / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0]).double()
    return state
