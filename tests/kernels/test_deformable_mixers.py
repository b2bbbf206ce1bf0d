"""The mixers on top of deformable aggregation: their options by hand, half precision, compilers and exporters."""

import itertools
import math
import warnings

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import DIM, HEADS, randomise, relative
from zoo.kernels import deformable_cpu
from zoo.kernels.deformable import gathered
from zoo.layer import Context, Memory, Place
from zoo.mixers import CROSSES, MIXERS
from zoo.spec import make

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without a compiler the other forms are tested
    NATIVE = deformable_cpu.available()

PUBLIC = [
    pytest.param("operator", marks=pytest.mark.skipif(not NATIVE, reason="no C++ compiler, or ZOO_NATIVE=0")),
    "fallback",
]
GRIDS = {1: (11,), 2: (5, 6)}


@pytest.fixture
def form(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(deformable_cpu, "available", lambda: False)


def dcnv4(axes=2, **options):
    return randomise(MIXERS["dcnv4"](DIM, HEADS, Place(axes), **options)).eval()


def by_hand(layer, x, grid, kernel=3, groups=HEADS, scale=1.0, weights="raw", local=0, centre=False):
    """The mixer written out, with the parameters of the layer."""
    axes, taps = len(grid), kernel ** len(grid)
    value = F.linear(x, layer.value.weight, layer.value.bias)
    if local:
        convolve = F.conv1d if axes == 1 else F.conv2d
        (weight,) = [each for each in layer.local.parameters() if each.ndim == axes + 2]
        (bias,) = [each for each in layer.local.parameters() if each.ndim == 1]
        x = convolve(x.mT.unflatten(2, grid), weight, bias, padding=local // 2, groups=DIM).flatten(2).mT
    sample = F.linear(x, layer.sample.weight, layer.sample.bias).unflatten(-1, (groups, taps * (axes + 1)))
    offsets, scores = sample[..., : taps * axes].unflatten(-1, (taps, axes)), sample[..., taps * axes :]
    if weights == "softmax":
        scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if weights == "sigmoid":
        scores = 1 / (1 + (-scores).exp())
    points = torch.tensor(list(itertools.product(*map(range, grid))), dtype=x.dtype)[:, None, None]
    half = kernel // 2
    lattice = torch.tensor(list(itertools.product(range(-half, half + 1), repeat=axes)), dtype=x.dtype)
    y = gathered(value.unflatten(1, grid), points + scale * (lattice + offsets), scores)
    if centre:
        share = F.linear(y, layer.centre.weight, layer.centre.bias).sigmoid().repeat_interleave(DIM // groups, -1)
        y = (1 - share) * y + share * value
    return F.linear(y, layer.out.weight, layer.out.bias)


OPTIONS = [
    {},
    {"kernel": 5, "scale": 0.5},
    {"kernel": 1, "scale": 2.0},
    {"groups": 1},
    {"groups": 8},
    {"weights": "sigmoid"},
    {"weights": "softmax"},
    {"local": 3},
    {"local": 5, "groups": 4},
    {"centre": True},
    {"centre": True, "groups": 8, "weights": "softmax", "local": 3, "kernel": 5},
]


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dcnv4_is_its_formula_whatever_the_options(form, axes, options):
    layer, grid = dcnv4(axes, **options).double(), GRIDS[axes]
    x = torch.randn(2, math.prod(grid), DIM, dtype=torch.float64)
    assert relative(layer(x, Context(grid=grid)), by_hand(layer, x, grid, **options)) <= 1e-10


@pytest.mark.parametrize("axes", [1, 2])
def test_softmax_weights_keep_a_constant_map_constant_inside(axes):
    """The shares of the taps sum to 1; raw and sigmoid weights do not."""
    grid = (12,) * axes
    for weights in ("softmax", "sigmoid", "raw"):
        layer = dcnv4(axes, weights=weights)
        layer.sample.weight.data.mul_(0.05)
        layer.sample.bias.data.clamp_(-0.5, 0.5)
        x = torch.randn(1, math.prod(grid), DIM)
        layer.value.weight.data.zero_()  # the bias alone: the same value everywhere
        offsets = layer.sample(x).unflatten(-1, (HEADS, -1))[..., : axes * 3**axes]
        assert 0.1 < offsets.abs().max() < 1, "or samples leave the inside"
        y = layer(x, Context(grid=grid)).unflatten(1, grid)
        wanted = layer.out(layer.value.bias)
        inside = (slice(None), *[slice(2, -2)] * axes)
        assert (relative(y[inside], wanted.expand_as(y[inside])) < 1e-5) == (weights == "softmax")


def test_dcnv4_without_bias_starts_at_zero_and_has_none_behind_it():
    plain, without = MIXERS["dcnv4"](DIM, HEADS), MIXERS["dcnv4"](DIM, HEADS, bias=False)
    nn.init.ones_(plain.out.bias)
    x = torch.randn(2, 30, DIM)
    assert set(plain.state_dict()) - set(without.state_dict()) == {"out.bias"}
    assert not without(x, Context(grid=(5, 6))).any()
    assert torch.equal(plain(x, Context(grid=(5, 6))), torch.ones(2, 30, DIM))


@pytest.mark.parametrize("options", [{"groups": 5}, {"weights": "tanh"}])
@pytest.mark.parametrize("table", [MIXERS, CROSSES])
def test_options_that_do_not_fit_are_refused_in_one_line(table, options):
    heads = options.get("groups", HEADS)
    with pytest.raises(
        ValueError, match="(groups|heads) must divide dim 32, got 5|unknown weights 'tanh'; choose from: raw"
    ) as error:
        if table is MIXERS:
            MIXERS["dcnv4"](DIM, HEADS, **options)
        else:
            CROSSES["deformable"](DIM, heads, **{key: value for key, value in options.items() if key == "weights"})
    assert "\n" not in str(error.value)


# Half precision


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["raw", "softmax"])
def test_dcnv4_in_half_precision_stays_finite_on_12544_tokens(form, kind, weights):
    """Values and offsets of 100 to 1000, as late blocks of large models have them."""
    layer = dcnv4(2, weights=weights)
    with torch.no_grad():
        layer.value.weight.mul_(8)
        layer.sample.weight.unflatten(0, (HEADS, 27))[:, 18:].mul_(0.02)  # weights near 1
    layer.to(kind).train()
    x = (40 * torch.randn(1, 112 * 112, DIM)).to(kind).requires_grad_()
    offsets = layer.sample(x).unflatten(-1, (HEADS, 27))[..., :18]
    assert layer.value(x).abs().max() > 1000 and offsets.abs().max() > 100
    y = layer(x, Context(grid=(112, 112)))
    assert y.dtype == kind and y.isfinite().all() and y.any()
    y.float().mean().backward()
    for each in (x, *layer.parameters()):
        assert each.grad is not None and each.grad.isfinite().all()


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
def test_dcnv4_under_autocast_is_close_to_fp32(form):
    """Offsets in bf16 move samples a little; with offsets that bf16 holds exactly, only values are rounded."""
    layer = dcnv4(2)
    layer.sample.weight.data.zero_()
    layer.sample.bias.data.copy_(layer.sample.bias.bfloat16())
    x = torch.randn(2, 30, DIM, requires_grad=True)
    wanted = layer(x, Context(grid=(5, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, Context(grid=(5, 6)))
    assert got.dtype == torch.bfloat16 and relative(got.float(), wanted) < 2e-2
    (theirs,) = torch.autograd.grad(wanted.sum(), x)
    (ours,) = torch.autograd.grad(got.sum(), x)
    assert relative(ours, theirs) < 2e-2


# The decoder's cross-attention


def looking(batch=2, queries=5, boxes=False, grids=((6, 8), (3, 4)), kind=torch.float32):
    """A memory of two maps whose queries look at points or boxes well inside."""
    size = sum(math.prod(grid) for grid in grids)
    where = 0.3 + 0.4 * torch.rand(batch, queries, 2, dtype=kind)
    if boxes:
        where = torch.cat([where, 0.1 + 0.2 * torch.rand(batch, queries, 2, dtype=kind)], -1)
    memory = Memory(torch.randn(batch, size, DIM, dtype=kind), grids=grids, reference=where)
    return Context(grid=(queries,), memory=memory)


def cross(weights, levels=2, points=3):
    torch.manual_seed(3)
    return CROSSES["deformable"](DIM, HEADS, Place(levels=levels), points=points, weights=weights)


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize(("levels", "points"), [(2, 3), (1, 2)])
def test_deformable_cross_attention_starts_as_the_mean_of_its_samples(boxes, levels, points):
    """Whatever the weights, and the samples lie one pixel after the other in each head's direction."""
    grids = ((6, 8), (3, 4))[:levels]
    context, x = looking(boxes=boxes, grids=grids), torch.randn(2, 5, DIM)
    memory = context.memory
    softmax = cross("softmax", levels, points)
    value, wanted, begin = softmax.values(memory.tokens), 0, 0
    for rows, columns in grids:
        part = value[:, begin : begin + rows * columns].unflatten(1, (rows, columns))
        begin += rows * columns
        for point in range(1, points + 1):
            step = torch.tensor([[point, 0.0], [-point, 0.0]])  # two heads look right and left
            if boxes:
                there = memory.reference[:, :, None, :2] + step / points * memory.reference[:, :, None, 2:] / 2
            else:
                there = memory.reference[:, :, None] + step / torch.tensor([columns, rows])
            pixels = (there * torch.tensor([columns, rows]) - 0.5).flip(-1)[:, :, :, None]
            wanted = wanted + gathered(part, pixels, torch.ones(2, 5, HEADS, 1)) / (levels * points)
    wanted = softmax.out(wanted)
    for weights in ("softmax", "sigmoid", "raw"):
        layer = cross(weights, levels, points)
        assert torch.equal(layer.values.weight, softmax.values.weight)
        assert relative(layer(x, context), wanted) <= 1e-5, weights


def test_raw_weights_of_deformable_cross_attention_are_used_as_given():
    context, x = looking(), torch.randn(2, 5, DIM)
    sigmoid, raw = cross("sigmoid"), cross("raw")
    scores = torch.randn(sigmoid.scores.bias.shape)
    sigmoid.scores.bias.data.copy_(scores)
    raw.scores.bias.data.copy_(1 / (1 + (-scores).exp()))
    wanted = raw(x, context)
    assert relative(sigmoid(x, context), wanted) <= 1e-5
    raw.scores.bias.data.mul_(-3)
    assert relative(raw(x, context), -3 * wanted) <= 1e-5


@pytest.mark.parametrize("points", [(2, 3, 4), (4,), (2, 2.0), (2, 0), (2, True), (), [2, 3], "4"])
def test_numbers_of_points_that_do_not_fit_are_refused_in_one_line(points):
    with pytest.raises(ValueError, match="^cross .*: (points must be one number|option points of 'def)") as error:
        make(CROSSES, f"deformable(points={points!r})", DIM, HEADS, Place(levels=2), field="cross")
    assert "\n" not in str(error.value)


def test_one_number_of_points_is_that_number_for_each_level():
    one, each = cross("softmax", 2, 3), cross("softmax", 2, (3, 3))
    assert {name: value.shape for name, value in one.state_dict().items()} == {
        name: value.shape for name, value in each.state_dict().items()
    }
    context, x = looking(boxes=True), torch.randn(2, 5, DIM)
    assert torch.equal(one(x, context), each(x, context))


def test_a_gate_starts_as_the_mean_of_tokens_and_result():
    context, x = looking(), torch.randn(2, 5, DIM)
    torch.manual_seed(3)
    gated = CROSSES["deformable"](DIM, HEADS, Place(levels=2), points=3, gated=True)
    assert relative(x + gated(x, context), (x + cross("softmax")(x, context)) / 2) <= 1e-5


def test_a_memory_that_does_not_fit_is_refused_in_one_line():
    context, x = looking(), torch.randn(2, 5, DIM)
    layer = cross("softmax")
    layer(x, context)
    memory = context.memory
    for other in (None, memory._replace(reference=None), memory._replace(grids=memory.grids[:1])):
        with pytest.raises(ValueError, match="memory of 2 grids") as error:
            layer(x, context._replace(memory=other))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="do not fit the grids"):
        layer(x, context._replace(memory=memory._replace(grids=((6, 8), (3, 3)))))


# Compilers and exporters


class Wrapped(nn.Module):
    """A mixer whose grid is fixed, so that its only input is x."""

    def __init__(self, layer, grid):
        super().__init__()
        self.layer, self.grid = layer, grid

    def forward(self, x):
        return self.layer(x, Context(grid=self.grid))


@pytest.mark.all
@pytest.mark.parametrize("axes", [1, 2])
def test_export_of_dcnv4_knows_no_operator_of_ours(axes):
    model, x = Wrapped(dcnv4(axes), GRIDS[axes]).eval(), torch.randn(2, math.prod(GRIDS[axes]), DIM)
    program = torch.export.export(model, (x,), strict=False)
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)
    assert relative(program.module()(x), model(x)) <= 1e-5


@pytest.mark.parametrize("boxes", [False, True])
def test_export_of_deformable_cross_attention_knows_no_operator_of_ours(boxes):
    layer, context, x = randomise(cross("softmax")).eval(), looking(boxes=boxes), torch.randn(2, 5, DIM)
    program = torch.export.export(layer, (x, context), strict=False)
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)
    assert relative(program.module()(x, context), layer(x, context)) <= 1e-5


@pytest.mark.all
@pytest.mark.parametrize(
    ("axes", "options"), [(1, {}), (2, {}), (2, {"weights": "softmax", "local": 3, "centre": True})], ids=str
)
def test_onnxruntime_gives_the_same(axes, options):
    model, x = Wrapped(dcnv4(axes, **options), GRIDS[axes]).eval(), torch.randn(2, math.prod(GRIDS[axes]), DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(got) - model(x)).abs().max() < 1e-4
