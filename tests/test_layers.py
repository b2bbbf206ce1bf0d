"""The contract of every row of every table. A new row is tested by being there."""

import copy
import math
from typing import Any

import pytest
import torch

from helpers import (
    DIM,
    HEADS,
    PLACES,
    ROWS,
    Given,
    context_for,
    cropped,
    padded,
    randomise,
    rectangle,
    relative,
    tokens_for,
)
from zoo import create_model
from zoo.layer import Context, Layer, Place, advance, undecayed
from zoo.mixers import MIXERS
from zoo.norms import Affine
from zoo.positions import Position
from zoo.spec import make, parse
from zoo.tensors import filtered

GRIDS = {1: (11,), 2: (5, 7)}
WIDE = {1: (19,), 2: (9, 8)}
every_place = pytest.mark.parametrize(("name", "axes"), PLACES)


def build(name: str, axes: int) -> Layer:
    layer = ROWS[name](axes)
    return randomise(layer).eval()  # pyright: ignore[reportReturnType]


@every_place
def test_keeps_shape_and_dtype(name, axes):
    layer = build(name, axes)
    context = context_for(layer, GRIDS[axes], 2)
    x = tokens_for(context, 2)
    y = layer(x, context)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert torch.equal(y, layer(x, context)), "inference is not deterministic"
    before = x.clone()
    with torch.no_grad():  # where layers may write into their own tensors
        assert relative(layer(x, context), y) < 1e-5 and torch.equal(x, before)


@every_place
def test_every_parameter_gets_a_gradient(name, axes):
    layer = build(name, axes).train()
    context = context_for(layer, GRIDS[axes], 2)
    x = tokens_for(context, 2).requires_grad_()
    (layer(x, context) * torch.randn(DIM)).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        if name not in ("norm-prepbn(0.0)", "norm-prepbn(1.0)"):  # there one side of the blend has no share
            assert parameter.grad.abs().max() > 0, f"{key} has no influence"


@every_place
def test_padding_and_batch_mates_change_nothing(name, axes):
    """A sample alone, without a mask, equals the same sample padded beside a larger one."""
    layer = build(name, axes)
    alone = context_for(layer, GRIDS[axes])
    wide = context_for(layer, WIDE[axes], 2, [GRIDS[axes], WIDE[axes]])
    x = tokens_for(alone)
    batch = torch.cat([padded(x, alone, WIDE[axes]), tokens_for(wide)])
    wanted = layer(x, alone)
    got = cropped(layer(batch, wide)[:1], alone, wide)
    assert relative(got, wanted) < 1e-5
    other = layer(torch.cat([batch[:1], 3 * batch[1:]]), wide)
    assert relative(other[:1], layer(batch, wide)[:1]) < 1e-5, "a batch mate leaks"


@every_place
def test_padding_changes_nothing_in_training(name, axes):
    """Outputs, running statistics and gradients of a batch are the same with twice the padding."""
    layer = build(name, axes).train()
    twice = copy.deepcopy(layer)
    small, extents = GRIDS[axes], [GRIDS[axes], tuple(size - 2 for size in GRIDS[axes])]
    near, far = context_for(layer, small, 2, extents), context_for(layer, WIDE[axes], 2, extents)
    x = tokens_for(near, 2)
    real = torch.stack([rectangle(small, extent) for extent in extents])
    real = torch.cat([real.new_ones(2, near.prefix), real], 1)[..., None]
    weight = torch.randn(DIM)
    outputs = []
    for module, context, tokens in ((layer, near, x), (twice, far, padded(x, near, WIDE[axes]))):
        torch.manual_seed(1)  # for rows that are random in training
        y = module(tokens, context)
        y = y if context is near else cropped(y, near, far)
        if y.requires_grad:
            (y * weight * real).square().sum().backward()
        outputs.append((y * real).detach())
    assert relative(outputs[1], outputs[0]) < 1e-5
    for (key, one), (_, other) in zip(layer.named_buffers(), twice.named_buffers(), strict=True):
        assert relative(other, one) < 1e-5 or torch.equal(other, one), key
    others = dict(twice.named_parameters())
    gradients = {key: (one.grad, others[key].grad) for key, one in layer.named_parameters()}
    largest = max((one.abs().max().item() for one, _ in gradients.values()), default=1.0)
    for key, (one, other) in gradients.items():
        assert (other - one).abs().max() < 1e-4 * largest, key


@pytest.mark.all
@every_place
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_stays_finite(name, axes, training):
    layer = build(name, axes).to(torch.bfloat16).train(training)
    context = context_for(layer, WIDE[axes], 2, [GRIDS[axes], WIDE[axes]])
    x = tokens_for(context, 2, scale=30.0).to(torch.bfloat16)
    if context.memory is not None:
        memory = context.memory
        context = context._replace(
            memory=memory._replace(tokens=memory.tokens.bfloat16(), code=memory.code.bfloat16())  # pyright: ignore
        )
    y = layer(x, context)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.all
@every_place
def test_a_sample_without_real_tokens_is_finite(name, axes):
    layer = build(name, axes)
    none = tuple(0 for _ in GRIDS[axes])
    for training in (False, True):
        layer.train(training)
        context = context_for(layer, GRIDS[axes], 2, [none, GRIDS[axes]])
        context = context._replace(mask=context.mask.index_fill(0, torch.tensor([0]), False))  # pyright: ignore
        x = tokens_for(context, 2).requires_grad_()
        y = layer(x, context)
        assert y.isfinite().all()
        y.square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


class Beside(torch.nn.Module):
    """Some layers, each on tokens and a Context of its own: ten in one program cost little more than one."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, given: list[tuple[torch.Tensor, Context]]) -> list[torch.Tensor]:
        return [layer(x, context) for layer, (x, context) in zip(self.layers, given, strict=True)]


def wrong_exports(places: list[tuple[str, int]]) -> list[str]:
    """Those of some rows whose exported program does not give what they give; halved until one is left."""
    torch.manual_seed(0)
    layers = [build(name, axes) for name, axes in places]
    given = []
    for layer, (_, axes) in zip(layers, places, strict=True):
        context = context_for(layer, GRIDS[axes], 2, [GRIDS[axes], tuple(size - 1 for size in GRIDS[axes])])
        given.append((tokens_for(context, 2), context))
    model = Beside(layers)
    try:
        got = torch.export.export(model, (given,)).module()(given)
        right = [relative(one, other) < 1e-5 for one, other in zip(got, model(given), strict=True)]
    except Exception as error:  # whatever the exporter raises
        if len(places) == 1:
            return [f"{places[0]}: {error}"]
        right = [False]
    if all(right):
        return []
    if len(places) == 1:
        return [f"{places[0]}: other numbers"]
    half = len(places) // 2
    return wrong_exports(places[:half]) + wrong_exports(places[half:])


ALL_PLACES: list = [place.values for place in PLACES]


@pytest.mark.all
@pytest.mark.parametrize("start", range(0, len(ALL_PLACES), 10))
def test_exports(start):
    assert wrong_exports(ALL_PLACES[start : start + 10]) == []


@pytest.mark.all
def test_a_row_that_cannot_be_exported_is_found_among_ten(monkeypatch):
    class Branching(Layer):
        def forward(self, x, context):
            return x if x.sum() > 0 else -x

    monkeypatch.setitem(ROWS, "ffn-branching", lambda axes: Branching())
    (found,) = wrong_exports([*ALL_PLACES[:3], ("ffn-branching", 2), *ALL_PLACES[3:9]])
    assert found.startswith("('ffn-branching', 2)")


@pytest.mark.all
@every_place
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(name, axes, training):
    torch._dynamo.reset()
    layer = build(name, axes).train(training)
    context = context_for(layer, GRIDS[axes], 2, [GRIDS[axes], tuple(size - 1 for size in GRIDS[axes])])
    x = tokens_for(context, 2)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module, run in ((plain, plain), (layer, compiled)):
        given = x.clone().requires_grad_()
        torch.manual_seed(1)  # for rows that are random in training
        y = run(given, context)
        (y * torch.arange(DIM)).square().sum().backward()
        results.append([y, given.grad, *(parameter.grad for parameter in module.parameters()), *module.buffers()])
    for wanted, got in zip(*results, strict=True):
        if wanted is None:  # in inference a finished prepbn leaves LayerNorm away
            assert got is None and name == "norm-prepbn(1.0)" and not training
            continue
        assert (got - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max())


@pytest.mark.all
def test_checkpointed_blocks_compile_and_move_statistics_once():
    torch._dynamo.reset()
    choices = {"dim": 32, "depth": 2, "heads": 2, "classes": 5, "norm": "prepbn", "mixer": "sla"}
    plain = create_model("vit_micro", **choices).train()
    advance(plain, 0.4)
    model = copy.deepcopy(plain)
    model.checkpointing = True
    images = torch.randn(2, 3, 32, 32)
    torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    plain(images).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4 * max(1.0, other.grad.abs().max())
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.all
@pytest.mark.parametrize("name", ["mixer-sla", "norm-prepbn(0.4)", "mixer-dcnv4"])
def test_inductor_equals_eager(name):
    torch._dynamo.reset()
    layer = build(name, 2)
    context = context_for(layer, GRIDS[2], 2, [GRIDS[2], (4, 6)])
    x = tokens_for(context, 2)
    compiled = torch.compile(layer, fullgraph=True)
    assert relative(compiled(x, context), layer(x, context)) < 1e-4


@every_place
def test_what_a_row_reads_of_the_context_is_what_it_declares(name, axes):
    """A field that is read changes the output, another one does not."""
    layer = build(name, axes)
    assert layer.reads <= set(Context._fields) and getattr(layer, "writes", frozenset()) <= set(Context._fields)
    plain = context_for(layer, GRIDS[axes])._replace(rotary=None, bias=None)
    x, total = tokens_for(plain), plain.prefix + math.prod(GRIDS[axes])
    width = getattr(layer, "head_dim", DIM // HEADS)
    angles = 1.5 * torch.rand(total, width // 2)
    fields = {"rotary": torch.stack([angles.cos(), angles.sin()]), "bias": Given(torch.randn(HEADS, total, total))}
    fields |= {"code": torch.randn(1, total, DIM), "cond": torch.randn(1, 1, DIM)}
    for field, value in fields.items():
        if field == "code" and isinstance(layer, Position):
            continue
        moved = relative(layer(x, plain._replace(**{field: value})), layer(x, plain))
        assert (moved > 1e-3) == (field in layer.reads), field


@every_place
def test_what_a_row_fills_is_what_it_declares(name, axes):
    """Each site that a class declares is an attribute of its layers, empty or a norm of that width, and has a say."""
    layer: Any = build(name, axes)
    kind, _, spec = name.partition("-")
    options = dict(parse(spec)[1]) if kind == "mixer" else {}
    context = context_for(layer, GRIDS[axes])
    x = tokens_for(context)
    before = layer(x, context)
    for site, size in type(layer).sites_of(DIM, HEADS, **options).items():
        if site == "norm":
            continue
        assert getattr(layer, site) is None, site
        norm = Affine(size.width)
        torch.nn.init.normal_(norm.weight)
        setattr(layer, site, norm)
        assert relative(layer(x, context), before) > 1e-3, site
        setattr(layer, site, None)


def test_weight_decay_leaves_alone_what_a_layer_declares():
    names = [name for name, row in MIXERS.items() if row.undecayed]
    assert {"polar", "super", "kv_shift"} <= {*names}
    for name in names:
        spec = {"gqa": "gqa(merge='weighted')"}.get(name, name)
        axes = max(MIXERS[name].dimensions)
        layer = make(MIXERS, spec, DIM, HEADS, Place(axes, (4, 6)[:axes]))
        assert undecayed(layer) == {*layer.undecayed}, name


def test_no_name_shadows_a_module_attribute():
    from torch.fx import GraphModule

    taken = set(dir(torch.nn.Module())) | set(dir(GraphModule)) | {"code", "graph", "meta"}
    for name, axes in ALL_PLACES:
        layer = ROWS[name](axes)
        for key in [key for key, _ in layer.named_parameters()] + [key for key, _ in layer.named_modules()]:
            assert not taken & set(key.split(".")), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 16, 24])
def test_convolutions_along_time_are_those_of_torch(channels, dtype):
    """Narrow ones too, which oneDNN cannot do as a map of one row in bf16."""
    tokens, weight = torch.randn(2, 40, channels), torch.randn(channels, 1, 31)
    wanted = torch.nn.functional.conv1d(tokens.transpose(1, 2), weight, None, 2, 15, groups=channels).transpose(1, 2)
    got = filtered(tokens.to(dtype), (40,), weight.to(dtype), None, 15, 2)
    assert relative(got.float(), wanted) < (1e-6 if dtype == torch.float32 else 2e-2)
