"""Linear mixers against their formulas, pair by pair, on the real tokens of each sample alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dct
from scipy.stats import norm, qmc
from timm.models.mobilevit import LinearSelfAttention

from formulas import DIM, GRID, HEADS, REAL, check, copied, scattered, tokens
from helpers import position, relative
from zoo.kernels import exponential_attention, mean_attention
from zoo.layer import Context, Place
from zoo.mixers import MIXERS
from zoo.mixers.projected import rotate
from zoo.spec import make

EXTENTS = {2: ((5, 6), (2, 6), (1, 1)), 1: ((30,), (12,), (1,))}
PREFIX = 2


class Sample:
    """The real tokens x [N, D] of one sample, their grid and rotary positions, and a layer's projections of them."""

    def __init__(self, layer, x, grid, rotary):
        self.layer, self.x, self.grid, self.rotary = layer, x, grid, rotary
        wide = layer.qkv(x).split(list(layer.projections.values()), -1)
        named = dict(zip(layer.projections, wide, strict=True))
        self.query, self.key, self.value = (named[letter].unflatten(-1, (HEADS, -1)) for letter in layer.sources)

    def turned(self, x):
        return x if self.rotary is None else rotate(x[None], self.rotary)[0]

    def mixed(self, weights, value=None):
        """weights [H, N, M] times values."""
        return torch.einsum("hnm,mhe->nhe", weights, self.value if value is None else value)

    def near(self, weight, bias=None):
        """A depthwise convolution of the grid's values."""
        maps = self.value[PREFIX:].flatten(1).T.unflatten(1, self.grid)[None]
        conv = F.conv1d if len(self.grid) == 1 else F.conv2d
        y = conv(maps, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        return F.pad(y[0].flatten(1).T, (0, 0, PREFIX, 0)).unflatten(-1, (HEADS, -1))


def pairs(one, other):
    return torch.einsum("nhd,mhd->hnm", one, other)


def shares(weights, least=0.0):
    return weights / (weights.sum(-1, keepdim=True) + least)


def divided(above, query, key):
    """above [H, N, M] over the sums of the products of query and key, each at least a hundredth of |q_i| |sum k|."""
    total = pairs(query, key).sum(-1, keepdim=True)
    least = 0.01 * query.norm(dim=-1).T[..., None] * key.sum(0).norm(dim=-1)[:, None, None]
    return above / (total.maximum(least) + 1e-6)


def compare(spec, formula, axes=2, rotary=False, tolerance=1e-10, wider=()):
    """With a mask and prefix tokens: the layer on the padded batch, and `formula` on each sample alone. The
    parameters `wider` are ten times as large."""
    grid = EXTENTS[axes][0]
    ours = make(MIXERS, spec, DIM, HEADS, Place(axes))
    scattered(ours)
    for name in wider:
        ours.get_parameter(name).data *= 10
    mask = torch.cat([torch.ones(3, PREFIX, dtype=torch.bool), REAL], 1)
    context = Context(grid, PREFIX, mask)
    if rotary:
        context = position("rope", DIM, ours.head_dim, grid, PREFIX).place(context)
    x = tokens(context)
    wanted = torch.zeros_like(x)
    for place, (row, extent) in enumerate(zip(mask, EXTENTS[axes], strict=True)):
        angles = context.rotary
        if angles is not None:
            angles = (angles if angles.ndim == 3 else angles[:, place])[:, row]
        y = formula(Sample(ours, x[place, row], extent, angles))
        wanted = wanted.index_put((torch.tensor(place), row.nonzero()[:, 0]), ours.out(y.flatten(1)))
    check(ours(x, context) * mask[..., None], wanted, (x,), tolerance)


@pytest.mark.parametrize("spec", ["efficient", "latte(latents=5)"])
def test_softmax_of_queries_and_of_keys_apart(spec):
    def formula(sample):
        return sample.mixed(pairs(sample.query.softmax(-1), sample.key.softmax(0)))

    compare(spec, formula)


def test_galerkin_is_its_formula():
    def formula(sample):
        key, value = (
            F.layer_norm(each, (DIM // HEADS,), site.weight, site.bias, site.eps)
            for each, site in ((sample.key, sample.layer.key), (sample.value, sample.layer.value))
        )
        return sample.mixed(pairs(sample.query, key) / len(key), value)

    compare("galerkin", formula)


def test_fourier_is_its_formula():
    def formula(sample):
        query, key = (
            F.layer_norm(each, (DIM // HEADS,), site.weight, site.bias, site.eps)
            for each, site in ((sample.query, sample.layer.query), (sample.key, sample.layer.key))
        )
        return sample.mixed(pairs(query, key) / len(key))

    compare("fourier", formula)


def test_separable_is_its_formula():
    def formula(sample):
        context = (sample.query.softmax(0) * sample.key).sum(0)
        return F.relu(sample.value) * context

    compare("separable", formula)


def test_separable_with_one_head_is_timm():
    theirs = scattered(LinearSelfAttention(DIM))
    names = {"qkv": theirs.qkv_proj, "out": theirs.out_proj}
    weights = {f"{name}.{kind}": getattr(each, kind) for name, each in names.items() for kind in ("weight", "bias")}
    ours = copied(MIXERS["separable"](DIM, 1), weights)
    x = tokens()
    check(ours(x, GRID), theirs(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2), (x,))


def test_sparse_channel_is_its_formula():
    def formula(sample):
        query, key = (each / each.square().sum(0).sqrt() for each in (sample.query, sample.key))
        scores = torch.einsum("nhc,nhd->hcd", query, key) * sample.layer.temperature[:, None, None]
        return torch.einsum("hcd,nhd->nhc", F.relu(scores), sample.value)

    compare("sparse_channel", formula)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("spec", ["rala", "rala(kernel=3, weighted=False)", "rala(gate=False)"])
def test_rala_is_its_formula(spec, rotary, axes):
    def formula(sample):
        layer = sample.layer
        query, key = (F.elu(each) + 1 for each in (sample.query, sample.key))
        if layer.weighted:
            scores = torch.einsum("hd,mhd->mh", query.mean(0), key) / math.sqrt(DIM // HEADS)
            key = key * (scores - scores.detach().amax(0)).exp()[..., None]
        products = pairs(sample.turned(query), sample.turned(key))
        y = sample.mixed(shares(products, 1e-6) if not rotary else divided(products, query, key))
        y = y + sample.near(layer.local.weight, layer.local.bias)
        return y if layer.gate is None else y * layer.gate(sample.x).unflatten(-1, (HEADS, -1))

    compare(spec, formula, axes, rotary)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("spec", "axes"), [("nala", 2), ("nala(power=2.5, kernel=3)", 1)])
def test_nala_is_its_formula(spec, axes, rotary):
    def formula(sample):
        layer = sample.layer
        length = sample.query.square().sum(-1, keepdim=True).sqrt()
        power = layer.power * (0.5 + torch.tanh(length))
        key = sample.key / sample.key.detach().abs().amax((0, 2), keepdim=True)  # which the sum of all divides away
        signs = (1, -1)
        queries = [F.relu(sign * sample.query / length) ** power for sign in signs]
        keys = [F.relu(sign * key) ** layer.power for sign in signs]
        above = sum(pairs(sample.turned(one), sample.turned(other)) for one, other in zip(queries, keys, strict=True))
        whole = torch.cat(queries, -1), torch.cat(keys, -1)
        y = sample.mixed(divided(above, *whole) if rotary else shares(above, 1e-6))
        y = (y + sample.near(layer.local.weight, layer.local.bias)).flatten(1)
        y = F.layer_norm(y, (DIM,), layer.mixed_norm.weight, layer.mixed_norm.bias)
        return (y * F.silu(layer.gate(sample.x))).unflatten(-1, (HEADS, -1))

    compare(spec, formula, axes, rotary)


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_queries_of_zeros_have_finite_gradients_in_nala(power):
    ours = MIXERS["nala"](DIM, HEADS, power=power)
    x = torch.randn(1, 30, DIM, requires_grad=True)
    torch.nn.init.zeros_(ours.qkv.weight[:DIM])
    ours(x, GRID).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(each.grad.isfinite().all() for each in ours.parameters())


def test_lln_is_its_formula():
    def formula(sample):
        a, b = 0.14855178144710912, -0.35487039130661086
        spread = [each.detach().std((0, 2), correction=0)[:, None] for each in (sample.query, sample.key)]
        wanted = ((spread[0] ** 2 * spread[1] ** 2 - b) / (2 * a)).sqrt()
        query, key = (each * wanted / one for each, one in zip((sample.query, sample.key), spread, strict=True))
        return sample.mixed(shares(pairs(query.exp(), key.exp())))

    compare("lln", formula)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "spec", ["taylor(width=8)", "taylor", "taylor(width=8, normalize=True)", "taylor(order=1, normalize=True)"]
)
def test_taylor_is_its_formula(spec, rotary):
    def formula(sample):
        query, key = sample.query, sample.key
        if sample.layer.normalize:
            centred = [each - each.mean(-1, keepdim=True) for each in (query, key)]
            query, key = (each / each.norm(dim=-1).amax(0)[:, None] for each in centred)
            products = pairs(sample.turned(query), sample.turned(key))
        else:
            products = pairs(sample.turned(query), sample.turned(key)) / math.sqrt(query.shape[-1])
        terms = [products**power / math.factorial(power) for power in range(sample.layer.order + 1)]
        return sample.mixed(shares(sum(terms), 1e-6))

    compare(spec, formula, rotary=rotary)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_random_features_are_their_formula(kind, learned, rotary):
    def formula(sample):
        layer = sample.layer
        query, key = (sample.turned(each) / (DIM // HEADS) ** 0.25 for each in (sample.query, sample.key))
        frequencies = layer.directions.expand(HEADS, -1, -1)
        if learned:
            moved = torch.einsum("hcd,md->hmc", layer.spread, layer.directions)
            frequencies = torch.cat([moved + layer.centre[:, None], moved - layer.centre[:, None]], 1)
        ahead, behind = (torch.einsum("nhd,hmd->nhm", each, frequencies) for each in (query, key))
        half = key.square().sum(-1, keepdim=True) / 2
        if kind == "positive":
            return sample.mixed(shares(pairs(ahead.exp(), (behind - half).exp())))
        weights = (ahead.transpose(0, 1)[:, :, None] - behind.transpose(0, 1)[:, None]).cos().sum(-1)
        factor = 1.0 if learned else (half - half.detach().amax(0)).exp()
        if not learned:
            weights = weights * factor.permute(1, 2, 0)
        waves = [torch.cat([each.cos(), each.sin()], -1) for each in (ahead, behind)]
        return sample.mixed(divided(weights, waves[0], waves[1] * factor))

    compare(f"random_features(features=40, kind='{kind}', learned={learned})", formula, rotary=rotary)


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_many_random_features_are_softmax_attention(kind):
    ours = scattered(MIXERS["random_features"](DIM, HEADS, learned=False, kind=kind, features=20000))
    with torch.no_grad():
        for parameter in (ours.qkv.weight, ours.qkv.bias):
            parameter[: 2 * DIM] *= 0.2
        x = tokens()
        theirs = copied(MIXERS["softmax"](DIM, HEADS), {n: each for n, each in ours.state_dict().items() if "." in n})
        wanted = theirs(x, GRID)
        assert relative(wanted, theirs.out(theirs.qkv(x)[..., -DIM:].mean(1, keepdim=True))) > 0.2  # not a mean
        assert relative(ours(x, GRID), wanted) < 0.04


def test_dijiang_is_its_formula():
    def formula(sample):
        width = DIM // HEADS
        cosines = torch.tensor(dct(torch.eye(width).double().numpy(), axis=0, norm="ortho"))
        points = qmc.Halton(1, scramble=False).random(width)[:, 0] + 0.5 / width
        across = torch.tensor(norm.ppf(points))[:, None] * cosines
        query, key = (
            sample.layer.log_weight.exp() * torch.einsum("nhd,md->nhm", sample.turned(each), across).exp()
            for each in (sample.query, sample.key)
        )
        return sample.mixed(shares(pairs(query, key)))

    for rotary in (False, True):
        compare("dijiang", formula, rotary=rotary)


class Sign(torch.autograd.Function):
    """+1 and -1, with the gradient of the identity from -1 to 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


@pytest.mark.parametrize("spec", ["ecoformer", "ecoformer(bits=5, anchors=7)"])
def test_ecoformer_is_its_formula(spec):
    def formula(sample):
        layer = sample.layer
        x = sample.key / sample.key.norm(dim=-1, keepdim=True)
        far = (x[:, :, None] - layer.anchors).square().sum(-1)  # [N, H, anchors]
        near = (-far / (2 * far.mean((0, 2), keepdim=True))).exp()
        code = Sign.apply(torch.einsum("nhm,hbm->nhb", near - near.mean(0), layer.planes))
        return sample.mixed(shares(pairs(code, code) + code.shape[-1] + 1, 2e-6))

    compare(spec, formula, wider=["planes"])  # some values beyond 1, which have no gradient


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("stride", [2, 4])
def test_soft_is_its_formula(stride, normalize, axes):
    """With so many steps of Newton's method that the inverse is exact, and its gradient too."""

    def gaussian(one, other):
        return (-(one[:, :, None] - other[:, None]).square().sum(-1) / 2).exp()

    def formula(sample):
        layer, grid = sample.layer, sample.grid
        query = (sample.query / (DIM // HEADS) ** 0.25).transpose(0, 1)  # [H, N, d]
        maps = query[:, PREFIX:].transpose(1, 2).unflatten(2, grid)
        margin = [side for size in reversed(grid) for side in (0, -size % stride)]
        maps = (F.conv1d if axes == 1 else F.conv2d)(F.pad(maps, margin), layer.landmark.weight, stride=stride)
        marks = maps.flatten(2).transpose(1, 2)
        weight, bias = layer.landmark_norm.weight, layer.landmark_norm.bias
        marks = F.gelu(F.layer_norm(marks, marks.shape[-1:], weight, bias))
        between, aside = gaussian(marks, marks), gaussian(query, marks)
        inverse = torch.linalg.inv(between + 0.01 * torch.eye(len(between[0])).double())
        if normalize:
            total = between.sum(-1)
            inverse = inverse / (total[:, :, None] * total[:, None]).sqrt()
        y = sample.mixed(aside @ inverse @ aside.transpose(1, 2))
        return y + sample.near(layer.local.weight.repeat_interleave(DIM // HEADS, 0))

    compare(f"soft(stride={stride}, steps=60, normalize={normalize})", formula, axes, tolerance=1e-9)


def test_the_inverse_of_soft_takes_steps_of_newton_and_does_not_diverge():
    ours = MIXERS["soft"](DIM, HEADS, steps=3)
    points = torch.randn(1, 2, 9, 4, dtype=torch.double)
    matrix = ours.kernel(points, points)
    damped = matrix + 0.01 * torch.eye(9).double()
    wanted = damped * (1.8 / matrix.sum(-1).amax(-1)[..., None, None] ** 2)
    for _ in range(3):
        wanted = 2 * wanted - wanted @ damped @ wanted
    check(ours.inverse(matrix), wanted)
    same = torch.ones(1, 1, 200, 200)  # landmarks that are all the same
    assert MIXERS["soft"](DIM, HEADS).inverse(same).abs().max() < 100


def test_the_kernels_of_soft_are_exact_in_mixed_precision():
    ours, parts = MIXERS["soft"](DIM, HEADS, stride=2), []
    sums = ours.through
    ours.through = lambda *given: parts.append((given, sums(*given))) or parts[-1][1]
    with torch.autocast("cpu", torch.bfloat16):
        ours(torch.randn(3, 30, DIM), GRID)
    given, got = parts[0]
    check(got, sums(*given))


def test_exponents_of_any_size():
    query, key = 1e4 * torch.randn(1, 7, 2, 3), 1e4 * torch.randn(1, 7, 2, 3)
    value = torch.randn(1, 7, 2, 5)
    for each in (query, key):
        each.requires_grad_()
    got = exponential_attention(query, key, value)
    sums = query.double().transpose(1, 2)[:, :, :, None] + key.double().transpose(1, 2)[:, :, None]  # [B, H, N, M, c]
    weights = sums.flatten(3).softmax(-1).unflatten(3, (7, 3)).sum(-1)
    wanted = torch.einsum("bhnm,bmhe->bnhe", weights, value.double())
    assert relative(got.double(), wanted) < 1e-5
    got.sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(5, 16), (4096, 8)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_means_hold_in_half_precision(kind, shape):
    """Each order of the products; plain sums over 4,096 keys would overflow fp16."""
    number, width = shape
    query, key, value = ((10 * torch.rand(1, number, 2, width)).to(kind) for _ in range(3))
    wanted = torch.einsum("bnhd,bmhd,bmhe->bnhe", query.double()[:, :4], key.double(), value.double()) / number
    assert relative(mean_attention(query, key, value)[:, :4].double(), wanted) < 2e-2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("taylor(order=3)", "order must be 1 or 2, got 3"),
        ("taylor(width=129)", "width must be at most 128, as there are width.2 features, got 129"),
        ("soft(stride=65)", "option stride of 'soft' must be <= 64, got 65"),
        ("taylor(order=1)", "order=1 needs normalize=True"),
        ("random_features(kind='cosine')", "unknown kind 'cosine'.*positive, trigonometric"),
        ("rala(kernel=4)", "kernel must be odd, got 4"),
        ("nala(kernel=4)", "kernel must be odd, got 4"),
        ("nala(power=1.9)", "power must be from 2 to 5, got 1.9"),
        ("soft(kernel=2)", "kernel must be odd, got 2"),
        ("latte(latents=0)", "latents of 'latte' must be finite and >= 1"),
        ("latte(latents=66)", "latents must be at most 65, as there are few tokens, got 66"),
    ],
)
def test_wrong_options_are_named(spec, said):
    with pytest.raises(ValueError, match=said):
        make(MIXERS, spec, DIM, HEADS, Place(2, (8, 8), 1))


@pytest.mark.parametrize("grid", [(), (2, 2), (8, 8)])
def test_32_latents_suit_any_number_of_tokens(grid):
    assert make(MIXERS, "latte", DIM, HEADS, Place(2, grid)).head_dim == 32


@pytest.mark.parametrize("name", ["latte", "taylor"])
def test_heads_must_divide_the_width_of_values(name):
    with pytest.raises(ValueError, match="heads must divide dim 32, got 5"):
        make(MIXERS, name, DIM, 5, Place(2))
