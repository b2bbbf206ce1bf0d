"""DETR: the same whatever shares the batch, on any trunk, learns, exported, saved. Parity is in test_detectors.py."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection

import zoo
from detecting import command
from helpers import randomise
from zoo.layer import copied
from zoo.models import PRESETS, convolutional
from zoo.models.convolutional import MaskedBatchNorm
from zoo.models.detr import DETR, DETRConfig
from zoo.tasks.detect.train import Detect
from zoo.tensors import to_tokens

PYRAMID = "flash_internimage_t(dim=(8, 16, 16, 24), depth=(1, 1, 1, 1), heads=(2, 2, 2, 2), layer_scale=None)"
TRUNKS = [PYRAMID, "vit_tiny(dim=16, depth=2, heads=2)", "timm:resnet18", "timm:resnet50(output_stride=16)"]
TINY: dict[str, Any] = {"dim": 32, "depth": 2, "encoder_depth": 1, "heads": 4, "image": 64, "classes": 5, "queries": 12}
SIZES = [(33, 47), (64, 640), (100, 70), (160, 96)]


def build(trunk: str = "timm:resnet18", **choices: Any) -> DETR:
    """A tiny detector, everything that starts constant moved off its start."""
    model: Any = randomise(DETRConfig(trunk=trunk, **TINY | choices).build())
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("sample.weight"):
                each *= 0.1
    return model.eval()


@pytest.mark.daily(2)
@pytest.mark.parametrize("trunk", TRUNKS, ids=lambda name: name.partition("(")[0])
@torch.no_grad()
def test_padded_equals_unpadded(trunk):
    model = build(trunk).double()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    alone = [model(image[None]) for image in images]
    canvas, mask = torch.randn(4, 3, 160, 640, dtype=torch.float64), torch.zeros(4, 160, 640, dtype=torch.bool)
    for row, image in enumerate(images):
        canvas[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = True
    found = model(canvas * mask[:, None], mask)
    for name in ("logits", "boxes"):
        for row, each in enumerate(alone):
            assert (found[name][row] - each[name][0]).abs().max() < 1e-5 * each[name].abs().max(), (name, row)


@torch.no_grad()
def test_published_padding_sees_the_zeros_around_an_image():
    model = build(padding="published").double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[:, :64, :64] = True
    canvas = torch.zeros(1, 3, 96, 96, dtype=torch.float64)
    canvas[:, :, :64, :64] = image
    alone, padded = model(image), model(canvas, mask)
    assert 1e-6 < (alone["logits"] - padded["logits"]).abs().max() < 1.0


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("resnet18", 20),
        ("regnetx_002", 44),
        ("efficientnet_lite0", 48),
        ("resnetv2_18", 16),
        ("mobilenetv4_conv_small", 45),
    ],
)
def test_batch_norms_of_a_timm_trunk_see_no_padding_in_training(name, number):
    """Statistics and outputs of a padded batch are those of the same images without padding, and the outputs without
    padding are those of timm's model, whose norms may have an activation of their own."""
    model = build(trunk=f"timm:{name}").double().train()
    norms = [each for each in model.trunk.modules() if isinstance(each, MaskedBatchNorm)]
    assert len(norms) == number
    net: Any = timm.create_model(name, features_only=True).double()
    net.load_state_dict(model.trunk.model.net.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask[:, :64, :96] = True
    canvas = torch.full((2, 3, 128, 128), 7.0, dtype=torch.float64)
    canvas[:, :, :64, :96] = images
    other = copy.deepcopy(model)
    (alone,), (padded,) = model.trunk(images, None), other.trunk(canvas * mask[:, None], mask)
    assert (to_tokens(net.train()(images)[-1]) - alone[0]).abs().max() < 1e-9
    inside = padded[1].mask
    assert inside is not None
    assert (padded[0][inside].view(alone[0].shape) - alone[0]).abs().max() < 1e-9
    for one, two in zip(model.trunk.buffers(), other.trunk.buffers(), strict=True):
        assert (one - two).abs().max() < 1e-9 * (1 + one.abs().max())


@torch.no_grad()
def test_a_norm_that_would_learn_from_padding_is_refused_in_training(monkeypatch):
    """Here those of SyncBatchNorm; without padding, frozen or in eval mode they do no harm."""
    made, convert = convolutional.convolutional, nn.SyncBatchNorm.convert_sync_batchnorm
    monkeypatch.setattr(convolutional, "convolutional", lambda *given: convert(made(*given)))
    images, mask = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :40] = True
    model = build(trunk="timm:resnet18").eval()
    model(images, mask)
    with pytest.raises(ValueError, match="^trunk 'timm:resnet18' cannot be trained on images with padding") as error:
        model.train()(images, mask)
    assert "'bn1'" in str(error.value) and "\n" not in str(error.value)
    build(trunk="timm:resnet18", trunk_norm="frozen").train()(images, mask)


@torch.no_grad()
def test_a_copy_hides_padding_too():
    model = build().double()
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[:, :40, :70] = True
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64) * mask[:, None]
    model.register_forward_hook(lambda *_: None)
    assert torch.equal(copied(model)(images, mask)["logits"], model(images, mask)["logits"])
    assert len(model._forward_hooks) == 1 and not copied(model)._forward_hooks


def test_a_frozen_trunk_keeps_its_norms():
    model: Any = DETRConfig(trunk="timm:resnet18", trunk_norm="frozen", **TINY).build().train()
    before = {name: each.clone() for name, each in model.trunk.state_dict().items()}
    out = model.predict(torch.randn(2, 3, 64, 64)).layers
    (out.logits.sum() + out.boxes.sum()).backward()
    after = model.trunk.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = {name for name, each in model.trunk.named_modules() if isinstance(each, nn.BatchNorm2d)}
    for name, each in model.trunk.named_parameters():
        assert (each.grad is None) == (name.rpartition(".")[0] in norms), name


@torch.no_grad()
def test_the_last_layer_of_training_is_that_of_inference():
    model = build(trunk_norm="frozen")
    images = torch.randn(1, 3, 64, 64)
    wanted = model(images)
    found = model.train().predict(images)
    assert found.proposals is None and found.noised is None and found.layers.logits.shape == (2, 1, 12, 6)
    found = found.layers
    assert (found.logits[-1] - wanted["logits"]).abs().max() < 1e-5
    assert (found.boxes[-1] - wanted["boxes"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["detr_r50", "detr_r50_dc5", "detr_r101"])
def test_presets_have_the_published_sizes(name):
    """Those of transformers, which has norms as buffers, with 91 ids of COCO as classes."""
    config = DetrConfig(
        num_labels=91, dilation="dc5" in name, backbone=f"resnet{name.split('_')[1][1:]}", use_pretrained_backbone=False
    )
    with torch.device("meta"):
        model: Any = replace(PRESETS[name], classes=91).build()  # pyright: ignore
        theirs = DetrForObjectDetection(config)
    norms = sum(len(each.weight) * 2 for each in model.trunk.modules() if isinstance(each, nn.BatchNorm2d))
    number = sum(each.numel() for each in model.parameters()) - norms
    assert number == sum(each.numel() for each in theirs.parameters()) and number > 41e6
    assert model.strides == [16 if "dc5" in name else 32]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = build(trunk="timm:resnet18(shortcut=True)")
    zoo.save_model(model, tmp_path / "detr", preset="detr_r50")
    again: Any = zoo.load_model(tmp_path / "detr")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert all(torch.equal(each, model(images)[name]) for name, each in again(images).items())


def test_wrong_choices_are_one_line():
    for message, choices in {
        "padding": {"padding": "none"},
        "trunk_norm": {"trunk_norm": "batchnorm"},
        "cross: unknown name": {"cross": "unknown"},
        "cross: deformable samples around boxes": {"cross": "deformable"},
        "output_stride": {"trunk": "timm:resnet18(output_stride=5)"},
        "unknown option": {"trunk": "timm:resnet18(checkpoint_path='x')"},
        "shortcut": {"trunk": "timm:resnet50(shortcut=True)"},
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            build(**choices)
        assert "\n" not in str(caught.value)
    backbone = {"name": "detr_r50", **TINY, "trunk": PYRAMID}
    with pytest.raises(ValueError, match="model.loss"):
        Detect(backbone, loss="vfl")
    with pytest.raises(ValueError, match="model.assigner"):
        Detect(backbone, assigner="iou")


def test_it_trains_and_is_measured(tmp_path, capsys):
    backbone = {"name": "detr_r50", "trunk": PYRAMID, "dim": 16, "depth": 1, "encoder_depth": 1, "heads": 2}
    backbone |= {"queries": 8, "image": 64}
    flags = [f"--model.backbone.{field}={value}" for field, value in backbone.items()]
    flags += ["--data.dataset=shapes", "--data.size=64", "--data.fit=pad", "--data.batch=4", "--model.warmup=1"]
    flags += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2"]
    command("fit", *flags, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}")
    assert "AP " in capsys.readouterr().err
    model: Any = zoo.load_model(tmp_path / "best")
    assert type(model) is DETR and model(torch.randn(1, 3, 64, 64))["logits"].shape == (1, 8, model.config.classes + 1)


@pytest.mark.all
@torch.no_grad()
def test_it_compiles_and_exports(tmp_path):
    model = build(dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    sizes = [(2, 64, 96), (1, 100, 70)]
    masks = [torch.ones(batch, height, width, dtype=torch.bool) for batch, height, width in sizes]
    masks[0][1, 40:] = False
    images = [torch.randn(batch, 3, height, width) for batch, height, width in sizes]
    for image, mask in zip(images, masks, strict=True):
        wanted = model(image, mask)
        for name, each in compiled(image, mask).items():
            assert (each - wanted[name]).abs().max() < 1e-4
    free = torch.export.Dim
    shape = {0: free("batch", max=64), 2: free("height", max=2048), 3: free("width", max=2048)}
    shapes = {"images": shape, "mask": {0: shape[0], 1: shape[2], 2: shape[3]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (images[0], masks[0]), dynamo=True, dynamic_shapes=shapes, input_names=["images", "mask"]
        )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for image, mask in zip(images, masks, strict=True):
        wanted = model(image, mask)
        given = {"images": image.numpy(), "mask": mask.numpy()}
        for each, other in zip(session.run(None, given), wanted.values(), strict=True):
            assert (torch.from_numpy(each) - other).abs().max() < 1e-3
