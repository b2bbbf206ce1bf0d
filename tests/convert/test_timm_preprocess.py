"""timm's evaluation transforms as our preprocessing."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from zoo.convert import timm_preprocess
from zoo.inputs.images import ImagePreprocess

NAMES = ["vit_base_patch16_siglip_224", "vit_base_patch16_clip_224.openai", "vit_small_patch16_dinov3.lvd1689m"]
NAMES += ["deit3_small_patch16_384", "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "caformer_s18.sail_in1k"]
CHANGES: list[dict[str, Any]] = [
    {"crop_mode": "squash", "crop_pct": 0.9},
    {"crop_mode": "border", "interpolation": "bilinear"},
    {"input_size": (3, 96, 64), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
]


def equal(config: Any) -> None:
    transform: Any = create_transform(**resolve_data_config(pretrained_cfg=config))
    prepare = timm_preprocess(config)
    for shape in ((300, 421), (90, 70)):
        source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
        assert torch.equal(prepare(source), transform(source))


@pytest.mark.parametrize("name", NAMES)
def test_the_pixels_of_published_models(name: str):
    found = get_pretrained_cfg(name)
    assert found is not None
    equal(found.to_dict())


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_each_field_is_read(change: dict[str, Any]):
    assert timm_preprocess({}) == ImagePreprocess() == timm_preprocess(dict.fromkeys(change))
    equal({"input_size": (3, 96, 96)} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_mode": "corner"}, "crop_mode: the zoo supports center, squash, border, not 'corner'"),
        ({"crop_border_pixels": 4}, "crop_border_pixels: the zoo supports no trimmed border, got 4"),
        ({"interpolation": "random"}, "unknown interpolation 'random'"),
        ({"input_size": (224, 224)}, "input_size must be channels, height and width"),
        ({"input_size": (4, 224, 224)}, "channels must be 3"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words) as found:
        timm_preprocess(change)
    assert "\n" not in str(found.value)


def test_the_config_of_a_model_is_taken():
    with torch.device("meta"):
        model: Any = timm.create_model("vit_base_patch16_siglip_224")
    assert timm_preprocess(model.pretrained_cfg) == ImagePreprocess(
        size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9, interpolation="bicubic"
    )
