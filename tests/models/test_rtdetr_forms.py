"""RT-DETR in its other forms: maps for other models, folded, saved, compiled, exported."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision

import zoo
from helpers import prepared, rectangle, relative
from models.test_rtdetr import SIZES, TRUNKS, apart, build, named, noise, rows, together, total
from zoo.layer import Context
from zoo.models import PRESETS
from zoo.models.rtdetr import RTDETRConfig
from zoo.tensors import to_tokens

# Features, folding, checkpoints


def test_features_are_the_maps_behind_the_neck():
    model = build()
    maps = model.features(torch.randn(2, 3, 70, 50))
    assert model.strides == [8, 16, 32] and model.num_features == 32
    assert [tuple(each.shape) for each in maps] == [(2, 32, 12, 8), (2, 32, 6, 4), (2, 32, 3, 2)]
    images = torch.randn(1, 3, 64, 64)
    (last,) = model.features(images, [-1])
    memory, _ = model.encode(images)
    assert torch.equal(model.levels[-1](to_tokens(last), Context(grid=(2, 2))), memory.tokens[:, -4:])
    with pytest.raises(ValueError, match="level 3 does not exist"):
        model.features(images, [3])


FOLDED = {"timm:resnet18d": ("layer2.0.downsample.2", "bn1"), "timm:hgnetv2_b0": ("stem.stem2a.bn",)}
FOLDED["timm:regnetx_002"] = ("stem.bn", "s4.b7.conv2.bn")


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("trunk", "choice"),
    [
        (TRUNKS[0], {}),
        (TRUNKS[1], {"norm": "prepbn", "neck_channel": "eca"}),
        (TRUNKS[2], {"neck_ratio": 1.0}),
        ("timm:resnet18d", {}),
        ("timm:hgnetv2_b0", {}),
        ("timm:regnetx_002", {}),
        ("timm:resnetv2_18", {}),
        ("timm:convnext_atto", {"neck_norm": "layernorm"}),
    ],
    ids=named,
)
@torch.no_grad()
def test_a_fused_model_gives_the_same(trunk, choice):
    model: Any = prepared(build(trunk, **choice))
    fused = zoo.fuse(model)
    assert fused.fusion is not None
    done = {fold.layer for fold in fused.fusion if fold.into}
    if "neck_norm" not in choice:
        for part in ("inputs.0.norm", "neck.laterals.1.norm", "neck.down.0.blocks.0.narrow", "levels.2.norm"):
            assert part in done
        assert fused.neck.up[1].blocks[0].narrow is None and not [
            name for name in fused.state_dict() if "running" in name and name.startswith("neck")
        ]
    if trunk in FOLDED:
        assert not [name for name in fused.state_dict() if "running" in name]
        assert done >= {f"trunk.model.net.{norm}" for norm in FOLDED[trunk]}
    images, mask = together([torch.randn(3, 70, 50).double(), torch.randn(3, 64, 96).double()], (80, 96))
    for given in ((images, mask), (images[:, :, :64], None)):
        one, other = (each.encode(*given)[0] for each in (model, fused))
        real = 1.0 if one.mask is None else one.mask[..., None]
        assert relative(other.tokens * real, one.tokens * real) < 1e-12
        assert apart(rows(fused(*given))[0], rows(model(*given))[0]) < 1e-9


@torch.no_grad()
def test_a_branch_of_a_rep_block_is_folded_exactly():
    block: Any = prepared(build()).neck.down[0].blocks[0]
    x, mask = torch.randn(2, 30, 16).double(), torch.stack([rectangle((5, 6), size) for size in ((5, 6), (3, 4))])
    for context in (Context(grid=(5, 6)), Context(grid=(5, 6), mask=mask)):
        real = 1.0 if context.mask is None else context.mask[..., None]
        folded = zoo.fuse(block)
        assert folded.narrow is None and relative(folded(x, context) * real, block(x, context) * real) < 1e-12
    assert [fold.layer for fold in folded.fusion if fold.layer == "narrow"] == ["narrow"]


@pytest.mark.daily(4)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trunk", [TRUNKS[0], "timm:resnet18d"], ids=named)
@torch.no_grad()
def test_a_checkpoint_round_trips(trunk, fused, tmp_path):
    model: Any = build(trunk)
    model = zoo.fuse(model) if fused else model
    zoo.save_model(model, tmp_path / "detector")
    loaded = zoo.load_checkpoint(tmp_path / "detector").model
    images = torch.randn(1, 3, 70, 50)
    assert torch.equal(rows(loaded(images)), rows(model.eval()(images)))


@pytest.mark.daily(4)
@pytest.mark.parametrize("strides", [(16, 32), (4, 8, 16, 32)])
@pytest.mark.parametrize("trunk", [TRUNKS[2], "timm:resnet18d"], ids=named)
@torch.no_grad()
def test_any_levels_give_features_fold_and_round_trip(trunk, strides, tmp_path):
    model: Any = prepared(build(trunk, strides=strides)).float().double()
    images, mask = together([torch.randn(3, 70, 50).double(), torch.randn(3, 64, 96).double()], (80, 96))
    assert model.strides == [*strides] and len(model.channels) == len(strides)
    maps = model.features(images, mask=mask)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 96 // stride, 96 // stride) for stride in strides]
    wanted, fused = model(images, mask), zoo.fuse(model)
    done = {fold.layer for fold in fused.fusion if fold.into}  # pyright: ignore[reportOptionalIterable]
    assert done >= {f"neck.laterals.{number}.norm" for number in range(len(strides) - 1)}
    zoo.save_model(copy.deepcopy(model).float(), tmp_path / "detector")
    for other in (fused, zoo.load_checkpoint(tmp_path / "detector").model.double()):
        for got, each in zip(rows(other(images, mask)), rows(wanted), strict=True):
            assert apart(got, each) < 1e-9


@torch.no_grad()
def test_a_near_tie_does_not_upset_the_probe():
    """The least change of a weight turns the ranking of the queries, and hardly the probe."""
    model = build().double()
    inputs = model.config.probe_inputs(torch.Generator().manual_seed(0))
    inputs = {name: each.double() for name, each in inputs.items()}
    model.score.weight *= 1e-9
    model.score.bias.fill_(-2.0)
    near = copy.deepcopy(model)
    near.score.weight *= -1
    assert (rows(model(**inputs)) - rows(near(**inputs))).abs().max() > 0.01
    wanted, got = (each.config.probe_outputs(each, inputs) for each in (model, near))
    assert got.keys() == wanted.keys() and all(relative(got[name], wanted[name]) < 1e-6 for name in wanted)
    near.boxes[0].layers[0].weight *= 1.1
    assert max(relative(each, wanted[name]) for name, each in near.config.probe_outputs(near, inputs).items()) > 1e-3


DETECTORS = [name for name, config in PRESETS.items() if isinstance(config, RTDETRConfig)]
MILLIONS = {"rtdetr_r18": 20.2, "rtdetr_r34": 31.4, "rtdetr_r50": 42.9, "rtdetr_r101": 76.7}
MILLIONS |= {"dfine_n": 3.8, "dfine_s": 10.3, "dfine_m": 19.6, "dfine_l": 31.3, "dfine_x": 62.7}


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", DETECTORS)
def test_presets_build_without_memory(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    assert all(each.is_meta for each in model.parameters())
    if name in MILLIONS:
        assert round(sum(each.numel() for each in model.parameters()) / 1e6, 1) == MILLIONS[name]


# Compilers and exporters


@pytest.mark.all
@pytest.mark.parametrize("trunk", [TRUNKS[0], "timm:resnet18d"], ids=named)
@pytest.mark.parametrize("size", [(64, 96), (70, 50)])
def test_it_compiles_as_one_graph(trunk, size):
    torch._dynamo.reset()
    model, images, given = build(trunk), torch.randn(2, 3, *size), noise()
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
        assert all(apart(got, wanted) < 1e-4 for got, wanted in zip(rows(found), rows(model(images)), strict=True))
    plain, images = model.double().train(), images.double()
    compiled = copy.deepcopy(plain)
    predict = torch.compile(compiled.predict, backend="aot_eager", fullgraph=True)
    one, other = total(plain.predict(images, noised=given)), total(predict(images, noised=given))
    assert relative(other, one) < 1e-12
    one.backward()
    other.backward()
    largest = max(each.grad.abs().max() for each in plain.parameters() if each.grad is not None)
    for wanted, got in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert wanted.grad is not None and got.grad is not None
        assert (got.grad - wanted.grad).abs().max() < 1e-10 * largest


FREE = {
    "images": {
        0: torch.export.Dim("batch", max=64),
        2: torch.export.Dim("height", min=33),
        3: torch.export.Dim("width", min=33),
    }
}


@pytest.mark.all
@pytest.mark.parametrize(
    ("trunk", "choice"),
    [
        *((trunk, {}) for trunk in (*TRUNKS[:3], "timm:resnet18d", "timm:hgnetv2_b0")),
        (TRUNKS[0], {"mixer": "area(areas=2)"}),
        (TRUNKS[0], {"strides": (16, 32)}),
    ],
    ids=named,
)
@torch.no_grad()
def test_a_program_takes_any_batch_and_size(trunk, choice):
    model = build(trunk, **choice)
    program = torch.export.export(model, (torch.randn(2, 3, 70, 100),), dynamic_shapes=FREE, strict=False).module()
    for shape in ((2, 3, 70, 100), (1, 3, 64, 64), (3, 3, 130, 90)):
        images = torch.randn(shape)
        for got, wanted in zip(rows(program(images)), rows(model(images)), strict=True):
            assert apart(got, wanted) < 1e-4


@pytest.mark.all
@pytest.mark.parametrize(("trunk", "mixer"), [(TRUNKS[0], "area(areas=2)"), ("timm:resnet18d", "softmax")], ids=named)
@torch.no_grad()
def test_onnxruntime_gives_the_same(trunk, mixer):
    model = build(trunk, mixer=mixer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            model, (torch.randn(2, 3, 70, 100),), dynamo=True, dynamic_shapes=FREE, verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((2, 3, 70, 100), (1, 3, 64, 96), (3, 3, 130, 90)):
        images = torch.randn(shape)
        logits, boxes = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        found = rows({"logits": torch.from_numpy(logits), "boxes": torch.from_numpy(boxes)})
        for got, wanted in zip(found, rows(model(images)), strict=True):
            assert apart(got, wanted) < 1e-3


def test_configs_of_a_preset_can_be_changed():
    config = PRESETS["rtdetr_micro"]
    assert isinstance(config, RTDETRConfig) and replace(config, classes=3).labelled == 3


# Non-maximum suppression of proposals


def naively_chosen(model: Any, image: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[list[int], int]:
    """The tokens of one image that become queries, and how many of them overlap no better one of their level."""
    memory, anchors = model.encode(image[None], mask)
    scores, starts = model.rank(memory, anchors)
    boxes = model.boxed(starts, anchors)[0].double()
    corners = torchvision.ops.box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1)
    overlaps = torchvision.ops.box_iou(corners, corners)
    levels = [level for level, (rows, columns) in enumerate(memory.grids) for _ in range(rows * columns)]
    order = [
        token
        for token in scores[0].amax(-1).argsort(descending=True, stable=True).tolist()
        if memory.mask is None or memory.mask[0, token]
    ]
    kept: list[int] = []
    for token in order:
        if all(
            levels[token] != levels[other] or not overlaps[token, other] > model.config.proposal_nms for other in kept
        ):
            kept.append(token)
    return (kept + [token for token in order if token not in kept])[: model.config.queries], len(kept)


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (33, 47)])
@torch.no_grad()
def test_proposals_of_a_level_that_overlap_better_ones_become_queries_last(size):
    """More queries than tokens that are left, and than tokens."""
    model = build(queries=50, proposal_nms=0.3).double()
    for layer in model.box.layers:
        layer.weight.mul_(3.0)
    image = torch.randn(3, *size, dtype=torch.float64)
    wanted, kept = naively_chosen(model, image)
    memory, anchors = model.encode(image[None])
    scores, starts = model.rank(memory, anchors)
    index, real = model.best(scores, memory.mask, model.boxed(starts, anchors), memory.grids)
    number = 50 if real is None else int(real.sum())
    assert index[0, :number].tolist() == wanted and kept < number
    plain, _ = model.best(scores, memory.mask)
    assert size == (33, 47) or set(plain[0].tolist()) != set(wanted)


@torch.no_grad()
def test_padding_and_batch_mates_do_not_change_which_proposals_are_suppressed():
    model = build(queries=50, proposal_nms=0.3).double()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    found = model.predict(*together(images, (161, 640)), tokens=True)
    assert found.tokens is not None and found.tokens.real is not None
    logits, boxes = (each[-1] for each in found.layers)
    for number, image in enumerate(images):
        alone = model.predict(image[None], tokens=True)
        wanted = rows({"logits": alone.layers.logits[-1], "boxes": alone.layers.boxes[-1]})[0]
        assert apart(torch.cat([logits[number], boxes[number]], -1), wanted) < 1e-5
        assert alone.tokens is not None
        real = slice(None) if alone.tokens.real is None else alone.tokens.real[0]
        mine = found.tokens.real[number]
        for one, other in zip(found.tokens.predicted, alone.tokens.predicted, strict=True):
            assert relative(one[number, mine], other[0, real]) < 1e-5
        assert relative(found.tokens.anchors[number, mine], alone.tokens.anchors[0, real]) < 1e-6


@torch.no_grad()
def test_anchors_are_boxes_around_tokens():
    """Those near an edge have no size: none starts there. All tokens include those that queries start from."""
    model = build().train()
    found = model.predict(torch.randn(2, 3, 640, 64), tokens=True)
    assert found.tokens is not None and found.tokens.real is None and found.proposals is not None
    anchors, number = found.tokens.anchors[0], 80 * 8
    assert torch.equal(found.tokens.anchors[1], anchors) and not anchors[:8].any()
    torch.testing.assert_close(anchors[8], torch.tensor([4 / 64, 12 / 640, 0.05, 0.05]))
    torch.testing.assert_close(anchors[number], torch.tensor([8 / 64, 8 / 640, 0.1, 0.1]))
    between = found.proposals.boxes[:, :, None] - found.tokens.predicted.boxes[:, None]
    assert between.abs().amax(-1).amin(-1).max() < 1e-6 and model.predict(torch.randn(1, 3, 64, 64)).tokens is None


def test_all_tokens_train_every_parameter():
    model = build(proposal_nms=0.5).train()
    found = model.predict(torch.randn(2, 3, 70, 50), noised=noise(), tokens=True)
    assert found.tokens is not None
    total(found._replace(proposals=found.tokens.predicted)).backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None]


@pytest.mark.all
@torch.no_grad()
def test_a_model_with_suppression_compiles_as_one_graph():
    torch._dynamo.reset()
    model, images = build(proposal_nms=0.3), torch.randn(2, 3, 70, 50)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert all(apart(got, wanted) < 1e-4 for got, wanted in zip(rows(found), rows(model(images)), strict=True))


@pytest.mark.parametrize("field", ["proposal_nms", "detection_nms"])
@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
def test_an_overlap_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be > 0 and <= 1, got {value}$"):
        build(**{field: value})
