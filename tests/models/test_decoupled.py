"""Decoupled heads and cross-attention to a condition, against naive forms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import prepared, relative
from zoo.layer import Context, Memory
from zoo.models.dit import DiTConfig

TINY = {"dim": 32, "depth": 2, "heads": 2, "image": 8, "channels": 3, "classes": 5, "position": "none"}


def build(**choices: Any) -> Any:
    return prepared(DiTConfig(**TINY | choices).build()).eval()


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def plain(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def branch(step: Any, x: Tensor, heads: int, memory: Tensor | None) -> Tensor:
    layer = step.branch
    if hasattr(layer, "qkv"):
        return linear(layer.out, attention(*linear(layer.qkv, x).chunk(3, -1), heads))
    if hasattr(layer, "queries"):
        parts = linear(layer.queries, x), linear(layer.keys, memory), linear(layer.values, memory)
        return linear(layer.out, attention(*parts, heads))
    return linear(layer.out, F.gelu(linear(layer.expand, x), approximate="tanh"))


def block(module: Any, x: Tensor, cond: Tensor | None, heads: int, memory: Tensor | None = None) -> Tensor:
    for step in module.steps:
        y = plain(x)
        if step.modulation is None:
            x = x + branch(step, y, heads, memory)
            continue
        shift, scale, gate = linear(step.modulation, F.silu(cond)).chunk(3, -1)
        x = x + gate * branch(step, y * (1 + scale) + shift, heads, memory)
    return x


def patches(conv: Any, x: Tensor) -> Tensor:
    squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return squares @ conv.weight.flatten(1).T + conv.bias


def image(model: Any, tokens: Tensor) -> Tensor:
    maps = linear(model.out, tokens).view(len(tokens), 4, 4, 2, 2, 3)
    return maps.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), 3, 8, 8)


@pytest.mark.parametrize("head", [{"head_dim": 48, "head_heads": 3}, {}])
@torch.no_grad()
def test_a_decoupled_head_is_its_formula(head):
    """DDT: the head's condition is silu(token + time), and with another width a linear of it."""
    model = build(head_depth=2, **head)
    x, time, labels = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.2, 0.7]).double(), torch.tensor([1, 5])
    times, vectors = model.time(time)[:, None], model.label_table(labels)[:, None]
    seen = patches(model.stem.conv, x)
    for each in model.blocks:
        seen = block(each, seen, times + vectors, 2)
    cond = seen + times
    if head:
        cond = linear(model.head.project, F.silu(cond))
    tokens = patches(model.head.stem.conv, x)
    for each in model.head.blocks:
        tokens = block(each, tokens, cond, head.get("head_heads", 2))
    shift, scale = linear(model.head.modulation, F.silu(cond)).chunk(2, -1)
    assert relative(model(x, time, labels), image(model, plain(tokens) * (1 + scale) + shift)) < 1e-12


@torch.no_grad()
def test_time_and_class_as_memory():
    """GenTron, and the cross-attention block of DiT: two tokens that `cross` reads, and no modulation."""
    model = build(layout=("mixer", "cross", "ffn"), modulation="cross")
    x, time, labels = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.2, 0.7]).double(), torch.tensor([1, 5])
    memory = torch.stack([model.time(time), model.label_table(labels)], 1)
    tokens = patches(model.stem.conv, x)
    for each in model.blocks:
        tokens = block(each, tokens, None, 2, memory)
    assert relative(model(x, time, labels), image(model, plain(tokens))) < 1e-12


@torch.no_grad()
def test_a_given_memory():
    """Tokens of a text beside the modulation; masked ones change nothing, and a learned token stands for no text."""
    model = build(layout=("mixer", "cross", "ffn"), memory_dim=6)
    x, time = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.2, 0.7]).double()
    text = torch.randn(2, 4, 6).double()
    cond = (model.time(time) + model.label_table(torch.tensor([5, 5])))[:, None]
    tokens = patches(model.stem.conv, x)
    for each in model.blocks:
        tokens = block(each, tokens, cond, 2, linear(model.remember, text))
    shift, scale = linear(model.modulation, F.silu(cond)).chunk(2, -1)
    found = model(x, time, memory=Memory(text))
    assert relative(found, image(model, plain(tokens) * (1 + scale) + shift)) < 1e-12
    longer = torch.cat([text, torch.full((2, 3, 6), 9.0).double()], 1)
    mask = torch.arange(7)[None].expand(2, -1) < 4
    assert relative(model(x, time, memory=Memory(longer, mask)), found) < 1e-12
    assert relative(model(x, time), model(x, time, memory=Memory(model.nothing.expand(2, -1, -1)))) < 1e-12
    with pytest.raises(ValueError, match="takes no memory; its config has memory_dim=0"):
        build()(x, time, memory=Memory(text))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"head_dim": 48}, "head_dim and head_heads would be ignored; set head_depth"),
        (
            {"head_depth": 1, "modulation": "tdn", "class_tokens": 1},
            "head_depth needs modulation adaln or adaln_single",
        ),
        ({"modulation": "cross"}, "modulation 'cross' needs cross in the layout"),
        ({"memory_dim": 6}, "memory_dim would be ignored: the layout has no cross"),
        ({"layout": ("mixer", "cross", "ffn")}, "nothing for 'cross' to read; set memory_dim, or modulation='cross'"),
        ({"layout": ("cross", "ffn"), "memory_dim": 6, "cross": "deformable"}, "needs the maps of a detector"),
        ({"head_depth": 1, "head_heads": 3}, "head.blocks.0: mixer 'softmax': heads must divide dim 32, got 3"),
    ],
    ids=str,
)
def test_refused_configs(choices, words):
    with pytest.raises(ValueError) as error:
        DiTConfig(**TINY | choices)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_context_of_another_grid_keeps_condition_and_memory():
    memory = Memory(torch.zeros(1, 3, 4))
    context = Context(grid=(4, 4), mask=torch.ones(1, 16, dtype=torch.bool), cond=torch.zeros(1, 1, 8), memory=memory)
    moved = context.moved((2, 2))
    assert moved.cond is context.cond and moved.memory is memory and moved.mask is None
    with pytest.raises(ValueError, match="a condition of 16 tokens does not fit"):
        context._replace(cond=torch.zeros(1, 16, 8)).moved((2, 2))
