"""Deformable aggregation against torchvision, transformers and D-FINE, with random weights in fp64."""

import itertools

import pytest
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d
from transformers import DeformableDetrConfig, DFineConfig
from transformers.models.d_fine.modeling_d_fine import DFineGate, DFineMultiscaleDeformableAttention
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
)

from formulas import DIM, GRID, HEADS, check, copied, renamed, scattered, tokens
from zoo.kernels import deformable, multiscale
from zoo.kernels.deformable import gathered
from zoo.layer import Context, Memory, Place
from zoo.mixers import CROSSES, MIXERS
from zoo.tensors import to_map, to_tokens

CASES = list(itertools.product((3, 5), (1, 2), (1, 2), ("same", 0, 1), (1.0,)))
CASES += [(3, 1, 1, "same", 0.5), (5, 2, 2, "same", 2.0), (3, 1, 2, 1, 0.5)]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "padding", "scale"), CASES)
def test_deformable_is_torchvision(kernel, stride, dilation, padding, scale):
    batch, groups, channels, grid, taps = 2, 2, 6, (9, 11), kernel**2
    centred = dilation * (kernel - 1) // 2
    margin = centred if padding == "same" else padding
    out = [(size + 2 * margin - dilation * (kernel - 1) - 1) // stride + 1 for size in grid]
    value = torch.randn(batch, *grid, channels, dtype=torch.float64, requires_grad=True)
    offsets = (2 * torch.randn(batch, *out, groups, taps, 2, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(batch, *out, groups, taps, dtype=torch.float64, requires_grad=True)

    # What is read at place + scale * (tap + offset) lies scale * (tap + offset) - tap away from the tap.
    line = dilation * torch.arange(kernel, dtype=torch.float64) - centred
    tap = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(taps, 2)
    moved = scale * (tap + offsets) - tap
    lines = [stride * torch.arange(size) + centred - margin for size in out]
    points = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 1, 1, 2)
    places = points + scale * (tap + offsets.flatten(1, 2))
    wanted = deform_conv2d(
        value.permute(0, 3, 1, 2),
        moved.permute(0, 3, 4, 5, 1, 2).flatten(1, 3),
        torch.ones(channels, 1, kernel, kernel, dtype=torch.float64),
        stride=stride,
        padding=margin,
        dilation=dilation,
        mask=weights.permute(0, 3, 4, 1, 2).flatten(1, 2),
    ).permute(0, 2, 3, 1)
    leaves = (value, offsets, weights)
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "scale": scale}
    check(deformable(*leaves, **options), wanted, leaves)
    check(gathered(value, places, weights.flatten(1, 2)), wanted.flatten(1, 2), leaves)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (9, 1), (5, 2)])
def test_deformable_on_a_line_is_torchvision(kernel, dilation):
    value = torch.randn(2, 17, 6, dtype=torch.float64, requires_grad=True)
    offsets = (2 * torch.randn(2, 17, 3, kernel, 1, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 17, 3, kernel, dtype=torch.float64, requires_grad=True)
    flat = torch.cat([torch.zeros_like(offsets), offsets], -1)
    wanted = deform_conv2d(
        value.transpose(1, 2)[:, :, None],
        flat.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, :, None],
        torch.ones(6, 1, 1, kernel, dtype=torch.float64),
        padding=(0, dilation * (kernel - 1) // 2),
        dilation=dilation,
        mask=weights.permute(0, 2, 3, 1).flatten(1, 2)[:, :, None],
    )
    leaves = (value, offsets, weights)
    check(deformable(*leaves, kernel=kernel, dilation=dilation), wanted[:, :, 0].transpose(1, 2), leaves)
    taps = dilation * (torch.arange(kernel)[:, None] - kernel // 2)
    places = torch.arange(17).view(17, 1, 1, 1) + taps + offsets
    check(gathered(value, places, weights), wanted[:, :, 0].transpose(1, 2), leaves)


@pytest.mark.parametrize(("kernel", "groups"), [(3, 0), (5, 2)])
def test_dcnv4_is_torchvision(kernel, groups):
    ours = scattered(MIXERS["dcnv4"](DIM, HEADS, kernel=kernel, groups=groups))
    x = tokens()
    groups, taps = groups or HEADS, kernel**2
    sample = to_map(ours.sample(x), GRID.grid).unflatten(1, (groups, 3 * taps))
    maps = deform_conv2d(
        to_map(ours.value(x), GRID.grid),
        sample[:, :, : 2 * taps].flatten(1, 2),
        torch.ones(DIM, 1, kernel, kernel, dtype=torch.float64),
        padding=kernel // 2,
        mask=sample[:, :, 2 * taps :].flatten(1, 2),
    )
    check(ours(x, GRID), ours.out(to_tokens(maps)), (x,))


MAPS = ((5, 7), (3, 4), (2, 2))


def maps_of(grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """How transformers names the maps of a memory: their sizes, twice, and where each begins."""
    sizes = torch.tensor(grids)
    return sizes, list(grids), torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])


def test_multiscale_is_transformers():
    value = torch.randn(2, 51, DIM, dtype=torch.float64, requires_grad=True)
    places = (1.4 * torch.rand(2, 6, HEADS, 3, 5, 2, dtype=torch.float64) - 0.2).requires_grad_()
    weights = torch.randn(2, 6, HEADS, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = MultiScaleDeformableAttention()(
        value.unflatten(-1, (HEADS, -1)), *maps_of(MAPS), places.flip(-1), weights, im2col_step=64
    )
    check(multiscale(value, MAPS, places.unbind(3), weights.unbind(3)), wanted, (value, places, weights))


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [1, 4])
def test_deformable_cross_attention_is_transformers(boxes, masked, points):
    config = DeformableDetrConfig(d_model=DIM, num_feature_levels=len(MAPS), use_timm_backbone=False)
    theirs = scattered(DeformableDetrMultiscaleDeformableAttention(config, HEADS, points))
    ours = copied(
        CROSSES["deformable"](DIM, HEADS, Place(levels=len(MAPS)), points=points),
        renamed(theirs, sampling_offsets="offsets", attention_weights="scores", value_proj="values", output_proj="out"),
    )
    real = torch.cat(
        [
            torch.stack([torch.arange(rows * columns) < area, torch.arange(rows * columns) % columns < columns - 1])
            for (rows, columns), area in zip(MAPS, (21, 8, 2), strict=True)
        ],
        1,
    )
    sides = torch.rand(2, 6, 4, dtype=torch.float64)
    reference = (sides if boxes else sides[..., :2].clone()).requires_grad_()
    queries, memory, code = (torch.randn(2, size, DIM, dtype=torch.float64, requires_grad=True) for size in (6, 51, 6))
    context = Context(
        grid=(6,),
        code=code,
        memory=Memory(memory, mask=real if masked else None, grids=MAPS, reference=reference),
    )
    sizes, listed, begins = maps_of(MAPS)
    wanted, _ = theirs(
        queries,
        attention_mask=real if masked else None,
        encoder_hidden_states=memory,
        position_embeddings=code,
        reference_points=reference[:, :, None].expand(-1, -1, len(MAPS), -1),
        spatial_shapes=sizes,
        spatial_shapes_list=listed,
        level_start_index=begins,
    )
    check(ours(queries, context), wanted, (queries, memory, code, reference))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [4, (3, 6, 3)])
def test_gated_cross_attention_with_points_for_each_level_is_d_fine(points, masked):
    """Their gate and its norm together, as the residual around our attention."""
    number = list(points) if isinstance(points, tuple) else points
    config = DFineConfig(d_model=DIM, decoder_attention_heads=HEADS, decoder_n_points=number)
    theirs, gate = scattered(DFineMultiscaleDeformableAttention(config)), scattered(DFineGate(DIM))
    theirs.num_points_scale = theirs.num_points_scale.reciprocal().round().reciprocal()  # theirs are of fp32
    row = CROSSES["deformable"](DIM, HEADS, Place(levels=len(MAPS)), points=points, project=False, gated=True)
    weights = renamed(theirs, sampling_offsets="offsets", attention_weights="scores")
    weights = {name: value for name, value in weights.items() if name != "num_points_scale"}
    ours = copied(row, weights | {f"gate.{name}": value for name, value in gate.gate.state_dict().items()})
    reference = torch.rand(2, 6, 4, dtype=torch.float64).requires_grad_()
    queries, memory, code = (torch.randn(2, size, DIM, dtype=torch.float64, requires_grad=True) for size in (6, 51, 6))
    real = torch.rand(2, 51) < 0.7 if masked else None
    sizes, listed, _ = maps_of(MAPS)
    given = {"encoder_hidden_states": memory, "attention_mask": None if real is None else real[..., None]}
    given |= {"reference_points": reference[:, :, None], "spatial_shapes": sizes, "spatial_shapes_list": listed}
    wanted = gate(queries, theirs(queries + code, **given)[0])
    context = Context(grid=(6,), code=code, memory=Memory(memory, mask=real, grids=MAPS, reference=reference))
    check(gate.norm(queries + ours(queries, context)), wanted, (queries, memory, code, reference))
