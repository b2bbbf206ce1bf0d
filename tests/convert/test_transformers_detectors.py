"""Detectors of transformers, in every layout of their files: equal outputs, plain errors."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    DFineForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
)

import zoo
from models.test_distribution import copy_weights, published
from published_detectors import (
    DEPTHS,
    DFINES,
    SMALL,
    WIDTHS,
    compare_detr,
    compare_rtdetr,
    detr,
    dfine,
    rtdetr,
    timm,
    written,
)
from zoo.convert import from_transformers
from zoo.convert.transformers.images import read_box_preprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.models import PRESETS
from zoo.outputs.label_map import LabelMap


@pytest.mark.daily(3)
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("backbone", ["timm", "resnet", "dilated"])
def test_a_detr_gives_on_a_padded_batch_what_it_gives_in_transformers(tmp_path, backbone, version):
    if backbone == "resnet":
        config = ResNetConfig(layer_type="basic", hidden_sizes=WIDTHS["basic"], depths=DEPTHS["basic"])
        config.out_features = ["stage4"]
        theirs = detr(backbone_config=config, use_timm_backbone=False, backbone=None)
    else:
        theirs = detr(**(timm() if backbone == "timm" else timm("resnet50", dilation=True)))
    found = from_transformers(written(theirs, tmp_path, version))
    assert found.labels == LabelMap(("cat", "dog"), (1, 3))  # pyright: ignore
    assert found.model.strides == [16 if backbone == "dilated" else 32]
    compare_detr(theirs, found.model, [1, 3, 4])


@pytest.mark.daily(3)
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_an_rtdetr_gives_what_it_gives_in_transformers(tmp_path, layer, version):
    theirs = rtdetr(layer)
    found = from_transformers(written(theirs, tmp_path, version))
    assert found.model.config.trunk == ("timm:resnet18d(shortcut=True)" if layer == "basic" else "timm:resnet50d")
    compare_rtdetr(theirs, found.model)


def test_the_first_rtdetr_too(tmp_path):
    theirs = rtdetr(kind=RTDetrConfig, model=RTDetrForObjectDetection)
    compare_rtdetr(theirs, from_transformers(written(theirs, tmp_path, 4)).model)


@pytest.mark.parametrize("name", DFINES)
def test_the_weights_of_a_published_dfine_are_those_of_transformers(name):
    """Their names and shapes, all of them, and the constants."""
    config = dfine(name)
    with torch.device("meta"):
        theirs, ours = DFineForObjectDetection(config), zoo.create_model(name)
    assert copy_weights(theirs, ours, []) == set()  # pyright: ignore[reportArgumentType]
    assert ours.boxes.scale == config.reg_scale and ours.strides == config.feat_strides  # pyright: ignore


@pytest.mark.parametrize("name", [*DFINES][:1] + [pytest.param(name, marks=pytest.mark.all) for name in [*DFINES][1:]])
def test_a_dfine_gives_what_it_gives_in_transformers(tmp_path, name):
    """In its published size."""
    theirs = published(dfine(name, num_queries=10))
    found = from_transformers(written(theirs, tmp_path, 4))
    preset: Any = PRESETS[name]
    trunk_norm = found.model.config.trunk_norm  # which their config holds, and ours chooses for training
    assert found.model.config == replace(preset, queries=10, trunk_norm=trunk_norm)
    compare_rtdetr(theirs, found.model)


def test_a_dfine_of_other_sizes_too(tmp_path):
    sizes = SMALL | {"encoder_hidden_dim": 48, "decoder_in_channels": [48] * 3, "head_dim": 8}
    theirs = published(dfine("dfine_s", **sizes))
    found = from_transformers(written(theirs, tmp_path, 4))
    assert found.model.config.trunk == "timm:hgnetv2_b0" and found.model.config.encoder_dim == 48
    compare_rtdetr(theirs, found.model)
    theirs.model.decoder.reg_scale.data += 1.0
    with pytest.raises(ValueError, match=r"reg_scale' is not the 4 of the config"):
        from_transformers(written(theirs, tmp_path, 4))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ({"size": {"height": 96, "width": 96}}, {"size": 96, "fit": "stretch"}),
        ({"size": {"shortest_edge": 96, "longest_edge": 200}}, {"size": 96, "longest": 200, "fit": "shortest"}),
        ({"size": 96, "max_size": 200}, {"size": 96, "longest": 200, "fit": "shortest"}),
        ({"size": 96}, {"size": 96, "longest": 1333, "fit": "shortest"}),
        ({"size": None}, {"size": 800, "longest": 1333, "fit": "shortest"}),
        (
            {"size": 96, "resample": 3, "image_processor_type": "RTDetrImageProcessor", "do_normalize": True},
            {"size": 96, "longest": 1333, "fit": "shortest", "interpolation": "bicubic"},
        ),
        ({"size": "96"}, "size: the zoo supports a square"),
        ({"size": {"height": 96, "width": 90}}, "size: the zoo supports a square"),
        ({"pad_size": {"height": 96, "width": 90}}, "pad_size: the zoo supports null"),
        ({"do_resize": False}, "do_resize: the zoo supports true, not false"),
        ({"size_divisor": 32}, "size_divisor: the zoo does not know this key"),
        ({"image_processor_type": "YolosImageProcessor"}, "image_processor_type: the zoo supports Detr, RTDetr"),
        ({"size": {"height": 96, "width": 96}, "rescale_factor": 1.0}, "rescale_factor: the zoo supports"),
    ],
    ids=str,
)
def test_the_preprocessing_is_that_of_the_file(size, wanted, tmp_path):
    values = size | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            read_box_preprocess(tmp_path, "Detr")
        return
    wanted = {"resizer": "torch"} | wanted
    found = read_box_preprocess(tmp_path, "Detr")
    assert found == BoxPreprocess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **wanted)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"do_normalize": False}))
    assert read_box_preprocess(tmp_path, "Detr") == BoxPreprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **wanted)
