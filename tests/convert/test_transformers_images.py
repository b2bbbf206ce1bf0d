"""The image processors of transformers: equal pixels, and no setting that is ignored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from zoo.convert.transformers.images import read_box_preprocess, read_preprocess
from zoo.inputs.images import ImagePreprocess

KINDS: dict[str, tuple[Any, Any]] = {
    "ViT": (transformers.ViTImageProcessor, ViTImageProcessorPil),
    "DeiT": (transformers.DeiTImageProcessor, DeiTImageProcessorPil),
    "Bit": (transformers.BitImageProcessor, BitImageProcessorPil),
    "CLIP": (transformers.CLIPImageProcessor, CLIPImageProcessorPil),
}
SMALL = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
LONGEST = {"size": {"max_height": 20, "max_width": 30}, "do_pad": True, "pad_size": {"height": 20, "width": 30}}
STATISTICS = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4]}
# A processor and what its file says.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 24, "width": 40}, "resample": 3} | STATISTICS),
    ("ViT", {"size": 30, "do_normalize": False, "resample": 0}),
    ("ViT", {"size": {"height": 30, "width": 20}, "do_center_crop": True, "crop_size": {"height": 27, "width": 18}}),
    ("ViT", {"size": {"height": 30, "width": 30}, "do_center_crop": True, "crop_size": {"height": 27, "width": 27}}),
    ("ViT", LONGEST | STATISTICS),
    ("DeiT", {}),
    ("DeiT", {"size": 40, "crop_size": 35, "resample": 2}),
    ("DeiT", {"do_center_crop": False}),
    ("Bit", {}),
    ("Bit", {"size": {"shortest_edge": 256}} | STATISTICS),
    ("Bit", SMALL | {"resample": 2}),
    ("Bit", {"size": 33, "crop_size": 33}),
    ("CLIP", SMALL),
]
SHAPES = [(60, 61), (41, 97), (33, 32), (250, 200), (21, 20)]


def image(shape: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (shape[0] // 3 + 1, shape[1] // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(3, 0).repeat(3, 1)[: shape[0], : shape[1]])


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path, kind: str = "ViT", channels: int = 3) -> ImagePreprocess:
    found = read_preprocess(folder, kind, channels)
    assert found is not None
    return found


@pytest.mark.parametrize("fast", [True, False], ids=["torch", "pil"])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_pixels_are_those_of_the_processor(kind: str, options: dict[str, Any], fast: bool, tmp_path: Path):
    processor = KINDS[kind][not fast](**options)
    processor.save_pretrained(tmp_path)
    prepare = read(tmp_path)
    assert prepare.resizer == "torch"  # files do not say which, and version 5 prefers it
    prepare = prepare if fast else replace(prepare, resizer="pil")
    for shape in SHAPES:
        source = image(shape)
        wanted = torch.as_tensor(processor(source, return_tensors="pt")["pixel_values"][0])
        got = prepare(source)
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() < 1e-5  # of single precision: a level is 0.004 or more


def test_a_file_without_fields_is_what_its_kind_does(tmp_path: Path):
    """As files of earlier versions are read; null is a field that is not there."""
    for kind, (fast, _) in KINDS.items():
        usual = fast()
        for values in ({}, {"size": None, "image_mean": None, "resample": None, "image_processor_type": None}):
            prepare = read(write(tmp_path, values), kind)
            wanted = torch.as_tensor(usual(image((300, 260)), return_tensors="pt")["pixel_values"][0])
            assert (prepare(image((300, 260))) - wanted).abs().max() < 1e-5
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "image_mean": [0.5] * 3, "resample": 2}
    assert read(write(tmp_path, old), "Bit") == read(write(tmp_path, {}), "ViT")
    for named in ("ViTImageProcessor", "ViTImageProcessorFast"):
        assert read(write(tmp_path, {"image_processor_type": named}), "Bit").resizer == "torch"
    grey = read(write(tmp_path, {"image_mean": [0.5], "image_std": [0.5]}), channels=1)
    assert grey.channels == 1 and grey(image((30, 30))).shape == (1, 224, 224)
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_preprocess(tmp_path, "ViT", 3) is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_resize": False}, "do_resize: the zoo supports true, not false"),
    ({"do_rescale": False}, "do_rescale: the zoo supports true, not false"),
    ({"rescale_factor": 1.0}, "rescale_factor: the zoo supports 1 / 255, not 1.0"),
    ({"resample": 1}, "resizer 'torch' has nearest, bilinear, bicubic, got 'lanczos'"),
    ({"resample": 9}, "resample: it must be from 0 to 5, got 9"),
    ({"resample": "bicubic"}, "resample: it must be an integer"),
    ({"image_mean": [0.5]}, "mean has 1 values, but channels=3 needs 3"),
    ({"image_mean": 0.5}, "image_mean: it must be a list, got 0.5"),
    ({"image_std": [0.0, 1.0, 1.0]}, "std must be >= 1e-6"),
    ({"crop_pct": 0.9}, "crop_pct: the zoo does not know this key"),
    ({"do_pad": True}, "do_pad: the zoo supports padding only with max_height and max_width"),
    ({"size": {"shortest_edge": 40}}, "size: shortest_edge needs do_center_crop with a square crop_size"),
    ({"size": {"shortest_edge": 40, "longest_edge": 60}}, "size: it must be an integer, or have a height"),
    ({"size": {"longest_edge": 60}}, "size: it must be"),
    ({"size": {"max_height": 30, "max_width": 30}}, "max_height and max_width need do_pad"),
    ({"size": {"height": 30, "width": "30"}}, "size: its sides must be integers from 1 to 1,000,000, got '30'"),
    ({"size": {"height": 9000, "width": 9000}}, "size must be an integer from 1 to 8192, got 9000"),
    ({"size": 0}, "size: its sides must be integers"),
    ({"size": "224"}, "size: it must be an integer"),
    ({"do_center_crop": True, "crop_size": 300}, r"cannot cut \(300, 300\) out of images resized to \(224, 224\)"),
    ({"do_center_crop": True}, "crop_size: it must be an integer, or have a height and a width, got None"),
    ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type: the zoo supports ViT, DeiT, Bit, CLIP"),
    ({"image_processor_type": 3}, "image_processor_type: it must be a string"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=str)
def test_settings_without_counterpart_are_refused(values: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=words) as found:
        read(write(tmp_path, values))
    assert "\n" not in str(found.value) and "preprocessor_config.json: " in str(found.value)


# One change of each field of a file that says everything.
WHOLE = {"image_processor_type": "BitImageProcessorPil", "do_resize": True, "do_rescale": True, "do_normalize": True}
WHOLE |= {"do_center_crop": True, "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3} | SMALL
WHOLE |= {"image_std": [0.5] * 3}
FLIPS = {"do_normalize": False, "resample": 2, "image_mean": [0.4] * 3, "image_std": [0.4] * 3, "do_center_crop": False}
FLIPS |= {"size": {"shortest_edge": 40}, "crop_size": 30, "do_resize": False, "do_rescale": False}
FLIPS |= {"rescale_factor": 1 / 256, "image_processor_type": "BitImageProcessor"}


def test_each_field_changes_the_pixels_or_is_refused(tmp_path: Path):
    assert set(FLIPS) == set(WHOLE)
    source = image((61, 90))
    before = read(write(tmp_path, WHOLE))(source)
    for field, value in FLIPS.items():
        try:
            after = read(write(tmp_path, WHOLE | {field: value}))(source)
        except ValueError:
            continue
        assert after.shape != before.shape or not torch.equal(after, before), field


BOXES: list[tuple[str, dict[str, Any]]] = [
    ("Detr", {"size": {"shortest_edge": 60, "longest_edge": 100}}),
    ("Detr", {}),
    ("Detr", {"size": 50, "max_size": 80} | STATISTICS),
    ("RTDetr", {}),
    ("RTDetr", {"size": {"height": 64, "width": 64}, "do_normalize": True, "resample": 3}),
]


@pytest.mark.parametrize(("kind", "options"), BOXES, ids=str)
def test_the_pixels_of_detectors_are_those_of_the_processor(kind: str, options: dict[str, Any], tmp_path: Path):
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    processor.save_pretrained(tmp_path)
    saved = read_box_preprocess(tmp_path, "Detr")
    plain = read_box_preprocess(write(tmp_path, {"image_mean": None} | options), kind)
    assert saved is not None and saved == plain
    for shape in SHAPES:
        source = image(shape)
        wanted = torch.as_tensor(processor(source, return_tensors="pt")["pixel_values"][0])
        (got,) = saved.parts(source)
        assert got.image.shape == wanted.shape and got.size == shape
        assert (got.image - wanted).abs().max() < 1e-5
