"""Routing against loops over tokens; both forms of the layers that use it, and the losses that they report."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zoo.ffns
import zoo.mixers.routed
from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from zoo.ffns import FFNS
from zoo.kernels.routing import apart, balance_loss, grouped, logits_of, route, spread, to_slots, z_loss
from zoo.layer import Layer, Losses
from zoo.mixers import MIXERS
from zoo.spec import make

NUMBER, TOP = 5, 2


def logits() -> torch.Tensor:
    return torch.randn(3, 30, NUMBER, dtype=torch.float64, requires_grad=True)


def test_each_token_takes_its_most_probable_experts():
    given = logits().detach()
    routes = route(given, TOP, REAL)
    for sample, token in torch.cartesian_prod(torch.arange(3), torch.arange(30)).tolist():
        values = given[sample, token].exp() / given[sample, token].exp().sum()
        best = values.argsort(descending=True)[:TOP].tolist()
        assert routes.experts[sample, token].tolist() == best
        for slot, expert in enumerate(best):
            wanted = values[expert] if REAL[sample, token] else 0.0
            assert routes.gates[sample, token, slot] == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_their_formulas(masked):
    mask, given = REAL if masked else None, logits()
    routes = route(given, TOP, mask)
    real = [(sample, token) for sample in range(3) for token in range(30) if not masked or REAL[sample, token]]
    chosen, probable, squares = [0.0] * NUMBER, [torch.zeros(())] * NUMBER, torch.zeros(())
    for place in real:
        values = given[place].softmax(-1)
        for expert in values.topk(TOP).indices.tolist():
            chosen[expert] += 1 / (TOP * len(real))
        probable = [total + value / len(real) for total, value in zip(probable, values, strict=True)]
        squares = squares + given[place].exp().sum().log() ** 2 / len(real)
    wanted = NUMBER * sum(share * mean for share, mean in zip(chosen, probable, strict=True))
    check(balance_loss(routes, mask), torch.as_tensor(wanted), (given,))
    check(z_loss(given, mask), squares, (given,))


def test_the_balance_loss_is_from_one_to_the_number_of_experts():
    alike = torch.eye(NUMBER).double()[None]
    assert balance_loss(route(100 * alike, 1)).item() == pytest.approx(1.0)
    assert balance_loss(route(100 * alike[:, :1].expand(-1, 30, -1), 1)).item() == pytest.approx(NUMBER)
    assert balance_loss(route(alike[:, :0], 1)).item() == 0.0
    assert balance_loss(route(alike, 1), torch.zeros(1, NUMBER, dtype=torch.bool)).item() == 0.0


def test_rows_go_to_their_experts_and_back():
    routes, x = route(logits(), TOP, REAL), tokens()
    weights, biases = torch.randn(NUMBER, 7, DIM).double(), torch.randn(NUMBER, 7).double()
    found = grouped(routes.experts, NUMBER, REAL)
    assert sum(found.sizes) == TOP * int(REAL.sum())
    rows = apart(x.flatten(0, 1)[found.slots // TOP], weights, biases, found.sizes)
    got = to_slots(rows, found, routes.experts.shape)
    every = torch.einsum("bnc,edc->bned", x, weights) + biases
    wanted = every.take_along_dim(routes.experts[..., None], 2) * REAL[..., None, None]
    check(got, wanted, (x,))
    wide = spread(got, routes.experts, NUMBER)
    assert torch.equal(wide.take_along_dim(routes.experts[..., None], 2), got)
    assert (wide != 0).any(-1).sum() == TOP * REAL.sum()


def test_mixed_precision_does_not_round_logits():
    torch.manual_seed(0)
    router, x = nn.Linear(DIM, NUMBER), torch.randn(2, 9, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got = router(x).float(), logits_of(router, x)
    assert not torch.equal(got, rounded)
    assert got.dtype == torch.float32 and torch.equal(got, router(x))
    assert logits_of(copy.deepcopy(router).bfloat16(), x.bfloat16()).dtype == torch.float32


LAYERS = {
    "moe": "moe()",
    "narrow": "moe(experts=6, top=3, ratio=1.0, bias=False)",
    "shared": "moe(shared=2, gated=True, activation='silu')",
    "moa": "moa()",
    "wide": "moa(experts=6, top=2, head_dim=12)",
}


def layer_of(name: str) -> Any:
    spec = LAYERS[name]
    return make(FFNS, spec, DIM) if spec.startswith("moe") else make(MIXERS, spec, DIM, HEADS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_are_equal(name, masked, monkeypatch):
    """Each expert on its own tokens, and all experts on all tokens, as in a compiled program."""
    layer = scattered(layer_of(name))
    context, x = GRID._replace(mask=REAL if masked else None), tokens()
    got = layer(x, context)
    for module in (zoo.ffns, zoo.mixers.routed):
        monkeypatch.setattr(module, "every_expert", lambda *layers: True)
    check(got, layer(x, context), (x, *layer.parameters()))


@pytest.mark.parametrize("name", LAYERS)
def test_padded_tokens_are_routed_nowhere(name, monkeypatch):
    layer = scattered(layer_of(name))
    asked = []
    for module in (zoo.ffns, zoo.mixers.routed):
        monkeypatch.setattr(module, "grouped", lambda *given: asked.append(grouped(*given)) or asked[-1])
    layer(tokens(), GRID._replace(mask=REAL))
    assert [sum(found.sizes) for found in asked] == [layer.top * int(REAL.sum())]


def added(layer: Layer, x: torch.Tensor, context: Any) -> list[torch.Tensor]:
    losses = Losses()
    layer(x, context._replace(losses=losses))
    return losses.values


@pytest.mark.parametrize("spec", ["moe()", "moa()", "moh(shared=1, top=2)"])
def test_losses_are_of_training_and_of_real_tokens(spec):
    layer: Any = scattered(make(FFNS, spec, DIM) if spec == "moe()" else make(MIXERS, spec, DIM, HEADS))
    x, context = tokens(batch=1), GRID._replace(mask=REAL[1:2])
    assert added(layer, x, context) == []
    layer.train()
    with torch.no_grad():
        assert added(layer, x, context) == []
    (loss,) = added(layer, x, context)
    given = x[:, REAL[1]]
    values = layer.router(given)
    if spec.startswith("moh"):
        values = values[..., :3]  # of the heads that are not shared
    wanted = balance_loss(route(values, layer.top))
    check(loss, wanted + 0.1 * z_loss(values) if spec == "moa()" else wanted, (x,))


@pytest.mark.parametrize("spec", ["moe(experts=2)", "moa(experts=4)", "moh()", "moh(how='leave_one_out')"])
def test_where_there_is_no_choice_there_is_no_loss(spec):
    layer = make(FFNS, spec, DIM) if spec.startswith("moe") else make(MIXERS, spec, DIM, 2)
    assert not layer.reports_loss and added(layer.train(), torch.randn(1, 30, DIM), GRID) == []


@pytest.mark.parametrize("name", LAYERS)
def test_quantized_experts_answer(name):
    torch.manual_seed(0)
    layer, x = layer_of(name).eval(), torch.randn(2, 30, DIM)
    wanted = layer(x, GRID)
    with pytest.warns(DeprecationWarning):
        got = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)(x, GRID)
    assert (got - wanted).square().mean() < 0.05 * wanted.square().mean()
