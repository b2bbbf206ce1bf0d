"""Other scores than the scaled product, each written out pair by pair; what they become in special cases."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from formulas import DIM, GRID, HEADS, REAL, SINGLE, check, copied, scattered, tokens
from helpers import Given, position
from zoo.layer import Chunks, Context, Memory
from zoo.mixers import CROSSES, MIXERS, scored
from zoo.spec import make

WIDTH = DIM // HEADS
BIAS = Given(torch.randn(HEADS, 30, 30, generator=torch.Generator().manual_seed(0)).double())
MASKED = GRID._replace(mask=REAL)
CONTEXTS = {"plain": GRID, "mask": MASKED, "bias": MASKED._replace(bias=BIAS)}
every_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


def split(ours: Any, x: Tensor, widths: list[int]) -> list[Tensor]:
    """Queries, keys and values [B, H, N, width]."""
    parts = F.linear(x, ours.qkv.weight, ours.qkv.bias).split([HEADS * width for width in widths], -1)
    return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]


def seen(scores: Tensor, context: Context, fill: float = -torch.inf) -> Tensor:
    """Scores with the bias, and `fill` for padding."""
    if context.bias is not None:
        scores = scores + context.bias.values
    return scores if context.mask is None else scores.masked_fill(~context.mask[:, None, None], fill)


def compare(ours: Any, x: Tensor, context: Context, weights: Tensor, value: Tensor) -> None:
    wanted = ours.out((weights @ value).transpose(1, 2).flatten(2))
    real = 1 if context.mask is None else context.mask[..., None]
    check(ours(x, context) * real, wanted * real, (x,))


@every_context
@pytest.mark.parametrize("values", [False, True])
def test_ssa_is_its_formula(context, values):
    ours: Any = scattered(MIXERS["ssa"](DIM, HEADS, values=values))
    x = tokens()
    query, key, value = split(ours, x, [WIDTH] * 3)
    count = torch.full((3,), 30.0).double() if context.mask is None else context.mask.sum(1).double()
    temperature, gate = (torch.ones(3, HEADS, 30).double() for _ in range(2))
    for head in range(HEADS):
        own = torch.tanh(F.gelu(query[:, head]) @ ours.of_query[head])
        temperature[:, head] = 1 + own + torch.sigmoid(ours.of_length[head]) * count.log()[:, None]
        if values:
            gate[:, head] = 1 + torch.tanh(F.gelu(value[:, head]) @ ours.of_value[head])
    value = value * gate[..., None]
    scores = temperature[..., None] * torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(WIDTH)
    compare(ours, x, context, seen(scores, context).softmax(-1), value)


def test_the_temperature_of_ssa_is_the_same_at_any_angle():
    """Rotary positions turn queries and keys, not what the temperature is computed from."""
    ours: Any = scattered(MIXERS["ssa"](DIM, HEADS))
    soft: Any = scattered(MIXERS["softmax"](DIM, HEADS))
    with torch.no_grad():
        ours.of_length.fill_(-100.0)
        ours.of_value.zero_()
        for part in ("qkv", "out"):
            getattr(soft, part).load_state_dict(getattr(ours, part).state_dict())
    context = position("rope", DIM, WIDTH, (5, 6)).place(GRID)
    x = tokens()
    query, key, value = soft.project(x, context)
    factor = 1 + torch.tanh(torch.einsum("bnhd,hd->bnh", F.gelu(query), ours.of_query))
    check(ours(x, context), soft.out(soft.mix(query * factor[..., None], key, value, context).flatten(2)), (x,))


@every_context
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("keys", "shifted"), [(2, False), (3, True)])
def test_mgk_is_its_formula(context, keys, shifted, hard):
    ours: Any = scattered(MIXERS["mgk"](DIM, HEADS, keys=keys, shifted=shifted, hard=hard))
    x = tokens()
    query, key, value = split(ours, x, [WIDTH, WIDTH if shifted else keys * WIDTH, WIDTH])
    distances = torch.empty(keys, 3, HEADS, 30, 30).double()
    for m in range(keys):
        one = key + ours.shift[:, m, None] if shifted else key[..., m * WIDTH : (m + 1) * WIDTH]
        distances[m] = (query[..., :, None, :] - one[..., None, :, :]).square().sum(-1)
    likeness = torch.exp(-distances / (2 * math.sqrt(WIDTH)))
    shares = None if hard else ours.shares.softmax(-1).T[:, None, :, None, None]
    mixed = likeness.amax(0) if hard else (likeness * shares).sum(0)
    if context.bias is not None:
        mixed = mixed * context.bias.values.exp()
    mixed = seen(mixed, context._replace(bias=None), 0.0)
    compare(ours, x, context, mixed / mixed.sum(-1, keepdim=True), value)


def test_one_key_of_a_prefix_and_all_others_is_gaussian_attention():
    ours: Any = scattered(MIXERS["mgk"](DIM, HEADS, keys=1))
    context = GRID._replace(prefix=2)
    x = tokens(context)
    query, key, value = split(ours, x, [WIDTH] * 3)
    compare(ours, x, context, (-torch.cdist(query, key).square() / (2 * math.sqrt(WIDTH))).softmax(-1), value)


@every_context
@pytest.mark.parametrize(("score", "width"), [("mlp", 16), ("concat", 5)])
def test_additive_is_a_network_of_both_tokens(context, score, width):
    """The first layer of the network, of both tokens beside each other, in each head."""
    ours: Any = scattered(MIXERS["additive"](DIM, HEADS, score=score, width=width))
    x = tokens()
    rows, bias = ours.qkv.weight.split([HEADS * width] * 2 + [DIM]), ours.qkv.bias.split([HEADS * width] * 2 + [DIM])
    both = torch.cat([x[:, :, None].expand(-1, -1, 30, -1), x[:, None].expand(-1, 30, -1, -1)], -1)
    hidden = F.linear(both, torch.cat(rows[:2], 1), bias[0] + bias[1]).unflatten(-1, (HEADS, width))
    hidden = hidden.relu() if score == "mlp" else hidden.tanh()
    scores = (hidden * ours.units).sum(-1).permute(0, 3, 1, 2)
    value = F.linear(x, rows[2], bias[2]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    compare(ours, x, context, seen(scores, context).softmax(-1), value)


@pytest.mark.parametrize(("score", "width"), [("mlp", 16), ("concat", 5)])
def test_additive_cross_attention_is_a_network_of_a_query_and_a_token_of_the_memory(score, width):
    """Pair by pair. The second sample has seven tokens, the third none: it is finite."""
    ours: Any = scattered(make(CROSSES, f"additive(score='{score}', width={width})", DIM, HEADS))
    beside = Context(grid=(11,))
    x, code, there, there_code = tokens(), tokens(batch=1), tokens(beside), tokens(beside)
    real = torch.arange(11) < torch.tensor([11, 7, 0])[:, None]
    got = ours(x, GRID._replace(memory=Memory(there, real, there_code), code=code))
    act = torch.relu if score == "mlp" else torch.tanh
    queries, keys = ours.queries(x + code), ours.keys(there + there_code)
    for sample, number in enumerate([11, 7]):
        heads = []
        for head, units in enumerate(ours.units):
            own = slice(head * width, (head + 1) * width)
            pairs = [[act(q + k) @ units for k in keys[sample, :number, own]] for q in queries[sample, :, own]]
            weights = torch.stack([torch.stack(row) for row in pairs]).softmax(-1)
            values = ours.values(there[sample, :number])
            heads.append(weights @ values[:, head * WIDTH : (head + 1) * WIDTH])
        check(got[sample], ours.out(torch.cat(heads, -1)), (x, code, there, there_code, ours.units))
    assert got.isfinite().all()


@every_context
def test_general_scores_are_bilinear_forms_of_the_tokens(context):
    ours: Any = scattered(MIXERS["additive"](DIM, HEADS, score="general"))
    x = tokens()
    keys, values = ours.qkv(x).chunk(2, -1)
    query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (x, keys, values))
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(WIDTH)
    compare(ours, x, context, seen(scores, context).softmax(-1), value)


@every_context
def test_coda_is_its_formula(context):
    ours: Any = scattered(MIXERS["coda"](DIM, HEADS))
    x = tokens()
    query, key, value = split(ours, x, [WIDTH] * 3)
    alike = torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(WIDTH)
    apart = (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1) / math.sqrt(WIDTH)
    alike = alike if context.bias is None else alike + context.bias.values
    weights = alike.tanh() * torch.sigmoid(-apart) * 2
    compare(ours, x, context, seen(weights, context._replace(bias=None), 0.0), value)


@every_context
def test_polar_is_its_formula(context):
    ours: Any = scattered(MIXERS["polar"](DIM, HEADS))
    x = tokens()
    query, key, value = split(ours, x, [WIDTH] * 3)
    query, key = (torch.complex(*each.chunk(2, -1)) for each in (query, key))
    sizes = query.abs()[..., :, None, :] * key.abs()[..., None, :, :]
    angles = query.angle()[..., :, None, :] - key.angle()[..., None, :, :]
    turned = ours.slope[:, None, None] * angles + ours.phase[:, None, None]
    scores = (sizes * turned.cos()).sum(-1) / math.sqrt(WIDTH)
    compare(ours, x, context, seen(scores, context).softmax(-1), value)


def test_polar_starts_as_softmax_attention_with_rotary_positions():
    ours: Any = MIXERS["polar"](DIM, HEADS).double()
    weights = {name: each for name, each in ours.state_dict().items() if name.split(".")[0] in ("qkv", "out")}
    soft: Any = copied(MIXERS["softmax"](DIM, HEADS), weights)
    context = position("rope", DIM, WIDTH, (5, 6)).place(GRID)
    x = tokens()
    check(ours(x, context), soft(x, context), (x,), tolerance=SINGLE)


def test_tokens_of_zeros_have_finite_gradients_in_polar():
    ours = MIXERS["polar"](DIM, HEADS)
    x = torch.zeros(1, 30, DIM, requires_grad=True)
    y = ours(x, GRID)
    (y + 1).square().sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


CHUNKED = ["differential", "ssa", "mgk", "mgk(keys=3, shifted=True)", "additive", "coda", "polar"]
NEAR = Context(grid=(30,), mask=REAL, visible=Chunks(4, 8))


@pytest.mark.parametrize(
    ("mixer", "context"),
    [("dint", MASKED), *((each, context) for each in CHUNKED for context in (MASKED, NEAR))],
)
def test_some_queries_at_a_time_are_all_queries(mixer, context, monkeypatch):
    monkeypatch.setattr(scored, "LEAST_ROWS", 7)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)
    ours = scattered(make(MIXERS, mixer, DIM, HEADS))
    x = tokens(context)
    real = REAL[..., None]
    with torch.no_grad():
        got = ours(x, context)
    check(got * real, ours(x, context) * real)


@pytest.mark.parametrize(
    ("spec", "heads", "message"),
    [
        ("additive(score='dot')", HEADS, "unknown score 'dot'; choose from: mlp, concat, general"),
        ("additive(score='general', width=8)", HEADS, "takes no width, got width=8"),
        ("additive", 5, "heads must divide dim 32, got 5"),
        ("mgk(keys=0)", HEADS, "option keys of 'mgk' must be finite and >= 1, got 0"),
        ("polar", 32, "dim / heads must be even, got 1"),
    ],
)
def test_wrong_options_are_refused(spec, heads, message):
    with pytest.raises(ValueError, match=message):
        make(MIXERS, spec, DIM, heads)


def test_cross_attention_has_no_bilinear_score():
    with pytest.raises(ValueError, match="unknown score 'general'; choose from: mlp, concat"):
        make(CROSSES, "additive(score='general')", DIM, HEADS)
