"""What several tests share: every row of every table as a layer, contexts to run it in, and weights worth comparing."""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sympy import preorder_traversal
from torch import Tensor, nn

from zoo.channels import CHANNELS
from zoo.ffns import FFNS
from zoo.layer import Context, Layer, Memory, Place, advance
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.norms import NORMS
from zoo.outputs.boxes import Truth
from zoo.positions import POSITIONS, Position
from zoo.spec import make, parse
from zoo.weights.files import record

DIM, HEADS = 32, 2
MAPS = ((3, 4), (2, 3), (2, 2), (1, 2))  # of a memory
ON_PICTURES = [name for name, row in MIXERS.items() if 2 in row.dimensions]
BOTH_WAYS = [name for name in ON_PICTURES if not MIXERS[name].causal]  # in any model
SPECS = ("softmax(qk_norm='layernorm')", "softmax(kv_heads=1)", "softmax(head_dim=12)", "dcnv4(kernel=5, scale=0.5)")
SPECS += ("relative(window=4)", "local(window=3, tokens=2)")
SPECS += ("moh(shared=2)", "moh(how='leave_one_out')", "moa(top=8)", "moa(experts=4, top=2, head_dim=12)")
SPECS += ("dcnv4(weights='softmax', local=3, centre=True, bias=False)", "dcnv4(scales=6.0)", "linfusion(lift=False)")
SPECS += ("softmax(qk_norm='l2', kv_heads=1, log_n=True, temperature='learned', null=True)", "entmax(alpha=2.0)")
SPECS += ("entmax(learned=True)", "rela(norm='layernorm', gate=False)", "rela(norm='none', scale='length')")
SPECS += ("topk(k=5)", "sinkhorn(steps=5)", "causal(until=0.0)", "causal(until=0.0, normalized=True)")
SPECS += ("rala(weighted=False, gate=False)", "taylor(order=1, normalize=True)", "soft(stride=2, normalize=False)")
SPECS += ("random_features(kind='trigonometric')", "random_features(learned=False, kind='trigonometric')")
SPECS += ("mgk(keys=3, shifted=True)", "mgk(hard=True)", "additive(score='concat')", "multi_token(queries=3, group=1)")
SPECS += (
    "gqa(kv_heads=2, merge='weighted', groups='key_norm')",
    "head_embedding(how='multiply')",
    "optimized(key=False)",
)
SPECS += ("relational(relational_heads=1, relations=3, symmetric=True)", "conv_projection(kernels=(2, 2), of='qk')")
SPECS += ("conv_projection(kernels=(1, 3), of='kv')", "relative(conv=3)")
SPECS += ("shaw(span=3, on='qk', values=True)", "irpe(method='cross', on='qkv')", "irpe(method='euclidean', on='qk')")
SPECS += ("cope(positions=4, causal=True)", "shared_scores(residual=True)")
SPECS += ("blend(of=('softmax', 'shaw(span=3)'), weights='learned')", "blend(weights='input')")
SPECS += ("blend(of=('softmax', 'sepconv', 'fnet'))", "blend(of=('softmax', 'deltanet'), weights='learned')")
SPECS += ("fnet(scale=False)", "deltanet(directions=1)")


def rehash(folder: Path) -> None:
    """Makes config.json of a checkpoint, whose tensors a test changed, describe them."""
    config = json.loads((folder / "config.json").read_text())
    config["files"] = {name: record(folder / name) for name in config["files"]}
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Moves all that starts constant (zero weights, gains, biases, running statistics) off its start, and widens small
    matrices, so that every part has a say in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
        elif parameter.ndim == 2:
            parameter *= parameter.shape[1] ** -0.5 / parameter.std()
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module


def prepared(model: torch.nn.Module) -> torch.nn.Module:
    """fp64, random statistics, gains and biases, training over, matrices as initialised."""
    generator = torch.Generator().manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or bool((parameter == 0).all()):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.3 + torch.rand(buffer.shape, generator=generator))
    advance(model, 1.0)
    return model.eval()


def _advanced(progress: float, axes: int) -> Layer:
    norm = NORMS["prepbn"](DIM)
    advance(norm, progress)
    return norm


def _mixer(spec: str, axes: int) -> Layer:
    return make(MIXERS, spec, DIM, HEADS, Place(axes))


def _conv(row: type[Layer], norm: str, axes: int) -> Layer:
    """The branch, its norm put in as a Block does."""
    layer: Any = row(DIM, Place(axes))
    for site, size in row.sites_of(DIM, HEADS).items():
        if site == "norm":
            layer.norm = NORMS[norm](size.width)
    return layer


class Given(NamedTuple):
    """A bias of the scores that is given for all pairs, [heads, N, N]."""

    values: torch.Tensor

    def between(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.values[:, queries[..., None], keys[..., None, :]][None]


def position(name: str, dim: int, width: int, grid: tuple[int, ...], prefix: int = 0, **options: Any) -> Any:
    """A position for tokens on a grid, whose heads have that width."""
    return POSITIONS[name](dim, dim // width, width, Place(len(grid), grid, prefix), **options)


def _rows() -> dict[str, Callable[[int], Layer]]:
    rows: dict[str, Callable[[int], Layer]] = {}
    for name in MIXERS:
        rows[f"mixer-{name}"] = functools.partial(_mixer, name)
    for name, row in CONVS.items():
        for norm in ("batchnorm", "layernorm"):
            rows[f"conv-{name}-{norm}"] = functools.partial(_conv, row, norm)
    for name, row in CROSSES.items():
        rows[f"cross-{name}"] = functools.partial(lambda row, axes: row(DIM, HEADS, Place(axes, levels=len(MAPS))), row)
    for name, row in NORMS.items():
        rows[f"norm-{name}"] = functools.partial(lambda row, axes: row(DIM), row)
    for name, row in CHANNELS.items():
        rows[f"channel-{name}"] = functools.partial(lambda row, axes: row(DIM, Place(axes)), row)
    for name, row in FFNS.items():
        rows[f"ffn-{name}"] = functools.partial(lambda row, axes: row(DIM), row)
    for name, row in POSITIONS.items():
        rows[f"position-{name}"] = functools.partial(
            lambda row, axes: row(DIM, HEADS, DIM // HEADS, Place(axes, (11,) if axes == 1 else (4, 6), 2)), row
        )
    for spec in SPECS:
        rows[f"mixer-{spec}"] = functools.partial(_mixer, spec)
    for progress in (0.0, 0.4, 1.0):
        rows[f"norm-prepbn({progress})"] = functools.partial(_advanced, progress)
    del rows["norm-prepbn"]
    return rows


ROWS = _rows()


def _dimensions(name: str) -> tuple[int, ...]:
    kind, _, spec = name.partition("-")
    return MIXERS[parse(spec)[0]].dimensions if kind == "mixer" else (1, 2)


# Each row on each kind of grid that it works on; what works on images too is tested along time by `--all`.
PLACES = [
    pytest.param(name, axes, marks=[pytest.mark.all] if axes < max(_dimensions(name)) else [])
    for name in ROWS
    for axes in _dimensions(name)
]


def _source(name: str) -> Path:
    kind, _, spec = name.partition("-")
    tables = {"mixer": MIXERS, "conv": CONVS, "cross": CROSSES, "norm": NORMS, "channel": CHANNELS, "ffn": FFNS}
    table = (tables | {"position": POSITIONS})[kind]
    match = re.match(r"\w+", spec)
    assert match is not None
    return Path(inspect.getfile(table[match[0]]))


SOURCES = {name: _source(name) for name in ROWS}
"""The file that a row is written in."""


def reads_prefix(layer: Layer) -> bool:
    return not layer.mixes or "prefix" in layer.reads


def context_for(layer: Layer, grid: tuple[int, ...], batch: int = 1, extents: list[tuple[int, ...]] | None = None):
    """A Context with all that the layer reads; extents gives each sample's real part of the grid."""
    prefix = 2 if reads_prefix(layer) else 0
    mask = None
    if extents is not None:
        mask = torch.stack([rectangle(grid, extent) for extent in extents])
        mask = torch.cat([mask.new_ones(batch, prefix), mask], 1)
    context = Context(grid=grid, prefix=prefix, mask=mask)
    if "memory" in layer.reads:
        context = context._replace(memory=memory_for(context, batch))
    if "rotary" in layer.reads:
        head_dim: int = layer.head_dim  # pyright: ignore
        context = position("rope", DIM, head_dim, grid, prefix).place(context)
    if "bias" in layer.reads:
        context = position("alibi", DIM, DIM // HEADS, grid, prefix).place(context)
    if isinstance(layer, Position):
        context = layer.place(context)
    return context


def memory_for(context: Context, batch: int) -> Memory:
    """Four maps, padded, and for each query a place to look at, which depends on where the query stands alone."""
    generator = torch.Generator().manual_seed(7)
    size = sum(math.prod(grid) for grid in MAPS)
    tokens = torch.randn(1, size, DIM, generator=generator).expand(batch, -1, -1)
    code = torch.randn(1, size, DIM, generator=generator)
    sides = [(max(1, rows - 1), columns - 1) for rows, columns in MAPS]
    real = torch.cat([rectangle(grid, side) for grid, side in zip(MAPS, sides, strict=True)])
    share = torch.tensor([(x / columns, y / rows) for (y, x), (rows, columns) in zip(sides, MAPS, strict=True)])
    lines = [0.1 + 0.07 * torch.arange(length) for length in context.grid]
    where = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)
    where = torch.cat([torch.full((context.prefix, where.shape[1]), 0.5), where])
    reference = where[None, :, [0, -1]].expand(batch, -1, -1)
    return Memory(tokens, real.expand(batch, -1), code, MAPS, reference, share.expand(batch, -1, -1))


def rectangle(grid: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
    inside = torch.ones(grid, dtype=torch.bool)
    for axis, (size, length) in enumerate(zip(grid, extent, strict=True)):
        shape = [1] * len(grid)
        shape[axis] = size
        inside = inside & (torch.arange(size) < length).view(shape)
    return inside.flatten()


def tokens_for(context: Context, batch: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(batch, context.prefix + math.prod(context.grid), DIM)


def padded(x: Tensor, context: Context, grid: tuple[int, ...]) -> Tensor:
    """The tokens x of one grid put into the top-left corner of a larger one, large values elsewhere."""
    batch = len(x)
    out = 5.0 * torch.randn(batch, *grid, x.shape[-1], dtype=x.dtype)
    corner = tuple(slice(0, size) for size in context.grid)
    out[(slice(None), *corner)] = x[:, context.prefix :].unflatten(1, context.grid)
    return torch.cat([x[:, : context.prefix], out.flatten(1, -2)], 1)


def cropped(x: Tensor, context: Context, wide: Context) -> Tensor:
    """The inverse of `padded`: the tokens of the smaller grid."""
    corner = tuple(slice(0, size) for size in context.grid)
    inside = x[:, wide.prefix :].unflatten(1, wide.grid)[(slice(None), *corner)]
    return torch.cat([x[:, : wide.prefix], inside.flatten(1, -2)], 1)


def longest_size(model: nn.Module, *inputs: Tensor) -> int:
    """How many terms the longest size of a tensor has when the model is compiled for inputs of any size.

    The time that inductor takes grows out of hand with the length of these expressions.
    """
    lengths = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            sizes = value.shape if isinstance(value, Tensor) else ()
            lengths.extend(
                sum(1 for _ in preorder_traversal(size.node.expr)) for size in sizes if isinstance(size, torch.SymInt)
            )
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs)
    return max(lengths)


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def random_boxes(*shape: int) -> Tensor:
    """Boxes [*shape, 4] (centre, size) within an image."""
    size = 0.05 + 0.4 * torch.rand(*shape, 2)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2), size], -1)


def random_truth(counts: list[int], classes: int) -> Truth:
    """So many objects in each image."""
    most, images = max(counts), len(counts)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    boxes = random_boxes(images, most) * valid[..., None]
    return Truth(torch.randint(classes, (images, most)) * valid, boxes, valid)


def listed(truth: Truth) -> list[dict[str, Tensor]]:
    """The objects of each image, as transformers takes them."""
    return [{"class_labels": labels[valid], "boxes": boxes[valid]} for labels, boxes, valid in zip(*truth, strict=True)]
