"""timm's evaluation transforms as our preprocessing."""

from collections.abc import Mapping
from typing import Any

from zoo.inputs.images import ImagePreprocess
from zoo.text import one_line

MODES = {"center": "crop", "squash": "squash", "border": "pad"}
_FIELDS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "crop_border_pixels")


def timm_preprocess(config: Mapping[str, Any]) -> ImagePreprocess:
    """The preprocessing of a model of timm, whose transform gives the same pixels.

    Args:
        config: its pretrained_cfg, or what timm.data.resolve_model_data_config gives; fields that are not there or
            None have timm's defaults, and those that do not concern the transform are not read.

    Raises:
        ValueError: in one line, a field has a value that the zoo does not support.
    """
    given = {key: config[key] for key in _FIELDS if config.get(key) is not None}
    if border := given.pop("crop_border_pixels", None):
        raise ValueError(f"crop_border_pixels: the zoo supports no trimmed border, got {one_line(border, 40)}")
    size, mode = given.pop("input_size", (3, 224, 224)), given.pop("crop_mode", "center")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"crop_mode: the zoo supports {', '.join(MODES)}, not {one_line(mode, 40)!r}")
    if not isinstance(size, tuple | list) or len(size) != 3:
        raise ValueError(f"input_size must be channels, height and width, got {one_line(size, 40)}")
    crop = given.pop("crop_pct", ImagePreprocess.crop)
    return ImagePreprocess(channels=size[0], size=(size[1], size[2]), crop=crop, fit=MODES[mode], **given)
