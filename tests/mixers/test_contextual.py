"""Attention with positions that depend on queries and keys: against other libraries, and pair by pair."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import PosEmbedRel
from transformers import DebertaV2Config, Wav2Vec2BertConfig
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from formulas import DIM, GRID, HEADS, check, copied, scattered, tokens
from helpers import position, rectangle
from zoo import create_model
from zoo.layer import Context, Place
from zoo.mixers import MIXERS, scored
from zoo.mixers.projected import rotate
from zoo.spec import make

WIDTH = DIM // HEADS
TIME = Context(grid=(11,))
SPECS = ("shaw(span=3)", "shaw(span=2, on='qk', values=True)", "irpe", "irpe(method='cross', on='qkv')")
SPECS += ("irpe(method='euclidean', on='qk', ratio=1.2)", "disentangled(span=2)", "cope(positions=3)")
SPECS += ("cope(positions=4, causal=True)", "coca", "tra")


def built(spec: str, axes: int) -> Any:
    return scattered(make(MIXERS, spec, DIM, HEADS, Place(axes)))


def split(layer, x):
    """Queries, keys and values [B, N, H, d]."""
    parts = F.linear(x, layer.qkv.weight, layer.qkv.bias).split(layer.widths, -1)
    return [part.unflatten(-1, (HEADS, -1)) for part in parts]


def placed(context):
    """The row and the column of each token, None for prefix tokens."""
    return [None] * context.prefix + list(itertools.product(*map(range, context.grid)))


def contexts(axes: int, prefix: int) -> Any:
    """A batch of three with padding, in the middle of the sequence on images."""
    grid, real = ((11,), [(11,), (6,), (3,)]) if axes == 1 else ((3, 4), [(3, 4), (2, 3), (3, 2)])
    mask = torch.stack([rectangle(grid, each) for each in real])
    return Context(grid=grid, prefix=prefix, mask=torch.cat([mask.new_ones(3, prefix), mask], 1))


def compared(layer, context, mixed, x):
    """The layer's real tokens against a mixture [B, N, H, e]."""
    wanted = layer.out(mixed.flatten(2))
    real = torch.ones(x.shape[:2], dtype=torch.bool) if context.mask is None else context.mask
    check(layer(x, context)[real], wanted[real], (x, layer.qkv.weight))


# Vectors of offsets


def piecewise(x, a):
    """The bucket of an offset along one axis."""
    far = a + math.log(max(abs(x), 1e-9) / a) / math.log(8) * a
    return int(math.copysign(min(round(abs(x) if abs(x) <= a else far), int(2 * a)), x))


def clipped(span, lowest, highest):
    """Buckets of clipped offsets, a table for each axis."""
    return lambda offset: [max(lowest, min(highest, each)) + span for each in offset]


def product(offset):
    g = [piecewise(each, 1.9) + 3 for each in offset]
    return [g[0] if len(g) == 1 else 7 * g[0] + g[1]]


BUCKETS = {
    "shaw(span=3)": lambda offset: clipped(3, -3, 3)([-each for each in offset]),
    "shaw(span=2, on='qk', values=True)": lambda offset: clipped(2, -2, 2)([-each for each in offset]),
    "irpe": product,
    "irpe(method='cross', on='qkv')": lambda offset: [piecewise(each, 1.9) + 3 for each in offset],
    "irpe(method='euclidean', on='qk', ratio=1.2)": lambda offset: [piecewise(round(math.hypot(*offset)), 1.2)],
    "disentangled(span=2)": clipped(2, -2, 1),
}


def dense(tables, context, buckets):
    """The summed vectors of every pair: [N, N, H, d]."""
    places = placed(context)

    def vector(i, j):
        if places[i] is None or places[j] is None:
            rows = [-1] * len(tables)
        else:
            rows = buckets([own - other for own, other in zip(places[i], places[j], strict=True)])
        return torch.stack([table[:, row] for table, row in zip(tables, rows, strict=True)]).sum(0).expand(HEADS, -1)

    number = range(len(places))
    return torch.stack([torch.stack([vector(i, j) for j in number]) for i in number])


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("spec", BUCKETS)
def test_vectors_of_offsets_are_their_formula(spec, axes, prefix):
    layer, context = built(spec, axes), contexts(axes, prefix)
    x = tokens(context)
    query, key, value = split(layer, x)
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    rows = dense(layer.on_keys, context, BUCKETS[spec])
    scores = scores + torch.einsum("bihd,ijhd->bhij", query, rows)
    if "on='qk" in spec or spec.startswith("disentangled"):
        columns = rows if spec.startswith("shaw") else dense(layer.on_queries, context, BUCKETS[spec])
        scores = scores + torch.einsum("bjhd,ijhd->bhij", key, columns)
    scores = scores / math.sqrt(3 * WIDTH if spec.startswith("disentangled") else WIDTH)
    weights = scores.masked_fill(~context.mask[:, None, None], -torch.inf).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, value)
    if layer.on_values is not None:
        mixed = mixed + torch.einsum("bhij,ijhd->bihd", weights, dense(layer.on_values, context, BUCKETS[spec]))
    compared(layer, context, mixed, x)


def test_shaw_is_the_relative_key_of_wav2vec2_bert():
    ends: dict[str, Any] = {"left_max_position_embeddings": 3, "right_max_position_embeddings": 3}
    config = Wav2Vec2BertConfig(
        hidden_size=DIM, num_attention_heads=HEADS, position_embeddings_type="relative_key", **ends
    )
    config._attn_implementation = "eager"
    theirs: Any = scattered(Wav2Vec2BertSelfAttention(config))
    ours = built("shaw(span=3)", 1)
    weights = {f"out.{name}": each for name, each in theirs.linear_out.state_dict().items()}
    for name in ("weight", "bias"):
        weights[f"qkv.{name}"] = torch.cat([getattr(getattr(theirs, f"linear_{part}"), name) for part in "qkv"])
    prefix = torch.zeros(1, WIDTH, dtype=torch.float64)
    weights["on_keys"] = torch.cat([theirs.distance_embedding.weight, prefix])
    copied(ours, weights)
    x = tokens(TIME)
    check(ours(x, TIME), theirs(x)[0], (x,))


def test_shaw_on_images_is_the_attention_of_bottleneck_transformers():
    theirs: Any = scattered(PosEmbedRel((5, 6), WIDTH, 1.0))
    ours = built("shaw(span=9)", 2)
    with torch.no_grad():
        ours.on_keys[0, 0, 5:14] = theirs.height_rel
        ours.on_keys[1, 0, 4:15] = theirs.width_rel
    x = tokens()
    query, key, value = (part.transpose(1, 2) for part in split(ours, x))
    query = query / math.sqrt(WIDTH)
    bias = theirs(query.flatten(0, 1)).unflatten(0, (3, HEADS))
    mixed = (query @ key.mT + bias).softmax(-1) @ value
    check(ours(x, GRID), ours.out(mixed.transpose(1, 2).flatten(2)), (x,))


@pytest.mark.parametrize("span", [4, 32])
def test_disentangled_is_that_of_deberta(span):
    dim = 12 * HEADS  # there the square root of 3 d, which DeBERTa takes in fp32, is 6
    config = DebertaV2Config(
        hidden_size=dim, num_attention_heads=HEADS, pos_att_type=["c2p", "p2c"], relative_attention=True
    )
    config.max_relative_positions, config.position_buckets, config.share_att_key = span, -1, False
    theirs: Any = scattered(DisentangledSelfAttention(config))
    embeddings = torch.randn(2 * span, dim, dtype=torch.float64)
    ours: Any = scattered(MIXERS["disentangled"](dim, HEADS, Place(1), span=span))
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(getattr(theirs, f"{part}_proj"), name) for part in ("query", "key", "value")]
            getattr(ours.qkv, name).copy_(torch.cat(parts))
        for mine, other in ((ours.on_keys, theirs.pos_key_proj), (ours.on_queries, theirs.pos_query_proj)):
            mine[0, :, :-1] = other(embeddings).unflatten(-1, (HEADS, -1)).transpose(0, 1)
    x = tokens(TIME, dim=dim)
    wanted = theirs(x, torch.ones(3, 1, 11, 11), rel_embeddings=embeddings)[0]
    check(ours(x, TIME), ours.out(wanted), (x,))


# Counted positions


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_cope_is_its_formula(causal, axes, prefix):
    positions = 3
    layer, context = built(f"cope(positions={positions}, causal={causal})", axes), contexts(axes, prefix)
    x = tokens(context)
    query, key, value = split(layer, x)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(WIDTH)
    gates = 1 / (1 + torch.exp(-scores))
    every = torch.einsum("bihd,ld->bhil", query, layer.table) / math.sqrt(WIDTH)
    number = range(x.shape[1])
    mixed = torch.zeros_like(value)
    for b, h, i in itertools.product(range(3), range(HEADS), number):
        seen, logits = [], []
        for j in number:
            if not context.mask[b, j] or (causal and i >= prefix and not prefix <= j <= i):
                continue
            logit = scores[b, h, i, j]
            if i >= prefix and j >= prefix:
                between = [m for m in range(min(i, j), max(i, j) + 1) if context.mask[b, m]]
                p = torch.stack([gates[b, h, i, m] for m in between or [i]]).sum().clamp(max=positions - 1)
                low = int(p)
                row = every[b, h, i, positions * (j > i) :]
                logit = logit + row[low] + (p - low) * (row[min(low + 1, positions - 1)] - row[low])
            seen.append(j)
            logits.append(logit)
        mixed[b, i, h] = torch.stack(logits).softmax(0) @ value[b, seen, h] if seen else 0.0
    compared(layer, context, mixed, x)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("axes", [1, 2])
def test_tra_is_its_formula(axes, prefix):
    layer, context = built("tra", axes), contexts(axes, prefix)
    x = tokens(context)
    query, key, value = split(layer, x)
    query, decay = query[..., :-1], F.logsigmoid(query[..., -1])
    query, key = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(WIDTH)
    number = x.shape[1]
    order = [*range(prefix, number), *range(prefix)]
    mixed, alone = torch.zeros_like(value), 0
    for b, h, i in itertools.product(range(3), range(HEADS), range(number)):
        allowed = order if i < prefix else order[: order.index(i) + 1]
        kept = [j for j in allowed if context.mask[b, j] and scores[b, h, i, j] > 0]
        if not kept:
            alone += 1
            continue
        logits = [scores[b, h, i, j] + decay[b, i, h] * (len(kept) - rank) for rank, j in enumerate(kept)]
        mixed[b, i, h] = torch.stack(logits).softmax(0) @ value[b, kept, h]
    assert alone, "some query sees no key"
    compared(layer, context, mixed, x)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("axes", [1, 2])
def test_coca_turns_keys_that_are_collinear_with_the_query(axes, turned):
    """k_j = q_i * t_j for each query, both turned as rotary positions do."""
    layer, context = built("coca", axes), contexts(axes, 2)
    if turned:
        context = position("rope", DIM, WIDTH, context.grid, 2).place(context)
    x = tokens(context)
    query, slack, value = split(layer, x)
    twice = torch.cat([slack.relu(), slack.relu()], -1)
    scores = []
    for i in range(x.shape[1]):
        keys = rotate(query[:, i : i + 1] * twice, context.rotary)
        scores.append(torch.einsum("bhd,bjhd->bhj", rotate(query, context.rotary)[:, i], keys))
    scores = torch.stack(scores, 2) / math.sqrt(WIDTH)
    weights = scores.masked_fill(~context.mask[:, None, None], -torch.inf).softmax(-1)
    compared(layer, context, torch.einsum("bhij,bjhd->bihd", weights, value), x)


# What they share


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_some_queries_at_a_time_give_the_same(spec, axes, monkeypatch):
    monkeypatch.setattr(scored, "LEAST_ROWS", 5)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)
    layer, context = built(spec, axes), contexts(axes, 2)
    x = tokens(context)
    wanted = layer(x, context)
    with torch.no_grad():
        check(layer(x, context), wanted)


WRONG = {
    "shaw(on='q')": "unknown on 'q'; did you mean qk? choose from: k, qk",
    "irpe(on='v')": "unknown on 'v'; choose from: k, qk, qkv",
    "irpe(method='quant')": "unknown method 'quant'; choose from: product, cross, euclidean",
    "irpe(ratio=0.4)": "ratio must be from 0.5 to 32, got 0.4",
    "irpe(ratio=100000.0)": "ratio must be from 0.5 to 32, got 100000.0",
    "cope(positions=1)": "positions must be >= 2, got 1",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_options(spec):
    with pytest.raises(ValueError) as caught:
        make(MIXERS, spec, DIM, HEADS)
    assert str(caught.value) == WRONG[spec]


def test_coca_needs_heads_of_even_width():
    with pytest.raises(ValueError, match="^mixer 'coca': .* must be even, got 5$"):
        create_model("vit_micro", mixer="coca", dim=20, heads=4)
