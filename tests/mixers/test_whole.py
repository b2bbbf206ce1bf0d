"""Weights that depend on other queries or heads, written out one by one, and repeated attention."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from formulas import DIM, GRID, HEADS, REAL, check, copied, scattered, tokens
from helpers import Given
from zoo.layer import Context, Place
from zoo.mixers import MIXERS
from zoo.spec import make

WIDTH = DIM // HEADS
LINE = Context(grid=(30,), mask=REAL)
BIAS = Given(torch.randn(HEADS, 30, 30, generator=torch.Generator().manual_seed(0)).double())


def projected(ours: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores [B, H, N, N] and values [B, H, N, d]."""
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in ours.qkv(x).chunk(3, -1))
    return torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(WIDTH), value


@pytest.mark.parametrize(
    "context", [Context(grid=(30,)), LINE, LINE._replace(bias=BIAS)], ids=["plain", "mask", "bias"]
)
@pytest.mark.parametrize(("queries", "keys", "group"), [(5, 5, 0), (3, 7, 2), (1, 3, 1)])
def test_multi_token_sums_neighbouring_scores(queries, keys, group, context):
    ours: Any = scattered(
        make(MIXERS, f"multi_token(queries={queries}, keys={keys}, group={group})", DIM, HEADS, Place(1, index=3))
    )
    x = tokens(context)
    scores, value = projected(ours, x)
    if context.bias is not None:
        scores = scores + context.bias.values
    real = torch.ones(3, 30).bool() if context.mask is None else context.mask
    scores = scores * (real[:, None, :, None] & real[:, None, None])
    near = torch.zeros_like(scores)
    for head in range(HEADS):
        for down in range(-(queries // 2), queries // 2 + 1):
            for right in range(-(keys // 2), keys // 2 + 1):
                part = F.pad(scores[:, head], (keys, keys, queries, queries))
                part = part[:, queries + down : queries + down + 30, keys + right : keys + right + 30]
                weight = ours.kernel[head, 0, down + queries // 2, right + keys // 2]
                near = near + weight * part[:, None] * F.one_hot(torch.tensor(head), HEADS)[:, None, None]
    maps = near.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    size = group or HEADS
    mixed = []
    for head in range(HEADS):
        first = head // size * size
        mixed.append(
            sum(ours.across[head // size, head - first, other] * maps[:, first + other] for other in range(size))
        )
    y = (torch.stack(mixed, 1) @ value).transpose(1, 2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.head_norm.weight * (0.2 + 0.6 * math.exp(-0.9))
    check(ours(x, context) * real[..., None], ours.out(y.flatten(2)) * real[..., None], (x,))


def test_multi_token_starts_as_softmax_attention_with_a_norm():
    ours: Any = MIXERS["multi_token"](DIM, HEADS, Place(1)).double()
    x = tokens(LINE)
    scores, value = projected(ours, x)
    y = F.rms_norm(
        (scores.masked_fill(~REAL[:, None, None], -torch.inf).softmax(-1) @ value).transpose(1, 2), (WIDTH,), None, 1e-5
    )
    check(ours(x, LINE) * REAL[..., None], ours.out(0.8 * y.flatten(2)) * REAL[..., None], (x,))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_hides_tokens_one_by_one(prefix, masked):
    """On an image whose padding lies between real tokens; prefix tokens put last."""
    ours: Any = scattered(MIXERS["selective"](DIM, HEADS))
    real = torch.ones(3, 5, 6).bool()
    if masked:
        real[1, 3:], real[1, :, 4:], real[2, 1:], real[2, :, 1:] = False, False, False, False
    real = torch.cat([torch.ones(3, prefix).bool(), real.flatten(1)], 1)
    context = GRID._replace(prefix=prefix, mask=real if masked else None)
    x = tokens(context)
    scores, value = projected(ours, x)
    number = prefix + 30
    order = [*range(prefix, number), *range(prefix)]
    rows = []
    for sample in range(3):
        present = [place for place in order if real[sample, place]]
        weights = torch.zeros(HEADS, number, number).double()
        hidden = torch.zeros(number).double()
        for rank, query in enumerate(present):
            keys = torch.tensor(present if query < prefix else present[: rank + 1])
            row = (scores[sample, :, query][:, keys] - hidden[keys]).softmax(-1)
            weights = weights.index_put((torch.arange(HEADS)[:, None], torch.tensor(query), keys), row)
            own = scores[sample, 0, query].relu()
            able = [key in keys and key not in (query, prefix) for key in range(number)]
            hidden = hidden + own * torch.tensor(able)
        rows.append(weights)
    wanted = ours.out((torch.stack(rows) @ value).transpose(1, 2).flatten(2))
    check(ours(x, context) * real[..., None], wanted * real[..., None], (x,))


@pytest.mark.parametrize("context", [GRID, GRID._replace(mask=REAL, bias=BIAS)], ids=["plain", "mask and bias"])
@pytest.mark.parametrize("steps", [1, 3])
def test_fixed_point_repeats_attention(steps, context):
    ours: Any = scattered(MIXERS["fixed_point"](DIM, HEADS, steps=steps))
    x = tokens()
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in ours.qkv(x).chunk(3, -1))
    for _ in range(steps):
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH)
        if context.bias is not None:
            scores = (scores + context.bias.values).masked_fill(~REAL[:, None, None], -torch.inf)
        query = scores.softmax(-1) @ value
    real = 1 if context.mask is None else REAL[..., None]
    check(ours(x, context) * real, ours.out(query.transpose(1, 2).flatten(2)) * real, (x,))


def test_many_steps_reach_a_fixed_point():
    """With small weights; with large ones it may cycle."""
    ours: Any = scattered(MIXERS["fixed_point"](DIM, HEADS, steps=200))
    with torch.no_grad():
        ours.qkv.weight.mul_(0.3)
    state = ours.state_dict()
    x = tokens()
    once = copied(MIXERS["fixed_point"](DIM, HEADS, steps=1), state)
    query, key, value = ours.project(x, GRID)
    y = ours.mix(query, key, value, GRID)
    assert (once.mix(y, key, value, GRID) - y).abs().max() < 1e-9 * y.abs().max()  # pyright: ignore
    assert (once.mix(query, key, value, GRID) - y).abs().max() > 1e-2 * y.abs().max()  # pyright: ignore


def test_gradients_pass_through_the_last_steps():
    """Those of 2 steps from the result of 3, taken as given."""
    ours: Any = scattered(MIXERS["fixed_point"](DIM, HEADS, steps=5, backward=2))
    state = ours.state_dict()
    first, last = (copied(MIXERS["fixed_point"](DIM, HEADS, steps=steps), state) for steps in (3, 2))
    x = tokens()
    query, key, value = ours.project(x, GRID)
    wanted = last.mix(first.mix(query, key, value, GRID).detach(), key, value, GRID)  # pyright: ignore
    check(ours(x, GRID), ours.out(wanted.flatten(2)), (x,))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("multi_token(queries=4)", "queries and keys must be odd, got 4 and 5"),
        ("multi_token(keys=2)", "queries and keys must be odd, got 5 and 2"),
        ("multi_token(group=3)", "group must divide the 4 heads, got 3"),
        ("fixed_point(steps=2, backward=3)", "backward must be at most the 2 steps, got 3"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make(MIXERS, spec, DIM, HEADS)
