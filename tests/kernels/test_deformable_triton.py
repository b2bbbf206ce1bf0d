"""The CUDA form of deformable aggregation without a GPU: run by Triton's interpreter, and compiled for Hopper."""

import importlib.util
import math
import re
import subprocess

import pytest
import torch

from helpers import relative
from zoo.kernels.deformable import gathered

triton = pytest.importorskip("triton", reason="triton is made for Linux only")

FLOATS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


@pytest.fixture
def kernels(monkeypatch):
    """A copy of the module whose kernels Triton interprets, with those of Triton's library that they call: which form
    they take was decided when triton was imported."""
    from triton.runtime import interpreter

    def call(self, *args):
        """A call within a kernel. The original leaves the language interpreted after it; and here, where the function
        lies beside the kernel, the language is so already."""
        if self.fn.__module__ == module.__name__:
            return self.rewrite()(*args)
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args)
        finally:
            scope.restore()

    spec = importlib.util.find_spec("zoo.kernels.deformable_triton")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    for name in ("cdiv", "zeros", "sum", "interleave"):
        function = getattr(triton.language, name)
        if isinstance(function, triton.JITFunction):
            monkeypatch.setattr(triton.language, name, interpreter.InterpretedFunction(function.fn))
    return module


def inputs(grid, out=None, groups=2, channels=16, taps=9, batch=2, kind=torch.float32, spread=1.5, shift=0.137):
    """value, offsets and weights (views of one tensor), base, taps; `out` points on a lattice laid over the grid, and
    moved off whole numbers, where the sample has no gradient."""
    axes, out = len(grid), out or grid
    value = torch.randn(batch, *grid, groups * channels).to(kind)
    both = torch.randn(batch, math.prod(out), groups, taps * (axes + 1)).to(kind)
    offsets, weights = both[..., : taps * axes].unflatten(-1, (taps, axes)), both[..., taps * axes :]
    offsets *= spread
    base = torch.cartesian_prod(*(torch.linspace(0, n - 1, m) + shift for n, m in zip(grid, out, strict=True)))
    side = round(taps ** (1 / axes)) if axes == 2 else taps
    cells = torch.cartesian_prod(*[torch.arange(side) - side // 2] * axes).float()
    return value, offsets, weights, base.reshape(-1, axes), cells.reshape(-1, axes)


def exact(value, offsets, weights, base, taps, scale):
    """Output and a function from its gradient to those of value, offsets and weights, in fp64."""
    given = [each.detach().double().requires_grad_() for each in (value, offsets, weights)]
    out = gathered(given[0], base[:, None, None].double() + scale * (taps.double() + given[1]), given[2])
    return out, lambda gradient: torch.autograd.grad(out, given, gradient.double())


def check(kernels, given, scale=0.75):
    got = kernels.forward(*given, scale)
    wanted, gradients = exact(*given, scale)
    tolerance = FLOATS[given[0].dtype]
    assert got.shape == wanted.shape and got.dtype == given[0].dtype
    assert relative(got.double(), wanted) < tolerance
    gradient = torch.randn_like(got)
    for one, other, tensor in zip(
        kernels.backward(gradient, *given, scale), gradients(gradient), given[:3], strict=True
    ):
        assert one.shape == tensor.shape and one.dtype == tensor.dtype
        assert relative(one.double(), other) < tolerance


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    "grid,out,channels,taps,kind",
    [
        ((3, 5), (2, 3), 16, 9, torch.bfloat16),
        ((3, 5), (2, 3), 32, 9, torch.float32),
        ((4, 3), (3, 3), 5, 4, torch.bfloat16),
        ((1, 7), (1, 3), 48, 1, torch.float16),
        ((5, 4), (1, 2), 1, 25, torch.float32),
        ((5, 4), (2, 2), 48, 4, torch.bfloat16),
        ((4, 3), (3, 3), 5, 1, torch.float64),
        ((9,), (5,), 32, 9, torch.bfloat16),
        ((9,), (140,), 1, 1, torch.float32),
        ((1,), (2,), 16, 9, torch.float16),
        ((6,), (3,), 5, 11, torch.float32),
    ],
)
def test_outputs_and_gradients_equal_the_exact_ones(kernels, grid, out, channels, taps, kind):
    check(kernels, inputs(grid, out, channels=channels, taps=taps, kind=kind))


def test_whole_positions_have_the_gradient_towards_the_upper_pixel(kernels):
    """Offsets are zero in an untrained model, where both sides of a pixel differ; grid_sample takes the upper, too."""
    given = inputs((3, 5), (3, 5), groups=1, spread=0.0, shift=0.0)
    value, offsets, weights = [each.double().requires_grad_() for each in given[:3]]
    places = given[3][:, None, None].double() + given[4].double() + offsets
    where = (places / torch.tensor([1.0, 2.0]).double() - 1).flip(-1)[:, :, 0]  # -1 and 1 are the outer pixels' centres
    samples = torch.nn.functional.grid_sample(value.movedim(-1, 1), where, padding_mode="zeros", align_corners=True)
    out = torch.einsum("bcpk,bpk->bpc", samples, weights[:, :, 0])
    gradient = torch.randn(out.shape)
    wanted = torch.autograd.grad(out, (value, offsets, weights), gradient.double())
    assert relative(kernels.forward(*given, 1.0).double(), out) < 1e-5
    for one, other in zip(kernels.backward(gradient, *given, 1.0), wanted, strict=True):
        assert relative(one.double(), other) < 1e-5


def test_each_tensor_may_have_its_own_dtype_and_strides(kernels):
    value, offsets, weights, base, taps = inputs((3, 5), (2, 3), groups=3, channels=4, taps=4)
    value = value.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    offsets = offsets.movedim(-1, 0).contiguous().movedim(0, -1).half()
    check(kernels, (value, offsets, weights[:, ::2].repeat_interleave(2, 1), base, taps))


@pytest.mark.parametrize("grid", [(7,), (3, 5)])
@pytest.mark.parametrize("far", [1e4, -1e9, float("inf"), float("-inf"), float("nan")])
def test_positions_outside_give_zeros(kernels, grid, far):
    value, offsets, weights, base, taps = inputs(grid, (2,) * len(grid), groups=1, taps=1)
    offsets = torch.full_like(offsets, far)
    out = kernels.forward(value, offsets, weights, base, taps, 1.0)
    assert torch.equal(out, torch.zeros_like(out))
    for each in kernels.backward(torch.randn_like(out), value, offsets, weights, base, taps, 1.0):
        assert torch.equal(each, torch.zeros_like(each))


def test_one_axis_outside_is_enough(kernels):
    value, offsets, weights, base, taps = inputs((3, 5), (2, 2), groups=1, taps=1)
    offsets = torch.cat([offsets[..., :1] + 1e6, offsets[..., 1:]], -1)
    out = kernels.forward(value, offsets, weights, base, taps, 1.0)
    assert not out.any()
    assert not any(each.any() for each in kernels.backward(out + 1, value, offsets, weights, base, taps, 1.0))


@pytest.mark.parametrize("batch,out", [(0, 2), (2, 0)])
def test_nothing_in_gives_nothing_out(kernels, batch, out):
    value, offsets, weights, base, taps = inputs((3, 5), (2, 2), batch=batch)
    offsets, weights, base = offsets[:, : 2 * out], weights[:, : 2 * out], base[: 2 * out]
    y = kernels.forward(value, offsets, weights, base, taps, 1.0)
    assert y.shape == (batch, 2 * out, 32)
    for one, other in zip(
        kernels.backward(y, value, offsets, weights, base, taps, 1.0), (value, offsets, weights), strict=True
    ):
        assert one.shape == other.shape and not one.any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_batch_mates_change_no_bit(kernels, kind):
    value, offsets, weights, *rest = inputs((3, 3), (2, 2), groups=1, taps=4, batch=9, kind=kind)
    whole = kernels.forward(value, offsets, weights, *rest, 1.0)
    for size in (1, 2, 5):
        part = slice(9 - size, None)
        assert torch.equal(kernels.forward(value[part], offsets[part], weights[part], *rest, 1.0), whole[part])


def compiled(monkeypatch, name, grid, channels, kind, groups=2):
    """What a launch with these shapes compiles to for compute capability 9.0, specialised as a launch would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    import zoo.kernels.deformable_triton as module

    kernel, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, {(groups,): lambda *args, **kwargs: calls.append((args, kwargs))})
    given = inputs(grid, (1,) * len(grid), groups=groups, channels=channels, batch=1, kind=kind)
    if name == "_forward":
        module.forward(*given, 1.0)
    else:
        module.backward(torch.randn(1, 1, groups * channels).to(kind), *given, 1.0)
    [(values, constants)] = calls
    warps = constants.pop("num_warps")
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for index, value in enumerate(values):
        argument = kernel.arg_names[index]
        if isinstance(value, int) and value == 1:
            constants[argument] = 1
            continue
        signature[argument] = mangle_type(value)
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def usage(binary, folder):
    """Registers, bytes of stack (where registers spill) and bytes of shared memory."""
    (folder / "kernel.cubin").write_bytes(binary)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return [int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text.stdout).groups()]


@pytest.mark.all
@pytest.mark.parametrize(
    "name,grid,channels,kind",
    [
        pytest.param(name, grid, channels, kind, marks=() if channels == chosen else pytest.mark.all)
        for name in ("_forward", "_backward")
        for grid, kind, chosen in [
            ((56, 56), torch.bfloat16, 16),
            ((56, 56), torch.float32, None),
            ((1500,), torch.bfloat16, None),
            ((1500,), torch.float32, None),
        ]
        for channels in (16, 32)
    ],
)
def test_hopper_takes_the_kernels_without_spilling(monkeypatch, tmp_path, name, grid, channels, kind):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        kernel = compiled(monkeypatch, name, grid, channels, kind)
    registers, stack, shared = usage(kernel.asm["cubin"], tmp_path)
    print(f"{name} {grid} D={channels} {kind}: {registers} registers, {stack} stack, {shared} shared")
    assert stack == 0 and shared == 0
    assert registers <= 80
    assert ".v4" in kernel.asm["ptx"]  # 16 bytes at a time


@pytest.mark.all
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_sizes_of_one_compile(monkeypatch, tmp_path, name):
    """A launch gives the compiler numbers that are 1 as plain constants: one group on a map of one pixel."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        kernel = compiled(monkeypatch, name, (1, 1), 16, torch.float32, groups=1)
    assert kernel.asm["cubin"]


def test_importing_needs_no_gpu_and_interprets_nothing():
    import zoo.kernels.deformable_triton as module

    assert isinstance(module._forward, triton.JITFunction) and isinstance(module._backward, triton.JITFunction)
