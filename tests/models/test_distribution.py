"""D-FINE: boxes refined by distributions, its neck and its gated decoder, equal to transformers' on any image, whatever
shares the batch, folded, exported, saved."""

import copy
import math
import re
import warnings
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config, RTDetrResNetConfig
from transformers.models.d_fine import modeling_d_fine as theirs_of

import zoo
from helpers import prepared, random_truth, randomise, rectangle, relative
from models.test_rtdetr import TINY, TRUNKS, Theirs, apart, noise, rows, together, trained_alike
from models.test_rtdetr_forms import FREE
from zoo.convert.detection import DFINE_NAMES, hgnet_name, names_of
from zoo.layer import Context
from zoo.mixers.deformable import DCNv4
from zoo.models.detection import Trained
from zoo.models.distribution import Boxes, Distribution, offsets_of
from zoo.models.neck import ELAN, Neck
from zoo.models.rtdetr import RTDETR, RTDETRConfig
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import detection_loss
from zoo.tensors import to_map, to_tokens

FINE = {"box": "distribution", "neck": "elan", "cross": "deformable(points=(3, 6, 3), project=False, gated=True)"}


def build(trunk: str = TRUNKS[0], **choices: Any) -> RTDETR:
    """A tiny D-FINE, all that starts constant moved off its start."""
    model: Any = randomise(RTDETRConfig(trunk=trunk, **TINY | FINE | choices).build())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DCNv4):
                module.sample.weight *= 0.1
    return model.eval()


# Parity

THEIRS = {
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 12,
    "decoder_ffn_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "depth_mult": 0.67,
    "num_denoising": 20,
    "num_labels": 5,
    "tie_word_embeddings": False,
}


def pair(inside: int, scale: float, points: tuple[int, ...], ratio: float) -> tuple[Any, RTDETR]:
    """transformers' model with random weights, and ours with the same, both in fp64; of as many levels as points."""
    levels, widths = len(points), [8, 16, 24, 32]
    sizes = {"embedding_size": 8, "hidden_sizes": widths, "depths": [1] * 4, "layer_type": "basic"}
    backbone = RTDetrResNetConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"][-levels:])
    strides = (4, 8, 16, 32)[-levels:]
    rest = {"encoder_hidden_dim": inside, "decoder_in_channels": [inside] * levels, "reg_scale": scale}
    rest |= {"encoder_in_channels": widths[-levels:], "feat_strides": strides, "num_feature_levels": levels}
    rest |= {"encode_proj_layers": [levels - 1], "decoder_n_points": [*points], "hidden_expansion": ratio}
    config: Any = DFineConfig(**THEIRS | rest, backbone_config=backbone, attn_implementation="eager")
    theirs = published(config)
    given = {"ffn": f"mlp(ratio={64 / inside})", "decoder_ffn": "mlp(ratio=2.0, activation='relu')", "neck_depth": 2}
    given |= {"cross": f"deformable(points={points}, project=False, gated=True)", "strides": strides}
    ours = build(**given, depth=3, encoder_dim=inside, neck_ratio=ratio, box=f"distribution(scale={scale})")
    ours.trunk = Theirs(theirs.model.backbone.model)  # pyright: ignore[reportAttributeAccessIssue]
    ours.inputs = nn.ModuleList(
        type(each)(width, inside, "batchnorm") for each, width in zip(ours.inputs, widths[-levels:], strict=True)
    )
    left = copy_weights(theirs, ours, ["trunk"])
    assert all(name.startswith("model.backbone.") for name in left)
    return theirs, ours.double().eval()


def published(config: Any) -> Any:
    """transformers' model in fp64 with random weights that make all of it count."""
    theirs: Any = DFineForObjectDetection(config)
    theirs.model.decoder.class_embed, theirs.model.decoder.bbox_embed = theirs.class_embed, theirs.bbox_embed
    kept = [theirs.model.decoder.reg_scale.clone(), theirs.model.decoder.up.clone()]
    for parameter in theirs.parameters():
        if parameter.ndim == 4:
            parameter.data *= 1.5 * parameter[0].numel() ** -0.5 / parameter.std()
    theirs = prepared(randomise(theirs))
    theirs.model.decoder.query_pos_head.layers[-1].bias.data *= 30  # beyond what they clamp it to
    theirs.model.decoder.reg_scale.data, theirs.model.decoder.up.data = (each.double() for each in kept)
    for module in theirs.modules():
        if hasattr(module, "num_points_scale"):
            module.num_points_scale = module.num_points_scale.reciprocal().round().reciprocal()  # theirs are of fp32
    return theirs


def copy_weights(theirs: Any, ours: RTDETR, without: list[str]) -> set[str]:
    """Puts their weights into ours, but those whose names begin so; the names of theirs that are left."""
    weights = {
        re.sub(r"(coder\..*layers\.\d+\.mlp)\.layers\.([01])", lambda m: f"{m[1]}.fc{int(m[2]) + 1}", name): each
        for name, each in theirs.state_dict().items()
    }
    weights["model.denoising_class_embed.weight"] = weights["model.denoising_class_embed.weight"][:-1]
    used = {"model.decoder.reg_scale", "model.decoder.up"}
    for name, slot in [*ours.named_parameters(), *ours.named_buffers()]:
        if not name.startswith((*without, "position.anchor")) and not name.endswith("num_batches_tracked"):
            names = names_of(name, DFINE_NAMES, hgnet_name)
            used |= {*names}
            value = torch.cat([weights[each] for each in names])
            assert [each for each in value.shape if each > 1] == [each for each in slot.shape if each > 1]
            slot.data = value.clone().reshape(slot.shape)
    again = ("model.decoder.class_embed", "model.decoder.bbox_embed")
    left = {name for name in set(weights) - used if not name.startswith(again)}
    return {name for name in left if not name.endswith(("num_batches_tracked", "num_points_scale"))}


MODELS = [(32, 4.0, (3, 6, 3), 0.5), (48, 8.0, (3, 6, 3), 0.5), (32, 4.0, (6, 6), 0.37)]
MODELS += [pytest.param((32, 4.0, (2, 3, 6, 3), 0.5), marks=pytest.mark.all)]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def models(request) -> tuple[Any, RTDETR]:
    torch.manual_seed(0)
    return pair(*request.param)


@pytest.mark.parametrize("size", [(96, 96), (64, 160)])
@torch.no_grad()
def test_an_image_gives_what_it_gives_in_transformers(models, size):
    theirs, ours = models
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = theirs.model(images)
    memory, anchors = ours.encode(images)
    scores, _ = ours.rank(memory, anchors)
    assert (scores - wanted.enc_outputs_class).abs().max() < 1e-5
    index, _ = ours.best(scores, None)
    assert torch.equal(index, wanted.enc_outputs_class.amax(-1).topk(12).indices)
    found, wanted = ours(images), theirs(images)
    assert (found["logits"] - wanted.logits).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


SMALL = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
    "hidden_sizes": [64, 256, 512, 1024],
    "out_indices": [2, 3, 4],
}


@torch.no_grad()
def test_the_whole_of_dfine_s_gives_what_it_gives_in_transformers():
    """As it is published, on an image of any shape."""
    torch.manual_seed(0)
    rest = {"encoder_in_channels": [256, 512, 1024], "decoder_layers": 3, "decoder_n_points": [3, 6, 3]}
    rest |= {"depth_mult": 0.34, "hidden_expansion": 0.5, "num_labels": 80, "tie_word_embeddings": False}
    given: Any = {"freeze_backbone_batch_norms": False, "attn_implementation": "eager"}
    theirs = published(DFineConfig(**rest, **given, backbone_config=HGNetV2Config(**SMALL)))
    ours: Any = zoo.create_model("dfine_s").double().eval()
    assert not copy_weights(theirs, ours, [])
    images = torch.randn(1, 3, 192, 128, dtype=torch.float64)
    memory, anchors = ours.encode(images)
    index, _ = ours.best(ours.rank(memory, anchors)[0], None)
    wanted = theirs.model(images)
    places = wanted.enc_outputs_class.amax(-1).topk(300).indices
    assert torch.equal(index, places)
    found, wanted = ours(images), theirs(images)
    assert wanted.pred_boxes[..., :2].std() > 0.1 and wanted.logits.std(1).mean() > 0.1
    assert (found["logits"] - wanted.logits).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


def test_training_gives_what_it_gives_in_transformers(models, monkeypatch):
    wanted, found = trained_alike(models, theirs_of, monkeypatch)
    assert len(found.layers.logits) == 4  # three layers, and the start
    assert found.refined is not None and found.refined_noised is not None
    bins = torch.cat([found.refined_noised.bins, found.refined.bins], 2).transpose(0, 1).flatten(3)
    assert (bins - wanted.intermediate_predicted_corners).abs().max() < 1e-5
    first = torch.cat([found.refined_noised.first, found.refined.first], 1)
    assert (first[:, None] - wanted.initial_reference_points).abs().max() < 1e-5


@pytest.mark.parametrize(("bins", "scale"), [(32, 4.0), (32, 8.0), (8, 1.0), (4, 2.0)])
def test_offsets_are_those_of_d_fine(bins, scale):
    theirs = theirs_of.weighting_function(bins, torch.tensor([0.5]).double(), torch.tensor([scale]).double())
    ours = offsets_of(bins, scale, torch.float64, torch.device("cpu"))
    assert len(ours) == bins + 1 and (ours.diff() > 0).all() and (ours - theirs).abs().max() < 1e-12


def test_sides_move_by_the_mean_of_their_offsets():
    """By hand: the left side by 4 quarters of the width, the others by none."""
    layer = Distribution(8, 1)
    bins = torch.full((1, 1, 4, 33), -math.inf)
    bins[..., 1:, 16], bins[..., 0, 32] = 0.0, 0.0
    moved = layer.moved(torch.tensor([[[0.5, 0.4, 0.2, 0.1]]]), bins)
    assert moved.flatten().tolist() == pytest.approx([0.4, 0.4, 0.4, 0.1])


def test_it_starts_as_the_boxes_that_it_is_given():
    layer, boxes = Distribution(8, 2), 0.2 + 0.5 * torch.rand(2, 5, 4)
    found = Boxes(boxes)
    for number in (0, 1):
        found = layer(number, torch.randn(2, 5, 8), found)
        assert relative(found.boxes, boxes) < 1e-5
        assert torch.equal(layer.scored(number, boxes, found), boxes)


# Padding and training


@pytest.mark.parametrize(("kind", "most"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("trunk", [TRUNKS[0], "timm:resnet18d"])
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(trunk, kind, most):
    """More queries than the first image has tokens."""
    model = build(trunk, queries=30).to(kind)
    images = [torch.randn(3, *size, dtype=kind) for size in [(33, 47), (64, 160), (100, 70)]]
    found = rows(model(*together(images, (128, 192))))
    for number, image in enumerate(images):
        assert apart(found[number], rows(model(image[None]))[0]) < most


@torch.no_grad()
def test_queries_that_fill_up_change_nothing():
    model, images, given = build(queries=100).train(), torch.randn(2, 3, 64, 64), noise()
    wanted = model.predict(images, noised=given)
    labels, boxes = (each.clone() for each in given[:2])
    labels[~given.valid], boxes[~given.valid] = 0, torch.nan
    found = model.predict(images, noised=given._replace(labels=labels, boxes=boxes))
    for one, other in zip(parts(found), parts(wanted), strict=True):
        assert torch.equal(one, other)
    assert found.refined is not None and found.refined.real is not None and found.refined_noised is not None
    assert torch.equal(found.refined_noised.real, given.valid) and found.refined.real.sum(1).tolist() == [84, 84]


def parts(found: Trained) -> list[Tensor]:
    """All that is predicted for queries of an image."""
    assert found.noised is not None and found.proposals is not None
    refined = []
    for each in (found.refined, found.refined_noised):
        assert each is not None and each.real is not None
        refined += [each.bins * each.real[..., None, None], each.first * each.real[..., None]]
    return [*found.layers, *found.proposals, *found.noised, *refined]


def total(found: Trained) -> Tensor:
    weights = torch.Generator().manual_seed(5)
    given = [*found.layers, *found.proposals, *found.noised]  # pyright: ignore[reportGeneralTypeIssues]
    return sum((each * torch.randn(each.shape[-1], generator=weights)).square().mean() for each in given)  # pyright: ignore


def test_every_parameter_gets_a_gradient_with_checkpointing_too():
    plain = build().train()
    careful = copy.deepcopy(plain)
    careful.checkpointing = True
    images, given = torch.randn(2, 3, 70, 50), noise()
    for model in (plain, careful):
        total(model.predict(images, noised=given)).backward()
    largest = max(each.grad.abs().max() for each in plain.parameters() if each.grad is not None)
    for (name, one), other in zip(plain.named_parameters(), careful.parameters(), strict=True):
        assert one.grad is not None and one.grad.isfinite().all(), name
        assert one.grad.any() or name.endswith("bias"), name
        assert other.grad is not None and (other.grad - one.grad).abs().max() <= 1e-5 * largest, name


def test_boxes_are_exact_under_autocast():
    model: Any = build().train()
    images = torch.randn(2, 3, 64, 96)
    truth = random_truth([3, 1], 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(images)
        loss = detection_loss(found, None, truth)["total"]
    assert found.refined is not None and found.refined.bins.dtype == found.layers.boxes.dtype == torch.float32
    assert loss.dtype == torch.float32 and loss.isfinite()
    steps = zip(found.layers.boxes[1:], found.refined.bins, strict=True)
    assert all(torch.equal(boxes, model.boxes.moved(found.refined.first, bins)) for boxes, bins in steps)


@pytest.mark.parametrize("counts", [[3, 1], [0, 0]])
def test_the_loss_reaches_every_parameter_with_and_without_objects(counts):
    model, truth = build().train(), random_truth(counts, 5)
    noised = denoising_queries(truth, 5, number=12)
    detection_loss(model.predict(torch.randn(2, 3, 64, 96), noised=noised), noised, truth)["total"].backward()
    for name, each in model.named_parameters():
        assert each.grad is not None and each.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"box": "distributoin"}, "^box: unknown name 'distributoin'; did you mean distribution"),
        ({"box": "delta(bins=8)"}, "^box: unknown option of delta 'bins'"),
        ({"box": "distribution(bins=7)"}, "^box 'distribution.*': bins must be even, from 4 to 1024, got 7"),
        ({"box": "distribution(bins=2)"}, "^box 'distribution.*': bins must be even"),
        ({"box": "distribution(scale=0)"}, "^box 'distribution.*': scale must be > 0"),
        ({"neck": "elam"}, "^neck: unknown name 'elam'; did you mean elan"),
        (
            {"cross": "deformable(points=(3, 6))"},
            "^cross 'deformable.*': points must be one number, or one for each of 3",
        ),
        ({"cross": "deformable(points=(3, 6, 3))", "strides": (16, 32)}, "or one for each of 2 levels"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_refused_in_one_line(choice, message):
    with pytest.raises(ValueError, match=message) as error:
        RTDETRConfig(trunk=TRUNKS[0], **TINY | choice).build()
    assert "\n" not in str(error.value)


# Folding, checkpoints, compilers and exporters


@pytest.mark.parametrize("choice", [{}, {"neck_channel": "eca", "neck_norm": "prepbn", "encoder_dim": 48}], ids=str)
@torch.no_grad()
def test_a_fused_model_gives_the_same(choice):
    model: Any = prepared(build(**choice))
    fused = zoo.fuse(model)
    assert fused.fusion is not None
    done = {fold.layer for fold in fused.fusion if fold.into}
    for part in ("points.0.norm", "reductions.1.after", "down.0.convs.1.norm", "up.1.parts.1.blocks.0.narrow"):
        assert f"neck.{part}" in done
    assert not [name for name in fused.state_dict() if "running" in name and name.startswith("neck")]
    images, mask = together([torch.randn(3, 70, 50).double(), torch.randn(3, 64, 96).double()], (80, 96))
    for given in ((images, mask), (images[:, :, :64], None)):
        one, other = (each.encode(*given)[0] for each in (model, fused))
        real = 1.0 if one.mask is None else one.mask[..., None]
        assert relative(other.tokens * real, one.tokens * real) < 1e-12
        assert apart(rows(fused(*given))[0], rows(model(*given))[0]) < 1e-9


@torch.no_grad()
def test_a_checkpoint_round_trips(tmp_path):
    model = build(cross="deformable(points=(1, 2, 3))", box="distribution(bins=16, scale=6)")
    zoo.save_model(model, tmp_path / "detector")
    loaded = zoo.load_checkpoint(tmp_path / "detector").model
    images = torch.randn(1, 3, 70, 50)
    assert torch.equal(rows(loaded(images)), rows(model.eval()(images)))


@pytest.mark.all
def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    model, images, given = build(), torch.randn(2, 3, 70, 50), noise()
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
        assert all(apart(got, wanted) < 1e-4 for got, wanted in zip(rows(found), rows(model(images)), strict=True))
    plain = model.train()
    compiled = copy.deepcopy(plain)
    predict = torch.compile(compiled.predict, backend="aot_eager", fullgraph=True)
    one, other = total(plain.predict(images, noised=given)), total(predict(images, noised=given))
    assert relative(other, one) < 1e-4
    one.backward()
    other.backward()
    largest = max(each.grad.abs().max() for each in plain.parameters() if each.grad is not None)
    for wanted, got in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert wanted.grad is not None and got.grad is not None
        assert (got.grad - wanted.grad).abs().max() < 1e-3 * largest


@pytest.mark.all
@pytest.mark.parametrize("trunk", [TRUNKS[0], "timm:hgnetv2_b0"])
@torch.no_grad()
def test_onnxruntime_gives_the_same(trunk):
    model = build(trunk)
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


# The neck


@torch.no_grad()
def test_the_neck_is_that_of_d_fine_alone():
    """With its own norms, on the tokens of a padded image: those outside change nothing."""
    place = Context(grid=(4, 6))
    layer: Any = prepared(ELAN(16, 8, 8, 1, "batchnorm", "silu", "none", zoo.layer.ANYWHERE))
    x, mask = torch.randn(2, 24, 16).double(), torch.stack([rectangle((4, 6), size) for size in ((4, 6), (3, 4))])
    got = to_map(layer(x, place._replace(mask=mask)), (4, 6))[1:, :, :3, :4]
    part = to_tokens(to_map(x, (4, 6))[1:, :, :3, :4])
    wanted = to_map(layer(part, Context(grid=(3, 4))), (3, 4))
    assert relative(got, wanted) < 1e-12 and isinstance(build().neck, Neck)
