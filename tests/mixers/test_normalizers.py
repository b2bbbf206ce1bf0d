"""Ways other than softmax from scores to weights, and the options of softmax, against their formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from helpers import Given, relative
from zoo import advance, create_model
from zoo.layer import Chunks, Context, Place, unfinished
from zoo.mixers import MIXERS, normalizers, scored
from zoo.mixers.normalizers import entmax
from zoo.mixers.scored import Scored
from zoo.spec import make

Rule = Callable[[Tensor, int], Tensor]
BIAS = Given(torch.randn(HEADS, 30, 30, generator=torch.Generator().manual_seed(0)).double())
CONTEXTS = {
    "prefix": GRID._replace(prefix=2),
    "mask": GRID._replace(mask=REAL, bias=BIAS),
    "chunks": Context(grid=(30,), mask=REAL, visible=Chunks(4, 8)),
}


@pytest.fixture
def few_rows(monkeypatch):
    """Seven queries at a time in inference."""
    monkeypatch.setattr(scored, "LEAST_ROWS", 7)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)


def build(spec: str) -> Any:
    return scattered(make(MIXERS, spec, DIM, HEADS))


def projected(ours, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [B, H, N, N], which of them count [B, N, N], and values [B, N, H, e]."""
    parts = F.linear(x, ours.qkv.weight, ours.qkv.bias).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (HEADS, -1)) for part in parts)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(DIM // HEADS)
    if context.bias is not None:
        scores = scores + context.bias.values
    number = x.shape[1]
    allowed = torch.ones(len(x), number, number, dtype=torch.bool)
    if context.mask is not None:
        allowed = allowed & context.mask[:, None]
    if (seen := context.visible) is not None:
        for i in range(number):
            for j in range(number):
                first = i // seen.chunk * seen.chunk
                allowed[:, i, j] &= first - seen.left <= j < first + seen.chunk
    return scores, allowed, value, x


def summed(ours, x: Tensor, context: Context, rule: Rule) -> Tensor:
    """Sums of values [B, N, H, e] by the weights that the rule gives for the scores of one query and its keys."""
    scores, allowed, value, _ = projected(ours, x, context)
    rows = torch.zeros_like(scores)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            keys = allowed[b, i].nonzero()[:, 0]
            for h in range(HEADS if len(keys) else 0):
                given = torch.zeros(x.shape[1], dtype=torch.double).index_add(0, keys, rule(scores[b, h, i, keys], h))
                rows = rows.index_put((torch.tensor(b), torch.tensor(h), torch.tensor(i)), given)
    return torch.einsum("bhnm,bmhe->bnhe", rows, value)


def compare(ours, x: Tensor, context: Context, wanted: Tensor) -> None:
    """With gradients, and without them some queries at a time; padded tokens do not count."""
    real = torch.ones(1, 1, 1) if context.mask is None else context.mask[..., None]
    check(ours(x, context) * real, wanted * real, (x,))
    with torch.no_grad():
        check(ours(x, context) * real, wanted * real)


def sparse(scores: Tensor, alpha: float) -> Tensor:
    """alpha-entmax by its definition, with the Jacobian of Peters et al."""
    z = (alpha - 1) * scores.detach()

    def weights(tau: float) -> Tensor:
        return (z - tau).clamp(min=0) ** (1 / (alpha - 1))

    top = z.max().item()
    p = weights(float(brentq(lambda tau: weights(tau).sum().item() - 1, top - 1 - 1e-9, top, xtol=1e-15)))
    g = torch.where(p > 0, p ** (2 - alpha), 0.0)
    return p + (g.diag() - g[:, None] * g / g.sum()) @ (scores - scores.detach())


def largest(scores: Tensor, k: int) -> Tensor:
    order = scores.argsort(descending=True)[:k]
    return torch.zeros_like(scores).index_add(0, order, scores[order].softmax(0))


RULES: dict[str, Callable[..., Rule]] = {
    "power": lambda ours: lambda s, h: s**2 / (s**2).sum(),
    "power(power=4)": lambda ours: lambda s, h: s**4 / (s**4).sum(),
    "entmax": lambda ours: lambda s, h: sparse(s, 1.5),
    "entmax(alpha=1.0)": lambda ours: lambda s, h: s.softmax(0),
    "entmax(alpha=1.2)": lambda ours: lambda s, h: sparse(s, 1.2),
    "entmax(alpha=2.0)": lambda ours: lambda s, h: sparse(s, 2.0),
    "entmax(learned=True)": lambda ours: lambda s, h: sparse(s, 1 + ours.sparsity[h].sigmoid().item()),
    "topk(k=3)": lambda ours: lambda s, h: largest(s, 3),
    "topk(k=100)": lambda ours: lambda s, h: s.softmax(0),
    "nap": lambda ours: (
        lambda s, h: ours.gain[h] * (s - s.mean()) / (s.var(unbiased=False) + 1e-6).sqrt() + ours.shift[h]
    ),
    "rela(norm='none')": lambda ours: lambda s, h: s.clamp(min=0),
    "rela(norm='none', scale='length')": lambda ours: lambda s, h: s.clamp(min=0) / math.sqrt(len(s) / 2),
    "relaxed(rate=0.3)": lambda ours: lambda s, h: s.softmax(0),
    "head_mask": lambda ours: lambda s, h: s.softmax(0),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("spec", RULES)
def test_weights_are_their_formula(spec, context, few_rows):
    ours = build(spec)
    x = tokens(CONTEXTS[context], batch=3 if CONTEXTS[context].mask is not None else 1)
    mixed = summed(ours, x, CONTEXTS[context], RULES[spec](ours))
    compare(ours, x, CONTEXTS[context], ours.out(mixed.flatten(2)))


@pytest.mark.parametrize("alpha", [1.01, 1.2, 1.5, 1.9, 2.0])
def test_entmax_has_the_gradient_of_its_definition(alpha):
    scores = torch.randn(4, 9, dtype=torch.double)
    scores[:2, 6:] = -torch.inf
    weights = entmax(scores, alpha)
    assert torch.equal(weights[:2, 6:], torch.zeros(2, 3)) and (weights.sum(-1) - 1).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda finite: entmax(finite, alpha), scores[2:].requires_grad_())
    several = torch.full((2, 1), min(alpha, 1.99), dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: entmax(scores[2:].detach(), each), several)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
@pytest.mark.parametrize("gate", [False, True, None])
def test_rela_normalizes_all_heads_together_and_gates(norm, gate, few_rows):
    ours = build(f"rela(norm='{norm}', gate={gate})")
    context = CONTEXTS["prefix"]
    x = tokens(context, batch=1)
    z = summed(ours, x, context, lambda s, h: s.clamp(min=0)).flatten(2)
    y = z
    if norm == "layernorm":
        y = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        y = y * ours.output_norm.weight + ours.output_norm.bias
    if norm == "rmsnorm":
        y = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.output_norm.weight
    if gate or gate is None and norm == "rmsnorm":
        y = y / (1 + (-ours.gate * z).exp())
    compare(ours, x, context, ours.out(y))


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("context", ["prefix", "mask"])
def test_sinkhorn_scales_queries_and_keys_in_turn(steps, context, few_rows):
    ours, context = build(f"sinkhorn(steps={steps})"), CONTEXTS[context]
    x = tokens(context)
    scores, _, value, _ = projected(ours, x, context)
    mixed = []
    for b in range(len(x)):
        real = slice(None) if context.mask is None else context.mask[b]
        weights = scores[b][:, real][:, :, real].exp()
        for step in range(steps):
            weights = weights / weights.sum(2 if step % 2 == 0 else 1, keepdim=True)
        sums = torch.einsum("hnm,mhe->nhe", weights, value[b, real])
        mixed.append(torch.zeros_like(value[b]).index_put((torch.arange(len(value[b]))[real],), sums))
    compare(ours, x, context, ours.out(torch.stack(mixed).flatten(2)))


def test_sinkhorn_adds_a_bias_to_some_queries_at_a_time(few_rows):
    asked = []

    class Counted:
        def between(self, queries, keys):
            asked.append(len(queries))
            return BIAS.between(queries, keys)

    ours, x = build("sinkhorn"), tokens()
    with torch.no_grad():
        check(ours(x, GRID._replace(bias=Counted())), ours(x, GRID._replace(bias=BIAS)))
    assert max(asked) <= 7 and sum(asked) % 30 == 0


def test_topk_takes_weights_in_the_precision_of_softmax(monkeypatch):
    """As in mixed precision on CUDA, where softmax of half precision is single."""
    monkeypatch.setattr(normalizers, "softmax", lambda scores: scores.float().softmax(-1))
    scores = torch.randn(1, HEADS, 5, 9, dtype=torch.bfloat16)
    got = build("topk(k=3)").weights(scores, scored.Pairs(0, 0, None, GRID))
    assert got.dtype == scores.dtype and ((got > 0).sum(-1) == 3).all()
    check(got.double().sum(-1), torch.ones(1, HEADS, 5).double(), tolerance=1e-2)


def test_relaxed_attention_relaxes_in_training_alone():
    ours, context = build("relaxed(rate=0.3)").train(), CONTEXTS["chunks"]
    x = tokens(context)
    mixed = summed(ours, x, context, lambda s, h: 0.7 * s.softmax(0) + 0.3 / len(s))
    compare(ours, x, context, ours.out(mixed.flatten(2)))


def test_head_mask_masks_heads_at_random_and_keeps_their_sum():
    ours, x = build("head_mask(rate=0.3)"), tokens()
    ours.out = nn.Identity()
    whole = ours(x, GRID).unflatten(-1, (HEADS, -1))
    counts = torch.zeros(HEADS + 1)
    masked = torch.zeros(HEADS)
    ours.train()
    for seed in range(400):
        torch.manual_seed(seed)
        y = ours(x, GRID)
        y, ratio = y.unflatten(-1, (HEADS, -1)), (y.unflatten(-1, (HEADS, -1)) / whole).mean((0, 1, 3))
        kept = (ratio.abs() > 0.5).double()
        assert relative(y, whole * (kept * HEADS / kept.sum())[:, None]) < 1e-12
        counts[int(kept.sum())] += 1
        masked += 1 - kept
    torch.manual_seed(399)
    assert torch.equal(ours(x, GRID).unflatten(-1, (HEADS, -1)), y)
    assert counts[0] == 0 and (counts[1:] > 0).all()
    assert ((masked / 400 - 0.3).abs() < 0.08).all()


def before(prefix: int, number: int) -> Tensor:
    """Which keys [N, N] are those of a query and of tokens before it, prefix tokens last."""
    order = [*range(prefix, number), *range(prefix)]
    seen = torch.zeros(number, number, dtype=torch.bool)
    for place, query in enumerate(order):
        seen[query, order[: place + 1]] = True
    seen[:prefix] = True
    return seen


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("normalized", [False, True])
def test_the_mask_of_causal_fades_in(progress, context, normalized, few_rows):
    ours, context = build(f"causal(until=0.4, normalized={normalized})"), CONTEXTS[context]
    advance(ours, progress)
    x = tokens(context)
    scores, allowed, value, _ = projected(ours, x, context)
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).nan_to_num()
    blend = max(0.0, 1 - progress / 0.4)
    weights = weights * torch.where(before(context.prefix, x.shape[1]), 1.0, blend)
    if normalized:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1.0)
    compare(ours, x, context, ours.out(torch.einsum("bhnm,bmhe->bnhe", weights, value).flatten(2)))


def test_normalized_causal_attention_ends_as_masked_scores():
    ours, masked = build("causal(until=0.0, normalized=True)"), type("Masked", (Scored,), {"causal": True})(DIM, HEADS)
    masked.double().load_state_dict({name: each for name, each in ours.state_dict().items() if name != "blend"})
    x = tokens(CONTEXTS["prefix"])
    compare(ours, x, CONTEXTS["prefix"], masked(x, CONTEXTS["prefix"]))


def test_the_blend_of_causal_is_kept_and_never_rises():
    choices: dict[str, Any] = {"causal": True, "dim": 32, "depth": 1, "heads": 2, "classes": 3}
    model = create_model("vit_micro", mixer="causal(until=0.8)", **choices).eval()
    assert unfinished(model) and not unfinished(create_model("vit_micro", mixer="causal(until=0.0)", **choices))
    for progress, share in ((0.2, 0.75), (0.1, 0.75), (0.6, 0.25)):
        advance(model, progress)
        (layer,) = (each for each in model.modules() if isinstance(each, MIXERS["causal"]))
        assert layer.share == pytest.approx(share) and layer.blend.item() == pytest.approx(share)
    again = create_model("vit_micro", mixer="causal(until=0.8)", **choices).eval()
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(again(images), model(images))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    advance(again, 0.3)
    assert torch.equal(again(images), model(images))
    advance(again, 1.0)
    assert not unfinished(again)


SOFTMAX = (
    "softmax(null=True)",
    "softmax(log_n=True)",
    "softmax(temperature='learned')",
    "softmax(qk_norm='l2')",
    "softmax(qk_norm='layernorm', temperature='learned', null=True, log_n=True, kv_heads=2)",
    "softmax(qk_norm='l2', temperature='learned', null=True, log_n=True, kv_heads=1, head_dim=12)",
)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("spec", SOFTMAX)
def test_options_of_softmax_are_their_formulas(spec, rotary, context):
    ours, context = build(spec), CONTEXTS[context]
    x, width, groups = tokens(context), ours.head_dim, HEADS // ours.kv_heads
    number = x.shape[1]
    parts = F.linear(x, ours.qkv.weight, ours.qkv.bias).split(ours.widths, -1)
    query, key, value = (part.unflatten(-1, (-1, width)) for part in parts)
    if ours.scale is not None:
        query, key = query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True)
    elif ours.query is not None:
        query, key = ours.query(query, context), ours.key(key, context)
    if rotary:
        angles = torch.rand(number, width // 2, dtype=torch.double)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        context = context._replace(rotary=torch.stack([angles.cos(), angles.sin()]))
        halves = [torch.complex(*part.chunk(2, -1)) * turn for part in (query, key)]
        query, key = (torch.cat([half.real, half.imag], -1) for half in halves)
    key, value = (part.repeat_interleave(groups, 2) for part in (key, value))
    allowed = torch.ones(1, number, number, dtype=torch.bool)
    if context.mask is not None:
        allowed = context.mask[:, None].expand(-1, number, -1)
    if context.visible is not None:
        places = torch.arange(number)
        allowed = allowed & context.visible.allow(places, places)
    factor = torch.full((HEADS, 1, 1), width**-0.5, dtype=torch.double) if ours.scale is None else ours.scale
    if ours.temperature is not None:
        factor = factor * ours.temperature[:, None, None]
    if ours.log_n:
        factor = factor * allowed.sum(-1).clamp(min=1).double().log()[:, None, :, None]
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * factor
    scores = scores.masked_fill(~allowed[:, None], -torch.inf) + (0.0 if context.bias is None else context.bias.values)
    if ours.null is not None:
        null_key, null_value = ours.null.repeat_interleave(groups, 1)
        last = torch.einsum("bnhd,hd->bhn", query, null_key)[..., None] * factor
        scores = torch.cat([scores, last], -1)
        value = torch.cat([value, null_value.expand(len(x), 1, -1, -1)], 1)
    mixed = torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1).nan_to_num(), value)
    compare(ours, x, context, ours.out(mixed.flatten(2)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_null_key_is_that_of_torch(masked, biased):
    ours = build("softmax(null=True)")
    theirs = nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, batch_first=True).double()
    null = {name: each.reshape(1, 1, DIM) for name, each in zip(("bias_k", "bias_v"), ours.null, strict=True)}
    state = {f"in_proj_{name}": each for name, each in ours.qkv.state_dict().items()}
    theirs.load_state_dict(state | null | {f"out_proj.{name}": each for name, each in ours.out.state_dict().items()})
    x = tokens()
    away = torch.zeros(REAL.shape, dtype=torch.double).masked_fill(~REAL, -torch.inf)
    wanted, _ = theirs(
        x,
        x,
        x,
        key_padding_mask=away if masked else None,
        attn_mask=BIAS.values.repeat(3, 1, 1) if biased else None,
        need_weights=False,
    )
    check(ours(x, GRID._replace(mask=REAL if masked else None, bias=BIAS if biased else None)), wanted, (x,))


def test_the_factor_of_unit_vectors_starts_from_the_number_of_tokens():
    assert build_start(Place(2, (14, 14), 1)) == pytest.approx(math.log2(197**2 - 197))
    assert build_start(Place(1)) == pytest.approx(math.log2(256**2 - 256))
    assert build_start(Place(2, (1, 1))) == 1.0


def build_start(place: Place) -> float:
    return MIXERS["softmax"](DIM, HEADS, place, qk_norm="l2").scale.item()  # pyright: ignore


WRONG = {
    "power(power=3)": "power must be even, got 3",
    "entmax(alpha=0.5)": "alpha must be 1, or from 1.01 to 2, got 0.5",
    "entmax(alpha=2.5)": "alpha must be 1, or from 1.01 to 2, got 2.5",
    "entmax(alpha=2.0, learned=True)": "a learned alpha must start from 1.01 to below 2, got 2.0",
    "topk(k=0)": "option k of 'topk' must be finite and >= 1, got 0",
    "rela(norm='batch')": "unknown norm 'batch'",
    "rela(scale='n')": "unknown scale 'n'",
    "rela(gate='x')": "gate must be True, False or None, got 'x'",
    "sinkhorn(steps=2)": "steps must be odd, got 2",
    "head_mask(rate=1.0)": "rate must be below 1, got 1.0",
    "relaxed(rate=1.5)": "rate must be at most 1, got 1.5",
    "causal(until=1.5)": "until must be at most 1, got 1.5",
    "topk(k=33)": "k must be at most 32, as there are few tokens, got 33",
    "softmax(qk_norm='l1')": "unknown qk_norm 'l1'",
    "softmax(temperature='high')": "unknown temperature 'high'",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_options_are_refused(spec):
    with pytest.raises(ValueError, match=WRONG[spec].replace("(", r"\(")) as error:
        make(MIXERS, spec, DIM, HEADS, Place(grid=(4, 6)))
    assert "\n" not in str(error.value)
