"""RT-DETR: equal to transformers' on any image, whatever shares the batch, on any trunk; training and denoising."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2 as theirs_of

import zoo
from helpers import prepared, randomise, relative
from zoo.convert.detection import RTDETR_NAMES, names_of
from zoo.layer import Context, Groups
from zoo.mixers.deformable import DCNv4
from zoo.models.detection import Noised, Trained
from zoo.models.rtdetr import OUTSIDE, RTDETR, RTDETRConfig
from zoo.tensors import to_tokens

PYRAMID = "(dim=(8, 16, 16, 24), depth=(1, 1, 1, 1), heads=(2, 2, 2, 2), layer_scale=None)"
TRUNKS = [f"flash_internimage_t{PYRAMID}", "caformer_s18(dim=(8, 16, 16, 24), depth=(1, 1, 1, 1), heads=(1, 1, 1, 1))"]
TRUNKS += ["vit_tiny(dim=16, depth=3, heads=2)", "deit_tiny(dim=16, depth=3, heads=2, patch=8)"]
TIMM = ["timm:resnet18d", "timm:resnet18", "timm:convnext_atto", "timm:hgnetv2_b0"]
TINY = {"dim": 32, "depth": 2, "heads": 4, "image": 64, "classes": 5, "queries": 12, "neck_depth": 1, "neck_ratio": 0.5}
SIZES = [(33, 47), (64, 640), (100, 70), (160, 96)]


def build(trunk: str = TRUNKS[0], **choices: Any) -> RTDETR:
    """A tiny detector, all that starts constant moved off its start, samples of DCNv4 not too far apart."""
    model: Any = randomise(RTDETRConfig(trunk=trunk, **TINY | choices).build())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DCNv4):
                module.sample.weight *= 0.1
    return model.eval()


def named(value: object) -> str:
    return str(value).partition("(")[0].removeprefix("timm:")


# Parity

THEIRS = {
    "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 12,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "hidden_expansion": 0.5,
    "num_denoising": 20,
    "num_labels": 5,
}
OURS = {"neck_depth": 3, "decoder_ffn": "mlp(ratio=2.0, activation='relu')"}


class Theirs(nn.Module):
    """The maps of transformers' backbone as those of a trunk."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Context]]:
        maps = self.backbone(images).feature_maps
        return [(to_tokens(each), Context(grid=(each.shape[2], each.shape[3]))) for each in maps]


def pair(inside: int) -> tuple[Any, RTDETR]:
    """transformers' model with random weights, and ours with the same, both in fp64; their encoders have so many
    channels."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
    backbone = RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    sides = {"encoder_hidden_dim": inside, "decoder_in_channels": [inside] * 3, "backbone_config": backbone}
    theirs = prepared(RTDetrV2ForObjectDetection(RTDetrV2Config(**THEIRS | sides, attn_implementation="eager")))
    weights = theirs.state_dict()
    weights["model.denoising_class_embed.weight"] = weights["model.denoising_class_embed.weight"][:-1]
    ours = build(**OURS, encoder_dim=inside, ffn=f"mlp(ratio={64 / inside})")
    ours.trunk = Theirs(theirs.model.backbone.model)  # pyright: ignore[reportAttributeAccessIssue]
    ours.inputs = nn.ModuleList(
        type(each)(width, inside, "batchnorm") for each, width in zip(ours.inputs, (16, 24, 32), strict=True)
    )
    for name, slot in [*ours.named_parameters(), *ours.named_buffers()]:
        if not name.startswith("trunk") and name != "position.anchor":
            value = torch.cat([weights[each] for each in names_of(name, RTDETR_NAMES)])
            slot.data = value.clone().reshape(slot.shape)
    return theirs, ours.double().eval()


@pytest.fixture(scope="module", params=[32, 48])
def models(request) -> tuple[Any, RTDETR]:
    torch.manual_seed(0)
    return pair(request.param)


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
    chosen = wanted.enc_outputs_class.amax(-1).topk(12).indices
    assert torch.equal(index.sort().values, chosen.sort().values) and torch.equal(index, chosen)
    found, wanted = ours(images), theirs(images)
    assert (found["logits"] - wanted.logits).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


def trained_alike(models: tuple[Any, RTDETR], module: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Trained]:
    """What both predict in training, with the noise of transformers: its classes and boxes are kept on their way into
    the decoder. What the families share is compared."""
    theirs, ours = (copy.deepcopy(each).train() for each in models)
    boxes = torch.rand(2, 3, 4, dtype=torch.float64) * 0.3 + 0.2
    labels = [{"class_labels": torch.tensor([0, 2, 4]), "boxes": each} for each in boxes]
    kept = {}

    def keep(*args: Any, **rest: Any) -> Any:
        embed = rest.pop("class_embed")
        result = group(*args, **rest, class_embed=lambda labels: kept.setdefault("labels", labels) * 0.0)
        kept["boxes"] = result[1].sigmoid()
        return embed(kept["labels"]), *result[1:]

    group = module.get_contrastive_denoising_training_group
    monkeypatch.setattr(module, "get_contrastive_denoising_training_group", keep)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    wanted = theirs.model(images, labels=labels)
    number = kept["labels"].shape[1]
    given = Noised(kept["labels"].long(), kept["boxes"], torch.ones(2, number, dtype=torch.bool), number // 6)
    found = ours.predict(images, noised=given)
    assert number == 36 and found.noised is not None and found.proposals is not None
    both = [torch.cat([one, other], 2).transpose(0, 1) for one, other in zip(found.noised, found.layers, strict=True)]
    assert (both[0] - wanted.intermediate_logits).abs().max() < 1e-5
    assert (both[1] - wanted.intermediate_reference_points).abs().max() < 1e-5
    assert (found.proposals.logits - wanted.enc_topk_logits).abs().max() < 1e-5
    assert (found.proposals.boxes - wanted.enc_topk_bboxes).abs().max() < 1e-5
    return wanted, found


def test_training_gives_what_it_gives_in_transformers(models, monkeypatch):
    _, found = trained_alike(models, theirs_of, monkeypatch)
    assert len(found.layers.logits) == 2 and found.refined is None


# Padding


def together(images: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images in the corners of one batch of that size, noise beside them, and the mask of their pixels."""
    batch = 5 * torch.randn(len(images), 3, *size, dtype=images[0].dtype)
    mask = torch.zeros(len(images), *size, dtype=torch.bool)
    for image, row, real in zip(images, batch, mask, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
        real[: image.shape[1], : image.shape[2]] = True
    return batch, mask


def rows(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found["logits"], found["boxes"]], -1)


def apart(got: Tensor, wanted: Tensor) -> float:
    """How far the queries of two results [Q, D] are apart, whatever their order: near ties may change it."""
    between = (got[:, None] - wanted[None]).abs().amax(-1)
    return max(between.amin(0).max().item(), between.amin(1).max().item())


@pytest.mark.daily(4)
@pytest.mark.parametrize(
    ("kind", "most"), [(torch.float64, 1e-5), pytest.param(torch.float32, 1e-4, marks=pytest.mark.all)]
)
@pytest.mark.parametrize("trunk", TRUNKS + TIMM, ids=named)
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(trunk, kind, most):
    """More queries than the first image has tokens; batches of 1, 2 and 4."""
    model: Any = build(trunk, queries=50).to(kind)
    images = [torch.randn(3, *size, dtype=kind) for size in SIZES]
    alone = [rows(model(image[None]))[0] for image in images]
    assert [(each[:, 0] == OUTSIDE).sum() for each in alone] == [50 - 43, 0, 0, 0]
    assert not alone[0][alone[0][:, 0] == OUTSIDE, 5:].any()
    for part, size in ((images[:1], (64, 96)), (images[2:], (160, 96)), (images, (161, 640))):
        found = rows(model(*together(part, size)))
        for image, got in zip(part, found, strict=True):
            wanted = next(each for each, other in zip(alone, images, strict=True) if other is image)
            assert apart(got, wanted) < most


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask():
    model = build("timm:resnet18d").double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert relative(rows(model(images, torch.ones(2, 64, 96, dtype=torch.bool))), rows(model(images))) < 1e-12


LEAKS = ["mobilenetv3_small_050", "convnextv2_atto", "poolformer_s12", "ecaresnet26t", "resnetblur50", "levit_128"]
LEAKS += ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", LEAKS)
def test_a_trunk_that_padding_gets_into_is_refused(name):
    with pytest.raises(ValueError, match=f"^trunk 'timm:{name}' does not keep padding away from the image") as error:
        RTDETRConfig(trunk=f"timm:{name}").build()
    assert "\n" not in str(error.value)


def test_a_pool_that_reads_beyond_the_edge_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="does not keep padding away from the image"):
        RTDETRConfig(trunk="timm:vovnet39a").build()


WRONG = {
    "vit_tin": "^trunk: unknown image model 'vit_tin'; did you mean vit_tiny",
    "vit_tiny(mixr='sla')": "^trunk: unknown field of vit_tiny 'mixr'; did you mean mixer",
    "vit_tiny(mixer='slaa')": "^trunk: mixer: ",
    "vit_tiny(patch=12)": "^a trunk of patch 12 does not fit the strides",
    "conformer_ctc_s": "^trunk: unknown image model 'conformer_ctc_s'; .*",
    "resnet50": "^trunk: unknown image model 'resnet50'; choose from: vit_micro, .*, timm:NAME$",
    "poolformer_s12(dim=(8, 16), depth=(1, 1), heads=(1, 1))": r"has the strides \[4, 8\], but .* needs stride 16$",
    "timm:resnet": "^timm has no model 'resnet'",
    "timm:hf-hub:someone/model": "^timm has no model 'hf-hub:someone/model'",
    "vit_tiny(": "not",
}


@pytest.mark.parametrize(
    ("trunk", "strides", "message"),
    [
        (TRUNKS[0], (8, 16), r"^strides must end with 32, the last of trunk '.*', got \(8, 16\)$"),
        ("timm:resnet18", (16, 32, 64), r"has the strides \[2, 4, 8, 16, 32\], but the detector needs stride 64$"),
        (TRUNKS[2], (6, 12), r"^a trunk of patch 16 does not fit the strides \(6, 12\)"),
    ],
)
def test_strides_that_a_trunk_lacks_are_refused_in_one_line(trunk, strides, message):
    with pytest.raises(ValueError, match=message) as error:
        RTDETRConfig(trunk=trunk, **TINY, strides=strides).build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trunk", WRONG)
def test_a_wrong_trunk_is_refused_in_one_line(trunk):
    with pytest.raises(ValueError, match=WRONG[trunk]) as error:
        RTDETRConfig(trunk=trunk).build()
    assert "\n" not in str(error.value)


# Denoising


def noise(groups: int = 3, most: int = 4, least: int = 2, kind: torch.dtype = torch.float32) -> Noised:
    """Denoising queries of two images; the second has fewer objects."""
    labels = torch.randint(5, (2, groups * 2 * most))
    boxes = 0.2 + 0.4 * torch.rand(2, groups * 2 * most, 4, dtype=kind)
    valid = torch.ones(2, groups, 2, most, dtype=torch.bool)
    valid[1, :, :, least:] = False
    return Noised(labels, boxes, valid.flatten(1), groups)


@pytest.mark.parametrize("size", [(64, 64), (70, 50)])
@torch.no_grad()
def test_groups_do_not_see_each_other(size):
    model, images, given = build().train(), torch.randn(2, 3, *size), noise()
    first = model.predict(images, noised=given)
    labels, boxes = given.labels.clone(), given.boxes.clone()
    labels[:, 8:16], boxes[:, 8:16] = (labels[:, 8:16] + 1) % 5, boxes[:, 8:16] * 0.5
    second = model.predict(images, noised=given._replace(labels=labels, boxes=boxes))
    own = given.valid.clone()
    own[:, :8], own[:, 16:] = False, False
    assert first.noised is not None and second.noised is not None
    for one, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first.noised, second.noised, strict=True):
        assert torch.equal(one[:, ~own], other[:, ~own])
        assert (one[:, own] != other[:, own]).any(-1).all()


@torch.no_grad()
def test_queries_that_fill_up_change_nothing():
    model, images, given = build().train(), torch.randn(2, 3, 64, 64), noise()
    wanted = model.predict(images, noised=given)
    labels, boxes = (each.clone() for each in given[:2])
    labels[~given.valid], boxes[~given.valid] = 0, torch.nan
    found = model.predict(images, noised=given._replace(labels=labels, boxes=boxes))
    assert found.noised is not None and wanted.noised is not None
    for one, other in zip((*found.layers, *found.noised), (*wanted.layers, *wanted.noised), strict=True):
        assert torch.equal(one, other)
    assert (found.noised.logits[:, ~given.valid] == OUTSIDE).all() and not found.noised.boxes[:, ~given.valid].any()


@torch.no_grad()
def test_proposals_that_an_image_has_no_token_for_are_absent_in_training():
    """They are neither negatives of the class loss nor found by an object."""
    model = build(queries=100).train()
    proposals = model.predict(torch.randn(1, 3, 64, 64)).proposals
    assert proposals is not None
    absent = (proposals.logits == OUTSIDE).all(-1)
    assert absent.sum() == 100 - (64 + 16 + 4) and torch.equal(absent, (proposals.boxes == 0).all(-1))


@torch.no_grad()
def test_matching_queries_do_not_see_denoising_queries():
    model, images = build().train(), torch.randn(2, 3, 64, 64)
    with_noise, without = model.predict(images, noised=noise()), model.predict(images)
    assert without.noised is None
    for one, other in zip(with_noise.layers, without.layers, strict=True):
        assert relative(one, other) < 1e-5


def test_groups_allow_what_they_say():
    groups, total = Groups(3, 4), 20
    places = torch.arange(total)
    wanted = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            same = query < 12 and key < 12 and query // 4 == key // 4
            wanted[query, key] = same or key >= 12
    assert torch.equal(groups.allow(places, places), wanted)
    assert torch.equal(groups.allow(places[5:7], places[10:]), wanted[5:7, 10:])


# Training


def total(found: Any) -> Tensor:
    parts = [*found.layers, *found.proposals, *found.noised]
    weights = torch.Generator().manual_seed(5)
    return sum((each * torch.randn(each.shape[-1], generator=weights)).square().mean() for each in parts)  # pyright: ignore


@pytest.mark.parametrize("trunk", TRUNKS + TIMM, ids=named)
def test_every_parameter_gets_a_gradient_with_checkpointing_too(trunk):
    plain = build(trunk).train()
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
    for one, other in zip(plain.buffers(), careful.buffers(), strict=True):
        assert torch.equal(one, other)


TURNED = [
    {"mixer": "sla"},
    {"mixer": "area(areas=2)"},
    {"channel": "eca"},
    {"norm": "prepbn"},
    {"cross": "deformable(weights='raw')"},
]
TURNED += [{"neck_channel": "eca"}, {"neck_norm": "prepbn"}, {"cross": "softmax"}, {"position": "none"}]
TURNED += [{"cross": "additive"}]
TURNED += [{"cross": "deformable(points=(3, 6, 3), project=False, gated=True)"}]
TURNED += [{"encoder_dim": 48}]
TURNED += [{"encoder_depth": 2, "mixer": ("sla", "softmax")}]
TURNED += [{"strides": (16, 32)}, {"strides": (4, 8, 16, 32), "cross": "deformable(points=(2, 3, 6, 3))"}]
TURNED += [{"strides": (16, 32), "trunk": TRUNKS[2]}, {"strides": (16, 32), "trunk": "timm:hgnetv2_b0"}]
TURNED += [{"encoder_depth": 0}, {"neck_depth": 0}, {"denoising": False}, {"position": "sine"}]


@pytest.mark.parametrize("choice", TURNED, ids=str)
def test_choices_train_and_padding_changes_nothing(choice):
    model = build(**choice).train()
    zoo.advance(model, 0.5)
    given = noise() if model.config.denoising else None
    found = model.predict(torch.randn(2, 3, 70, 50), noised=given)
    total(found if given else found._replace(noised=())).backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None]
    zoo.advance(model, 1.0)
    model.double().eval()
    image = torch.randn(3, 40, 70, dtype=torch.float64)
    with torch.no_grad():
        found = rows(model(*together([image, torch.randn(3, 96, 90).double()], (100, 90))))
        assert apart(found[0], rows(model(image[None]))[0]) < 1e-5


WRONG_STRIDES = [(), (32,), (8, 32), (32, 16), (0, 0), (-8, -16)]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"decoder_norm": "prepbn"}, "^decoder_norm 'prepbn' takes statistics over denoising queries"),
        ({"decoder_norm": "layernrm"}, "^decoder_norm: "),
        ({"neck_norm": "layernrm"}, "^neck_norm: "),
        ({"neck_channel": "ecaa"}, "^neck_channel: "),
        ({"decoder_ffn": "mpl"}, "^decoder: ffn: unknown name 'mpl'"),
        ({"decoder_mixer": "sla"}, "^decoder: mixer 'sla' does not read "),
        ({"cross": ("deformable", "softmax")}, "^cross must be a name, got "),
        ({"cross": "deformable(levels=3)"}, "^cross: unknown option of deformable 'levels'"),
        ({"mixer": "slaa"}, "^mixer: "),
        ({"classes": 0}, "^classes must be >= 1"),
        ({"neck_ratio": 0.0}, "^neck_ratio must be > 0"),
        ({"encoder_depth": -1}, "^encoder_depth must be >= 0, got -1"),
        ({"encoder_dim": -1}, "^encoder_dim must be >= 0, got -1"),
        *(
            ({"strides": each}, "^strides must be two or more, each twice the one before, got ")
            for each in WRONG_STRIDES
        ),
        ({"strides": 8}, "^strides must be "),
        ({"strides": (8.0, 16.0)}, "^strides must be "),
        ({"encoder_dim": 30}, "heads must divide dim 30"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_refused_in_one_line(choice, message):
    with pytest.raises(ValueError, match=message) as error:
        RTDETRConfig(trunk=TRUNKS[0], **TINY | choice)
    assert "\n" not in str(error.value)
