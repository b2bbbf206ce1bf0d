"""The frame of explicit weights, as softmax attention: against the softmax mixer, whose kernel is PyTorch's."""

import copy

import pytest
import torch

from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from helpers import Given, position, randomise, relative
from zoo import create_model
from zoo.layer import Chunks, Context, Notes, Order, Place
from zoo.mixers import MIXERS, scored
from zoo.mixers.attention import Softmax
from zoo.mixers.projected import Projected
from zoo.mixers.scored import Scored
from zoo.models.base import noting
from zoo.spec import make


@pytest.fixture
def few_rows(monkeypatch):
    """Seven queries at a time in inference."""
    monkeypatch.setattr(scored, "LEAST_ROWS", 7)
    monkeypatch.setitem(scored.SCORES_AT_ONCE, "cpu", 1)


def twins() -> tuple[Scored, Softmax]:
    ours, theirs = scattered(Scored(DIM, HEADS)), Softmax(DIM, HEADS).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs  # pyright: ignore[reportReturnType]


CONTEXTS = {
    "plain": GRID,
    "prefix": GRID._replace(prefix=2),
    "mask": GRID._replace(mask=REAL),
    "bias": GRID._replace(bias=Given(torch.randn(HEADS, 30, 30, generator=torch.Generator().manual_seed(0)).double())),
    "rotary": position("rope", DIM, DIM // HEADS, (5, 6)).place(GRID),
    "code": GRID._replace(code=torch.randn(1, 30, DIM, generator=torch.Generator().manual_seed(1)).double()),
    "chunks": Context(grid=(30,), mask=REAL, visible=Chunks(4, 8)),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_frame_is_softmax_attention(name, gradients, few_rows):
    ours, theirs = twins()
    context = CONTEXTS[name]
    x = tokens(context)
    if gradients:
        got, wanted = ours(x, context), theirs(x, context)
    else:
        with torch.no_grad():
            got, wanted = ours(x, context), theirs(x, context)
    if context.mask is not None:
        got, wanted = got * context.mask[..., None], wanted * context.mask[..., None]
    check(got, wanted, (x,) if gradients else ())


WAYS = [(name, row) for name, row in MIXERS.items() if not row.causal and not row.quadratic]


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in WAYS])
def test_some_queries_at_a_time_are_all_at_once(row, few_rows):
    """Inference compares some queries at a time, training all of them."""
    plain = GRID if 2 in row.dimensions else Context(grid=(30,))
    rules = {"order": plain._replace(order=Order(0)), "visible": CONTEXTS["chunks"]}
    kept = [context for rule, context in rules.items() if rule in row.reads_of()]
    for context in (plain, plain._replace(mask=REAL), *kept):
        layer, x = scattered(row(DIM, HEADS, Place(axes=len(context.grid)))), tokens(context)
        with torch.no_grad():
            some = layer(x, context)
        whole = layer(x, context).detach()
        real = slice(None) if context.mask is None else context.mask
        assert relative(some[real], whole[real]) < 1e-12


class Odd(Scored):
    """Keys that heads share, and products in another dtype, of which the second keep their own memory."""

    headwise = True

    def __init__(self, dim, heads):
        super().__init__(dim, heads, kv_heads=1)

    def scores(self, query, key, pairs):
        key = key.expand(-1, query.shape[1], -1, -1)
        first, second = (pairs.products(query.float(), sign * key.float()) for sign in (1, -1))
        return (first - second).to(query.dtype)


@pytest.mark.parametrize("kind", [torch.double, torch.bfloat16])
def test_chunks_share_memory_only_where_it_fits(kind, few_rows):
    layer, x = scattered(Odd(DIM, HEADS)).to(kind), tokens().to(kind)
    with torch.no_grad():
        some = layer(x, GRID)
    assert relative(some.double(), layer(x, GRID).detach().double()) < (1e-6 if kind == torch.double else 0.05)


NOT_ALONE = {"moa"}  # the numbers of tokens of its experts are values


@pytest.mark.parametrize(
    "name", [name for name, row in MIXERS.items() if 2 in row.dimensions and name not in NOT_ALONE]
)
def test_shapes_alone(name, few_rows):
    """On the meta device, with a mask and without."""
    with torch.device("meta"):
        layer, x = make(MIXERS, name, DIM, HEADS, Place(2)).eval(), torch.zeros(2, 30, DIM)
        mask = torch.ones(2, 30, dtype=torch.bool)
    with torch.no_grad():
        for context in (GRID, GRID._replace(mask=mask)):
            y = layer(x, context)
            assert y.shape == x.shape and y.is_meta


def test_causal_tokens_see_those_before_them(few_rows):
    """Prefix tokens see all and are seen by none: as a causal mask of tokens whose prefix comes last."""
    ours, theirs = twins()
    causal = type("Causal", (Scored,), {"causal": True})(DIM, HEADS).double()
    causal.load_state_dict(ours.state_dict())
    context = GRID._replace(prefix=2)
    x = tokens(context)
    places = torch.arange(30)
    bias = torch.where(places[:, None] >= places, 0.0, -torch.inf).double()
    bias = torch.cat([torch.full((30, 2), -torch.inf), bias], 1)
    bias = torch.cat([torch.zeros(2, 32), bias])
    wanted = theirs(x, context._replace(bias=Given(bias.expand(HEADS, -1, -1))))
    check(causal(x, context), wanted, (x,))
    with torch.no_grad():
        check(causal(x, context), wanted)


def test_weights_are_noted(few_rows):
    model = randomise(create_model("vit_micro", mixer=("power", "softmax"), dim=32, depth=2, heads=2, classes=3)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with noting(model) as notes:
            assert torch.equal(model(images), plain)
        model(images)
    assert "blocks.0.steps.0.branch.weights" in notes
    weights = notes["blocks.0.steps.0.branch.weights"]
    number = weights.shape[-1]
    assert weights.shape == (2, 2, number, number)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) and weights.min() >= 0


@pytest.mark.parametrize("name", ["power", "entmax", "differential"])
def test_weights_of_chunks_are_noted_in_their_places(name, few_rows):
    """Of single heads and of all."""
    layer, x, noted = scattered(make(MIXERS, name, DIM, HEADS, Place(2))), tokens(), []
    for gradients in (False, True):
        notes = Notes()
        with torch.set_grad_enabled(gradients):
            layer(x, GRID._replace(notes=notes))
        noted.append(notes.values[".weights"])
    assert relative(*noted) < 1e-12


def test_a_recomputed_block_notes_nothing():
    model = create_model("vit_micro", mixer="power", dim=32, depth=1, heads=2, classes=3).train()
    model.checkpointing = True
    with noting(model) as notes:
        y = model(torch.randn(2, 3, 32, 32))
        notes.clear()
        y.sum().backward()
    assert not notes


@pytest.mark.parametrize("sources", ["kkv", "uuu", "qkx", "qxx", "qvv"])
def test_projections_are_shared_or_omitted(sources):
    class Shared(Scored):
        def __init__(self) -> None:
            Projected.__init__(self, DIM, HEADS, sources=sources)

    ours = scattered(Shared())
    context = CONTEXTS["code"]
    x = tokens(context)
    rows = dict(zip(dict.fromkeys(sources.replace("x", "")), ours.qkv.weight.split(DIM), strict=True))
    biases = dict(zip(rows, ours.qkv.bias.split(DIM), strict=True))
    theirs = copy.deepcopy(ours)
    coded = x + context.code
    parts = [
        each if letter == "x" else torch.nn.functional.linear(each, rows[letter], biases[letter])
        for each, letter in zip((coded, coded, x), sources, strict=True)
    ]
    wanted = theirs.out(theirs.mix(*(part.unflatten(-1, (HEADS, -1)) for part in parts), GRID).flatten(2))
    check(ours(x, context), wanted, (x,))
