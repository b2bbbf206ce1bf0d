"""Deformable aggregation on the CPU against the fp64 oracle; test_deformable_parity.py has other libraries."""

import math
import sys
import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from deformable_cases import CASES, GRIDS, both, check, exact, inputs, places_of, plainly, several
from helpers import relative
from zoo.kernels import deformable, deformable_cpu
from zoo.kernels.deformable import backward, forward, gathered, reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without a compiler the other forms are tested
    NATIVE = deformable_cpu.available()

needs_native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler, or ZOO_NATIVE=0")
FORMS = [pytest.param("operator", marks=needs_native), "fallback", "reference", "gathered"]
PUBLIC = FORMS[:2]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.mark.parametrize(
    "kernel, dilation, scale, padding", [(4, 2, 2.0, 3), (2, 3, 0.5, 1), (6, 4, 1.5, 9), (3, 2, 2.0, 2)]
)
def test_a_kernel_is_stretched_about_the_middle_of_what_it_spans(kernel, dilation, scale, padding):
    """DCNv4 (arXiv:2401.06197): out[p] = sum_k w * sample(p - padding + m + scale * (k * dilation - m + offset)), where
    m = floor(dilation * (kernel - 1) / 2); here in plain numbers along one axis, each tap by itself."""
    torch.manual_seed(0)
    size, span = 12, dilation * (kernel - 1)
    line = torch.randn(size, dtype=torch.float64)
    out = size + 2 * padding - span
    offsets = torch.randn(1, out, 1, kernel, 1, dtype=torch.float64)
    weights = torch.randn(1, out, 1, kernel, dtype=torch.float64)

    def sample(place: float) -> float:
        low = math.floor(place)
        near = ((low, low + 1 - place), (low + 1, place - low))
        return sum(float(line[at]) * share for at, share in near if 0 <= at < size)

    middle = math.floor(span / 2)
    for p in range(out):
        places = [
            p - padding + middle + scale * (tap * dilation - middle + float(offsets[0, p, 0, tap, 0]))
            for tap in range(kernel)
        ]
        wanted = sum(float(weights[0, p, 0, tap]) * sample(place) for tap, place in enumerate(places))
        got = deformable(
            line[None, :, None], offsets, weights, kernel=kernel, dilation=dilation, scale=scale, padding=padding
        )
        assert abs(float(got[0, p, 0]) - wanted) < 1e-10


@pytest.fixture
def form(request, monkeypatch):
    if request.param in ("reference", "gathered"):
        plain = {"reference": reference, "gathered": gathered}[request.param]
        return lambda *given, kernel, **options: plainly(plain, *given, kernel, **options)
    if request.param == "fallback":
        monkeypatch.setattr(deformable_cpu, "available", lambda: False)
    else:
        monkeypatch.setattr(sys.modules["zoo.kernels.deformable"], "reference", None)  # never in its stead
    return deformable


# Values and gradients


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize(("grid", "kernel", "groups", "width", "options"), CASES)
def test_outputs_and_gradients_equal_the_oracle(form, kind, grid, kernel, groups, width, options):
    given, leaves = both(inputs(grid, kernel, groups, width, kind=kind, **options))
    got = form(*given, kernel=kernel, **options)
    assert got.dtype == kind
    check(got, exact(*leaves, kernel, **options), given, leaves, [CLOSE[kind]] * 4)


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid", "kernel", "groups", "width", "options"), CASES)
def test_half_precision_equals_the_oracle_on_the_same_numbers(form, kind, grid, kernel, groups, width, options):
    given, leaves = both(inputs(grid, kernel, groups, width, kind=kind, **options))
    got = form(*given, kernel=kernel, **options)
    assert got.dtype == kind
    check(got, exact(*leaves, kernel, **options), given, leaves, [CLOSE[kind]] * 4)


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(13,), (5, 7)])
def test_wide_offsets_and_weights_keep_their_precision_beside_a_half_value(form, half, grid):
    value, offsets, weights = inputs(grid)
    given, leaves = both((value.to(half), offsets, weights))
    got = form(*given, kernel=3)
    assert got.dtype == half
    check(got, exact(*leaves, 3), given, leaves, [1e-2, 1e-2, 1e-5, 1e-5])


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("grid", [(1500,), (56, 56)])
def test_half_precision_reads_the_right_places_of_large_grids(form, grid):
    """Places are kept in fp32 whatever the values are in."""
    given = inputs(grid, batch=1, kind=torch.bfloat16)
    assert relative(form(*given, kernel=3).double(), exact(*given, 3)) < 1e-2


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("grid", [(13,), (5, 7)])
def test_offsets_and_weights_may_be_views_of_one_linear_output(form, grid):
    axes, groups, width = len(grid), 2, 5
    taps = 3**axes
    value, offsets, weights = inputs(grid, groups=groups, width=width)
    together = torch.cat([offsets.flatten(-2), weights], -1).flatten(-2).flatten(1, axes)  # group by group
    given, leaves = both((value, together))

    def split(value, together):
        parts = together.unflatten(1, grid).unflatten(-1, (groups, -1)).split([taps * axes, taps], -1)
        return value, parts[0].unflatten(-1, (taps, axes)), parts[1]

    got, wanted = form(*split(*given), kernel=3), exact(*split(*leaves), 3)
    seed = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, given, seed), torch.autograd.grad(wanted, leaves, seed.double()), strict=True)
    assert relative(got.double(), wanted) <= 1e-5
    assert all(relative(one.double(), other) <= 1e-5 for one, other in pairs)
    assert torch.equal(got, form(value, offsets.contiguous(), weights.contiguous(), kernel=3))


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same(form, kind):
    value, offsets, weights = inputs((5, 7), groups=2, width=4, kind=kind)
    offsets, weights = offsets[:1], weights[:1]
    wanted = form(value, offsets.repeat(2, 1, 1, 1, 1, 1), weights.repeat(2, 1, 1, 1, 1), kernel=3)
    channels_first = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sparse = torch.stack([offsets, offsets + 9], -1)[..., 0].expand(2, -1, -1, -1, -1, -1)
    taps_first = weights.movedim(-1, 0).contiguous().movedim(0, -1).expand(2, -1, -1, -1, -1)
    assert not any(each.is_contiguous() for each in (channels_first, sparse, taps_first))
    given, leaves = both([each.detach() for each in (channels_first, sparse, taps_first)])
    got = form(*given, kernel=3)
    assert torch.equal(got, wanted)
    check(got, exact(*leaves, 3), given, leaves, [CLOSE[kind]] * 4)


@needs_native
@pytest.mark.parametrize("grid", [(33,), (9, 8)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_change_no_bit(grid, kind):
    given = [each.requires_grad_() for each in inputs(grid, groups=3, width=5, batch=3, kind=kind)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = deformable(*given, kernel=3)
            results.append((y, *torch.autograd.grad(y, given, torch.ones_like(y))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS[:3], indirect=True)
@pytest.mark.parametrize(("grid", "options"), [((6,), {}), ((3, 4), {"scale": 0.5}), ((4, 3), {"stride": 2})])
def test_gradients_are_those_of_finite_differences(form, grid, options):
    given, _ = both(inputs(grid, groups=2, width=2, batch=1, kind=torch.float64, **options))
    assert torch.autograd.gradcheck(lambda *leaves: form(*leaves, kernel=3, **options), given)


def flattened(grid, kind=torch.float32, batch=2):
    """The operator's own arguments."""
    value, offsets, weights = inputs(grid, groups=2, width=3, batch=batch, kind=kind)
    axes = len(grid)
    zeros = torch.zeros_like(offsets[:1])
    base = places_of(zeros, 3)[0, :, 0, 3**axes // 2].to(torch.promote_types(kind, torch.float32))
    taps = places_of(zeros, 3)[0, 0, 0].to(base.dtype)
    return value, offsets.flatten(1, axes), weights.flatten(1, axes), base, taps, 0.5


@pytest.mark.all
@needs_native
@pytest.mark.parametrize("grid", [(7,), (3, 4)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_operators_keep_torch_library_rules(grid, kind):
    arguments = flattened(grid, kind)
    torch.library.opcheck(backward, (torch.randn_like(forward(*arguments)), *arguments))
    for each in arguments[:3]:
        each.requires_grad_()
    torch.library.opcheck(forward, arguments)


# One sample and the batch


@pytest.mark.parametrize("form", FORMS[:3], indirect=True)
@pytest.mark.parametrize("size", [7, 14, 28])
def test_batch_mates_change_nothing(form, size, request):
    """No bit in the operator, in no gradient either."""
    same = torch.equal if "operator" in request.node.callspec.id else lambda one, two: relative(one, two) <= 1e-6
    given = inputs((size, size), groups=2, width=4, batch=9)

    def run(part):
        leaves = [each[part].clone().requires_grad_() for each in given]
        y = form(*leaves, kernel=3)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    alone = [run(slice(index, index + 1)) for index in range(9)]
    for batch in range(1, 10):
        for number, whole in enumerate(run(slice(0, batch))):
            assert all(same(whole[index : index + 1], alone[index][number]) for index in range(batch))


@pytest.mark.parametrize("form", FORMS[:3], indirect=True)
@pytest.mark.parametrize("grid", [(6,), (3, 4)])
def test_an_empty_batch_has_empty_gradients(form, grid):
    given = [each.requires_grad_() for each in inputs(grid, batch=0)]
    y = form(*given, kernel=3)
    y.sum().backward()
    assert y.shape == (0, *grid, 6)
    assert all(each.grad is not None and each.grad.shape == each.shape for each in given)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("grid", [(3,), (3, 3)])
def test_a_single_point_of_a_single_sample(form, grid):
    given, leaves = both(inputs(grid, groups=1, batch=1, padding=0))
    got = form(*given, kernel=3, padding=0)
    assert got.shape == (1, *[1] * len(grid), 3)
    check(got, exact(*leaves, 3, padding=0), given, leaves, [1e-5] * 4)


# Places outside


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("grid", [(7,), (5, 7)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("away", "kind"),
    [(1e4, torch.float32), (1e9, torch.float32), (1e4, torch.float16), (1e4, torch.bfloat16), (1e9, torch.bfloat16)],
)
def test_places_far_outside_give_zeros_and_finite_gradients(form, grid, sign, away, kind):
    value, offsets, weights = inputs(grid, kind=kind)
    given = [each.requires_grad_() for each in (value, offsets + sign * away, weights)]
    y = form(*given, kernel=3)
    assert not y.any()
    for gradient in torch.autograd.grad(y.sum(), given):
        assert gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("axes", [1, 2])
def test_samples_fade_out_within_one_pixel_of_the_border(form, axes):
    """At -1 and beyond nothing is left; between -1 and 0 the border's share, and the same at the far end."""
    size = 5
    line = torch.tensor([-1.001, -0.999, -0.75, 0.0, size - 1, size - 0.75, size - 0.001, size + 0.001])
    shares = torch.tensor([0.0, 0.001, 0.25, 1.0, 1.0, 0.75, 0.001, 0.0])
    for place, share in zip(line, shares, strict=True):
        for axis in range(axes):
            offsets = torch.zeros(1, *[size] * axes, 1, 1, axes)
            offsets[(0, *[0] * axes, 0, 0, axis)] = place
            value, weights = torch.ones(1, *[size] * axes, 2), torch.ones(offsets.shape[:-1])
            got = form(value, offsets, weights, kernel=1)[(0, *[0] * axes)]
            assert (got - share).abs().max() < 1e-5
            assert share > 0 or not got.any()


@pytest.mark.parametrize("form", FORMS[:3], indirect=True)
@pytest.mark.parametrize("grid", [(7,), (5, 7)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_places_that_are_no_numbers_read_nothing(form, grid, bad):
    """They count as outside: zeros there, all else as it was. The values lie between NaNs, which nobody may read."""
    value, offsets, weights = inputs(grid, batch=2)
    guarded = torch.full((4, *value.shape[1:]), float("nan"))
    guarded[1:3] = value
    broken = offsets.clone()
    broken[0, 1, ..., 0] = bad  # in 2-D one axis alone
    broken[1] = bad
    given = [guarded[1:3].detach().requires_grad_(), broken.requires_grad_(), weights.requires_grad_()]
    y = form(*given, kernel=3, scale=2.0)
    far = torch.where(broken == offsets, offsets, 1e6)
    assert relative(y, form(value, far, weights, kernel=3, scale=2.0)) <= 1e-6
    assert y[0].any() and not y[0, 1].any() and not y[1].any()
    assert all(each.isfinite().all() for each in torch.autograd.grad(y.sum(), given))


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close_on_large_maps(form, kind):
    """12,544 points, values near 1000, offsets near 100."""
    grid = (112, 112)
    value = 1000 * torch.randn(1, *grid, 8).clamp(-3, 3)
    offsets = 100 * torch.randn(1, *grid, 2, 9, 2)
    weights = torch.randn(1, *grid, 2, 9)
    given, leaves = both([each.to(kind) for each in (value, offsets, weights)])
    y, wanted = form(*given, kernel=3), exact(*leaves, 3)
    assert y.isfinite().all() and relative(y.double(), wanted) <= 1e-2
    seed = torch.randn_like(wanted)
    gradients = torch.autograd.grad(y, given, seed.to(kind))
    assert all(each.isfinite().all() and each.any() for each in gradients)
    right = torch.autograd.grad(wanted, leaves, seed.to(kind).double())
    for place in (0, 2):  # those of the offsets jump where a place is rounded across a pixel
        assert relative(gradients[place].double(), right[place]) <= 1e-2


# Compilers and exporters


def captured(function):
    """The function compiled whole, but for the code, and what its graphs call: forward and backward."""
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph)

    torch._dynamo.reset()
    return torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True), graphs


def same_when_compiled(function, compiled, given):
    results = []
    for each in (function, compiled):
        y = each(*given, kernel=3, scale=0.5)
        results.append((y, *torch.autograd.grad(y, given, torch.arange(y.numel()).view_as(y) / y.numel())))
    assert all(relative(got, wanted) <= 1e-5 for wanted, got in zip(*results, strict=True))


@pytest.mark.all
@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("grid", [(9,), (5, 7)])
def test_compiles_to_one_graph_of_the_operator(form, grid, request):
    """Without the C++ code the compiler sees what the reference does. A second size of the batch changes nothing."""
    compiled, graphs = captured(form)
    same_when_compiled(form, compiled, [each.requires_grad_() for each in inputs(grid)])
    forward, backward = graphs
    sampled = any("grid_sampler" in name or "gather" in name for name in forward)
    if "operator" in request.node.callspec.id:
        assert "zoo.deformable.default" in forward and "zoo.deformable_backward.default" in backward and not sampled
    else:
        assert sampled and not any("zoo" in name for name in forward | backward)
    same_when_compiled(form, compiled, [each.requires_grad_() for each in inputs(grid, batch=3)])


@pytest.mark.all
@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("grid", [(9,), (5, 7)])
def test_inductor_gives_the_same(form, grid):
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True)
    for batch in (2, 3):  # the second compiles for any batch
        same_when_compiled(form, compiled, [each.requires_grad_() for each in inputs(grid, batch=batch)])


@pytest.mark.parametrize("grid", [(9,), (5, 7)])
def test_export_knows_no_operator_of_ours(grid):
    class Sample(torch.nn.Module):
        def forward(self, value, offsets, weights):
            return deformable(value, offsets, weights, kernel=3)

    given = inputs(grid)
    program = torch.export.export(Sample(), given, strict=False)
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)
    assert relative(program.module()(*given), deformable(*given, kernel=3)) <= 1e-5


# Several maps


@pytest.mark.parametrize("form", PUBLIC, indirect=True)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_multiscale_is_the_sum_over_the_maps(form, kind):
    value, weights = torch.randn(2, 16, 6).to(kind), torch.randn(2, 5, 3, 2, 4).to(kind)
    pixels = torch.randint(-1, 4, (2, 5, 3, 2, 4, 2)) + 0.1 + 0.8 * torch.rand(2, 5, 3, 2, 4, 2)
    places = (pixels.double() + 0.5) / torch.tensor(GRIDS)[:, None]
    places = places.to(torch.promote_types(kind, torch.float32))
    given, leaves = both((value, places, weights))
    wanted = 0
    for level, (part, grid) in enumerate(zip(leaves[0].split([12, 4], 1), GRIDS, strict=True)):
        there = leaves[1][:, :, :, level] * torch.tensor(grid) - 0.5
        wanted = wanted + gathered(part.unflatten(1, grid), there, leaves[2][:, :, :, level])
    got = several(given[0], GRIDS, *given[1:])
    assert got.dtype == kind
    check(got, wanted, given, leaves, [CLOSE[kind]] * 4)
