"""The image processors of transformers as our preprocessing."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL.Image import Resampling

from zoo.convert.source import LARGEST, Section
from zoo.convert.transformers.files import read_json
from zoo.inputs.boxes import BoxPreprocess
from zoo.inputs.images import ImagePreprocess

_HALF = [0.5, 0.5, 0.5]
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_SHORTEST = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3, **_CLIP}
# What the processors do where a file does not say it, or says null.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3}
    | {"image_mean": _HALF, "image_std": _HALF},
    "Bit": _SHORTEST,
    "CLIP": _SHORTEST,
}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
DETECTORS: dict[str, dict[str, Any]] = {
    "Detr": {"size": {"shortest_edge": 800, "longest_edge": 1333}, **_IMAGENET},
    "RTDetr": {"size": {"height": 640, "width": 640}, "do_normalize": False, **_IMAGENET},
}
_HARMLESS = (
    "_processor_class",
    "_valid_processor_keys",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "feature_extractor_type",
    "input_data_format",
    "processor_class",
    "return_tensors",
    "use_fast",
)
_BOXES = ("do_convert_annotations", "do_pad", "format", "pad_and_return_pixel_mask")
Made = TypeVar("Made")


def read_preprocess(folder: Path, usual: str, channels: int) -> ImagePreprocess | None:
    """The preprocessing that a file preprocessor_config.json describes; None if there is none.

    Args:
        folder: of the file.
        usual: the processor of files that name none, of CLASSIFIERS.
        channels: of the model's images.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    given, name, options = _opened(path, usual, CLASSIFIERS, channels)
    options |= {"corner": "floor", **_geometry(given, name in ("Bit", "CLIP"))}
    given.finish(*_HARMLESS)
    return _made(ImagePreprocess, options, path)


def read_box_preprocess(folder: Path, usual: str) -> BoxPreprocess | None:
    """The preprocessing of a detector's images that a file preprocessor_config.json describes; None if there is none.
    `usual` is the processor of files that name none, of DETECTORS."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    given, _, options = _opened(path, usual, DETECTORS, 3)
    given.fixed("do_resize", True)
    given.fixed("pad_size", None)
    size, most = given.left.pop("size"), given.take("max_size", int, 1333)
    if type(size) is int:  # DETR's files of version 4.26 and before
        size = {"shortest_edge": size, "longest_edge": most}
    keys = set(size) if isinstance(size, dict) else set()
    if keys == {"shortest_edge", "longest_edge"}:
        sides = [_side(given, "size", size[key]) for key in ("shortest_edge", "longest_edge")]
        options |= {"size": sides[0], "longest": sides[1], "fit": "shortest"}
    elif keys == {"height", "width"} and size["height"] == size["width"]:
        options |= {"size": _side(given, "size", size["height"]), "fit": "stretch"}
    else:
        raise given.refused(
            "size", f"the zoo supports a square, or shortest_edge and longest_edge, not {str(size)[:80]}"
        )
    given.finish(*_HARMLESS, *_BOXES)
    return _made(BoxPreprocess, options, path)


def _opened(
    path: Path, usual: str, processors: Mapping[str, Mapping[str, Any]], channels: int
) -> tuple[Section, str, dict[str, Any]]:
    """The fields of a file over the defaults of its processor, the name of that, and the options of our preprocessing
    apart from the size. Null is a field that is not there, as in transformers."""
    values = {key: value for key, value in read_json(path).items() if value is not None}
    given = Section(values, "", str(path))
    named = given.take("image_processor_type", str, values.get("feature_extractor_type", f"{usual}ImageProcessor"))
    found = re.fullmatch(r"(\w+?)(?:FeatureExtractor|ImageProcessor(Fast|Pil)?)", str(named))
    if found is None or found[1] not in processors:
        raise given.refused("image_processor_type", f"the zoo supports {', '.join(processors)}, not {named!r}")
    given.left = dict(processors[found[1]]) | given.left
    given.fixed("do_rescale", True)
    if abs(given.take("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
        raise given.refused("rescale_factor", f"the zoo supports 1 / 255, not {values['rescale_factor']!r}")
    options: dict[str, Any] = {"mean": given.take("image_mean", list), "std": given.take("image_std", list)}
    if not given.take("do_normalize", bool, True):
        options = {"mean": [0.0] * channels, "std": [1.0] * channels}
    code = given.take("resample", int)
    if code not in list(Resampling):
        raise given.refused("resample", f"it must be from 0 to 5, got {code}")
    options |= {"interpolation": Resampling(code).name.lower(), "resizer": "pil" if found[2] == "Pil" else "torch"}
    return given, found[1], options | {"channels": channels}


def _made(kind: type[Made], options: Mapping[str, Any], path: Path) -> Made:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _geometry(given: Section, short: bool) -> dict[str, Any]:
    """size, fit and crop of our preprocessing. An integer as size is the shortest side if `short`, otherwise both."""
    given.fixed("do_resize", True)
    short = not given.take("default_to_square", bool, not short)
    size, cropped = given.left.pop("size"), given.take("do_center_crop", bool, False)
    size = {"shortest_edge": size} if type(size) is int and short else size
    cut, padded = given.left.pop("crop_size", None), given.take("do_pad", bool, False)
    extent = given.left.pop("pad_size", None)
    if isinstance(size, dict) and set(size) == {"max_height", "max_width"}:
        sides = _sides(given, "size", {"height": size["max_height"], "width": size["max_width"]})
        if cropped or not padded or extent is None or _sides(given, "pad_size", extent) != sides:
            raise given.refused("size", "max_height and max_width need do_pad with a pad_size of the same sides")
        return {"size": sides, "fit": "longest", "crop": 1.0}
    if padded:
        raise given.refused("do_pad", "the zoo supports padding only with max_height and max_width")
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        side = _side(given, "size", size["shortest_edge"])
        inside = _sides(given, "crop_size", cut) if cropped else None
        if inside is None or inside[0] != inside[1]:
            raise given.refused("size", "shortest_edge needs do_center_crop with a square crop_size")
        return {"size": inside, "fit": "crop", "crop": _share(given, inside, (side, side))}
    sides = _sides(given, "size", size)
    inside = _sides(given, "crop_size", cut) if cropped else sides
    return {"size": inside, "fit": "squash", "crop": _share(given, inside, sides)}


def _side(given: Section, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise given.refused(key, f"its sides must be integers from 1 to {LARGEST:,}, got {value!r}")
    return value


def _sides(given: Section, key: str, value: Any) -> tuple[int, int]:
    """Height and width, which may be one integer."""
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return _side(given, key, value["height"]), _side(given, key, value["width"])
    if isinstance(value, list) and len(value) == 2:
        return _side(given, key, value[0]), _side(given, key, value[1])
    if type(value) is int:
        return _side(given, key, value), value
    raise given.refused(key, f"it must be an integer, or have a height and a width, got {str(value)[:80]}")


def _share(given: Section, inside: tuple[int, int], sides: tuple[int, int]) -> float:
    """The crop with which images are resized to `sides` before `inside` is cut out."""
    ratios = [each / whole for each, whole in zip(inside, sides, strict=True)]
    for share in (*ratios, *(math.nextafter(ratio, 0) for ratio in ratios)):
        if share <= 1 and tuple(int(each / share) for each in inside) == sides:
            return share
    raise given.refused("crop_size", f"the zoo cannot cut {inside} out of images resized to {sides}")
