"""Mixtures of attention heads against their formulas, token by token."""

import pytest
import torch
from torch import nn

from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from helpers import Given, position, randomise, relative
from zoo import create_model
from zoo.layer import Chunks, Context
from zoo.mixers import MIXERS
from zoo.mixers.attention import Softmax

CONTEXTS = {
    "plain": GRID,
    "prefix and mask": GRID._replace(grid=(4, 7), prefix=2, mask=REAL),
    "code": GRID._replace(code=torch.randn(1, 30, DIM, generator=torch.Generator().manual_seed(1)).double()),
    "chunks": Context(grid=(30,), visible=Chunks(5, 10)),
}


def heads_of(qkv: nn.Linear, rows: list[int], width: int, x: torch.Tensor, context: Context) -> list[torch.Tensor]:
    """Each head of the attention with these projections, [B, N, width] before the output, naively."""
    coded = x if context.code is None else x + context.code
    number = x.shape[1]
    allowed = torch.ones(1, number, number, dtype=torch.bool)
    if context.visible is not None:
        allowed = context.visible.allow(torch.arange(number), torch.arange(number))[None]
    if context.mask is not None:
        allowed = allowed & context.mask[:, None]
    weight, bias = qkv.weight.split(rows), qkv.bias.split(rows)
    queries, keys = (coded @ weight[part].T + bias[part] for part in (0, 1))
    values = x @ weight[2].T + bias[2]
    heads = []
    for head in range(rows[0] // width):
        q = queries[..., head * width : (head + 1) * width]
        shared = head * width % rows[1]
        k, v = (each[..., shared : shared + width] for each in (keys, values))
        scores = torch.einsum("bnd,bmd->bnm", q, k) / width**0.5
        heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
    return heads


def compare(ours: nn.Module, got: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, context: Context) -> None:
    if context.mask is not None:
        got, wanted = got * context.mask[..., None], wanted * context.mask[..., None]
    check(got, wanted, (x, *ours.parameters()))


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(("shared", "top"), [(1, 2), (2, 1), (2, 2), (3, 0), (4, 0), (1, 0)])
def test_moh_is_its_formula(shared, top, context):
    ours = scattered(MIXERS["moh"](DIM, HEADS, shared=shared, top=top))
    x, others = tokens(context), HEADS - shared
    top = top or {3: 2, 1: 1, 0: 0}[others]
    heads = heads_of(ours.qkv, [DIM] * 3, DIM // HEADS, x, context)
    coded = x if context.code is None else x + context.code
    sizes = [shared if shared > 1 else 0, others if others > 1 else 0, 2 if others else 0]
    always, routed, kinds = (coded @ rows.T for rows in ours.router.weight.split(sizes))
    total = torch.zeros_like(x)
    for head in range(HEADS):
        a, b = (2 * kinds.softmax(-1)).unbind(-1) if others else (torch.ones(x.shape[:2]), None)
        if head < shared:
            gate = a * (shared * always.softmax(-1)[..., head] if shared > 1 else 1)
        elif others == 1:
            gate = b
        else:
            least = routed.sort(-1, descending=True).values[..., top - 1]
            kept = routed.exp() * (routed >= least[..., None])
            gate = b * top * kept[..., head - shared] / kept.sum(-1)
        part = ours.out.weight[:, head * (DIM // HEADS) : (head + 1) * (DIM // HEADS)]
        total = total + gate[..., None] * (heads[head] @ part.T)
    compare(ours, ours(x, context), total + ours.out.bias, x, context)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_leave_one_out_is_a_mixture_of_attentions_that_each_lack_a_head(context):
    ours = scattered(MIXERS["moh"](DIM, HEADS, how="leave_one_out"))
    x, width = tokens(context), DIM // HEADS
    heads = heads_of(ours.qkv, [DIM] * 3, width, x, context)
    parts = [head @ rows.T for head, rows in zip(heads, ours.out.weight.split(width, 1), strict=True)]
    coded = x if context.code is None else x + context.code
    gates = (coded @ ours.router.weight.T).softmax(-1)
    total = torch.zeros_like(x)
    for left_out in range(HEADS):
        others = [part for head, part in enumerate(parts) if head != left_out]
        expert = HEADS / (HEADS - 1) * torch.stack(others).sum(0)
        total = total + gates[..., left_out, None] * expert
    compare(ours, ours(x, context), total + ours.out.bias, x, context)


@pytest.mark.parametrize("options", [{"shared": 1, "top": 3}, {"shared": 4}, {"how": "leave_one_out"}], ids=str)
def test_all_heads_with_equal_weights_are_softmax_attention(options):
    ours, theirs = scattered(MIXERS["moh"](DIM, HEADS, **options)), Softmax(DIM, HEADS).double()
    nn.init.zeros_(ours.router.weight)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if "router" not in name})
    bias = torch.randn(HEADS, 32, 32, dtype=torch.float64)
    context = GRID._replace(prefix=2, bias=Given(bias))
    context = position("rope", DIM, DIM // HEADS, (5, 6), 2).place(context)
    x = tokens(context)
    check(ours(x, context), theirs(x, context), (x,))


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("options", [{}, {"experts": 5, "top": 1, "head_dim": 6}, {"experts": 3, "top": 3}], ids=str)
def test_moa_is_its_formula(options, context):
    ours = scattered(MIXERS["moa"](DIM, HEADS, **options))
    x, width = tokens(context), options.get("head_dim", DIM // HEADS)
    number, top = options.get("experts", 8), options.get("top", 4)
    heads = heads_of(ours.qkv, [number * width, width, width], width, x, context)
    outputs = [head @ rows.T for head, rows in zip(heads, ours.out.weight.split(width, 1), strict=True)]
    coded = x if context.code is None else x + context.code
    probable = (coded @ ours.router.weight.T).softmax(-1)
    rows = []
    for sample, token in torch.cartesian_prod(torch.arange(len(x)), torch.arange(x.shape[1])).tolist():
        values = probable[sample, token]
        best = values.argsort(descending=True)[:top]
        sure = values[best].sum().detach()
        rows.append(sum(values[head] / sure * outputs[head][sample, token] for head in best.tolist()))
    wanted = torch.stack(rows).view_as(x) + ours.out.bias
    compare(ours, ours(x, context), wanted, x, context)


def test_moa_turns_queries_and_keys():
    """One expert is softmax attention with one head."""
    ours, theirs = scattered(MIXERS["moa"](DIM, 1, experts=1, top=1)), Softmax(DIM, 1).double()
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if "router" not in name})
    context = position("rope", DIM, DIM, (5, 6), 1).place(GRID._replace(prefix=1))
    x = tokens(context)
    check(ours(x, context), theirs(x, context), (x,))


@pytest.mark.parametrize(
    ("mixer", "heads", "message"),
    [
        ("moh(how='best')", 4, "unknown how 'best'; choose from: topk, leave_one_out"),
        ("moh", 1, "a mixture of heads needs at least 2 heads, got 1"),
        ("moh(shared=5)", 4, "shared and top must be at most the 4 heads together, got 5 and 0"),
        ("moh(shared=2, top=3)", 4, "shared and top must be at most the 4 heads together, got 2 and 3"),
        ("moh(how='leave_one_out', top=2)", 4, "takes neither shared nor top, got shared=1 and top=2"),
        ("moh(how='leave_one_out', shared=2)", 4, "takes neither shared nor top, got shared=2 and top=0"),
        ("moa(experts=3)", 4, "top must be at most the 3 experts, got 4"),
        ("moa", 3, "heads must divide dim 32, got 3; choose heads that do, or give head_dim"),
    ],
)
def test_wrong_options_are_one_line(mixer, heads, message):
    with pytest.raises(ValueError, match="mixer") as error:
        create_model("vit_micro", mixer=mixer, dim=32, depth=1, heads=heads)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.all
@pytest.mark.parametrize("choices", [{"mixer": "moa"}, {"mixer": "moh"}, {"ffn": "moe"}], ids=str)
def test_experts_are_exported_for_any_batch(choices):
    model = randomise(create_model("vit_micro", dim=32, depth=1, heads=4, classes=3, **choices)).eval()
    batch = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=(batch,), strict=False)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert relative(program.module()(images), model(images)) < 1e-5
