"""DETR, RT-DETR and RT-DETRv2 of Hugging Face's transformers, read from their files without that library."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert.detection import ConvertedDetector, build, resnet_name
from zoo.convert.source import Section
from zoo.convert.timm.parts import with_width
from zoo.convert.transformers.files import HARMLESS, read_folder, read_json
from zoo.ffns import FFNS
from zoo.inputs.boxes import BoxPreprocess
from zoo.models.detr import DETRConfig
from zoo.models.rtdetr import RTDETRConfig
from zoo.outputs.label_map import LabelMap

_UNUSED = ("N/A",)  # names of ids that COCO does not use
_TRAINING = (
    "activation_dropout",
    "attention_dropout",
    "auxiliary_loss",
    "bbox_cost",
    "bbox_loss_coefficient",
    "box_noise_scale",
    "class_cost",
    "classifier_dropout",
    "decoder_layerdrop",
    "dice_loss_coefficient",
    "disable_custom_kernels",
    "dropout",
    "encoder_layerdrop",
    "eos_coefficient",
    "focal_loss_alpha",
    "focal_loss_gamma",
    "freeze_backbone_batch_norms",
    "giou_cost",
    "giou_loss_coefficient",
    "init_std",
    "init_xavier_std",
    "initializer_bias_prior_prob",
    "initializer_range",
    "label_noise_ratio",
    "mask_loss_coefficient",
    "matcher_alpha",
    "matcher_bbox_cost",
    "matcher_class_cost",
    "matcher_gamma",
    "matcher_giou_cost",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_focal_loss",
    "use_pretrained_backbone",
    "weight_loss_bbox",
    "weight_loss_giou",
    "weight_loss_vfl",
)
# Keys that say again what others say, or how something is computed that the zoo computes for any size.
_REPEATED = (
    "anchor_image_size",
    "backbone_kwargs",
    "eval_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "encoder_in_channels",
    "decoder_in_channels",
    "scale_embedding",
    "num_labels",
)
_BACKBONE = (
    "features_only",
    "freeze_batch_norm_2d",
    "out_features",
    "out_indices",
    "stage_names",
    "use_pretrained_backbone",
    "hidden_act",
)
# The names of version 4 and those of version 5, in the order in which they are replaced.
_RENAMED = (
    (r"backbone\.conv_encoder\.", "backbone."),
    (r"\.out_proj\.", ".o_proj."),
    (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
    (r"encoder\.encoder\.(\d+)\.layers", r"encoder.aifi.\1.layers"),
    (r"^model\.decoder\.(class|bbox)_embed\.", r"\1_embed."),
)
_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}
Named = Callable[[str], str]


def convert_detector(folder: Path) -> ConvertedDetector:
    """Converts a DetrForObjectDetection or an RTDetr(V2)ForObjectDetection; see `from_transformers`."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    whole = Section(values, "", where)
    kind = whole.fixed("model_type", "detr", "rt_detr", "rt_detr_v2")
    names, rows, count = _classes(values, whole)
    shared = {"classes": len(names), "channels": 3}
    if kind == "detr":
        config, trunk = _detr(whole, shared)
    else:
        config, trunk = _rtdetr(whole, shared)
    whole.finish(*HARMLESS, *_TRAINING, *_REPEATED)
    tensors = _renamed(read_folder(folder))
    model = build(config, tensors, str(folder), trunk, rows if len(rows) < count else None, count + (kind == "detr"))
    return ConvertedDetector(model, _preprocess(folder), LabelMap(tuple(names), tuple(rows[: len(names)])))


def _classes(values: Mapping[str, Any], whole: Section) -> tuple[list[str], list[int], int]:
    """The names of the classes; the rows of the class heads that they are, for DETR with the last one, which means no
    object; and the number of rows without that one. Ids that COCO does not use are left out."""
    given = values.get("id2label") or {str(id): f"LABEL_{id}" for id in range(values.get("num_labels") or 2)}
    try:
        by_id = {int(id): str(name) for id, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise whole.refused("id2label", "it must be an object with a name for each id") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise whole.refused("id2label", f"its ids must be 0 to {len(by_id) - 1}")
    kept = [id for id in sorted(by_id) if by_id[id] not in _UNUSED]
    rows = [*kept, len(by_id)] if values.get("model_type") == "detr" else kept
    return [by_id[id] for id in kept], rows if len(kept) < len(by_id) else rows[: len(kept)], len(by_id)


def _detr(whole: Section, shared: Mapping[str, Any]) -> tuple[DETRConfig, Named]:
    whole.fixed("position_embedding_type", "sine")
    dim, heads = whole.whole("d_model", 256), whole.whole("encoder_attention_heads", 8)
    whole.fixed("decoder_attention_heads", heads)
    act = _activation(whole, "activation_function", "relu")
    trunk, named = _trunk(whole, whole.fixed("dilation", False, True))
    return (
        DETRConfig(
            trunk=trunk,
            trunk_norm="frozen",
            dim=dim,
            heads=heads,
            depth=whole.whole("decoder_layers", 6),
            encoder_depth=whole.whole("encoder_layers", 6),
            queries=whole.whole("num_queries", 100),
            ffn=_ffn(whole.whole("encoder_ffn_dim", 2048), act, dim),
            decoder_ffn=_ffn(whole.whole("decoder_ffn_dim", 2048), act, dim),
            padding="published",
            dropout=0.1,
            **shared,
        ),
        named,
    )


def _rtdetr(whole: Section, shared: Mapping[str, Any]) -> tuple[RTDETRConfig, Named]:
    dim, heads = whole.whole("d_model", 256), whole.whole("decoder_attention_heads", 8)
    whole.fixed("encoder_attention_heads", heads)
    whole.fixed("encoder_hidden_dim", dim)
    for key, value in (
        ("num_feature_levels", 3),
        ("decoder_n_levels", 3),
        ("feat_strides", [8, 16, 32]),
        ("encode_proj_layers", [2]),
        ("positional_encoding_temperature", 10000),
        ("normalize_before", False),
        ("learn_initial_query", False),
        ("with_box_refine", True),
        ("decoder_method", "default"),
        ("decoder_offset_scale", 0.5),
        ("layer_norm_eps", 1e-5),
        ("batch_norm_eps", 1e-5),
        ("activation_function", "silu"),
    ):
        whole.fixed(key, value)
    points = whole.whole("decoder_n_points", 4)
    encoder = _activation(whole, "encoder_activation_function", "gelu")
    decoder = _activation(whole, "decoder_activation_function", "relu")
    trunk, named = _trunk(whole, False)
    return (
        RTDETRConfig(
            trunk=trunk,
            trunk_norm="frozen",
            dim=dim,
            heads=heads,
            depth=whole.whole("decoder_layers", 6),
            encoder_depth=whole.whole("encoder_layers", 1),
            queries=whole.whole("num_queries", 300),
            ffn=_ffn(whole.whole("encoder_ffn_dim", 1024), encoder, dim),
            decoder_ffn=_ffn(whole.whole("decoder_ffn_dim", 1024), decoder, dim),
            neck_ratio=whole.take("hidden_expansion", float, 1.0),
            cross="deformable" if points == 4 else f"deformable(points={points})",
            denoising=whole.take("num_denoising", int, 100) > 0,
            **shared,
        ),
        named,
    )


def _activation(whole: Section, key: str, usual: str) -> str:
    return whole.fixed(key, usual, *({"relu", "gelu", "silu"} - {usual}))


def _ffn(hidden: int, activation: str, dim: int) -> str:
    return with_width(FFNS, "mlp", 4.0, hidden, [] if activation == "gelu" else [f"activation='{activation}'"], dim)


def _trunk(whole: Section, dilated: bool) -> tuple[str, Named]:
    """The trunk, and from its parts to their names in the file."""
    timm = whole.left.pop("use_timm_backbone", None)
    name, given = whole.left.pop("backbone", None), whole.left.pop("backbone_config", None)
    channels = whole.fixed("num_channels", 3, None)
    if given is None:
        given = {"model_type": "timm_backbone", "backbone": name or "resnet50", "num_channels": channels or 3}
        if timm is False:
            raise whole.refused("backbone_config", "it is missing")
    inside = Section(given, "backbone_config", whole.where)
    kind = inside.fixed("model_type", "timm_backbone", "resnet", "rt_detr_resnet")
    inside.fixed("num_channels", 3)
    if kind == "timm_backbone":
        net = inside.take("backbone", str)
        if not re.fullmatch(r"resnet\d+d?", net):
            raise inside.refused("backbone", f"the zoo supports resnets, not {net!r}")
        dilated = inside.fixed("output_stride", None, 16, 32) == 16 or dilated
        named: Named = str
    else:
        deep = kind == "rt_detr_resnet"
        layer, depths = inside.take("layer_type", str, "bottleneck"), inside.take("depths", list, [3, 4, 6, 3])
        basic = layer == "basic"
        if (net := _RESNETS.get((layer, tuple(depths)))) is None:
            raise inside.refused("depths", f"the zoo supports those of resnet18, 34, 50 and 101, not {depths}")
        inside.fixed("hidden_sizes", [64, 128, 256, 512] if basic else [256, 512, 1024, 2048])
        inside.fixed("embedding_size", 64)
        inside.fixed("hidden_act", "relu")
        inside.fixed("downsample_in_first_stage", False)
        inside.fixed("downsample_in_bottleneck", False)
        named = partial(resnet_name, deep=deep, basic=basic)
        net += "d" * deep + "(shortcut=True)" * (deep and basic)
    inside.finish(*HARMLESS, *_BACKBONE)
    return f"timm:{net}" + "(output_stride=16)" * dilated, named


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the names of version 5; those that only say where something lies are dropped."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, other in _RENAMED:
            name = re.sub(theirs, other, name)
        if not name.endswith((".n_points_scale", "model.anchors", "model.valid_mask")):
            found[name] = tensor
    return found


def _preprocess(folder: Path) -> BoxPreprocess | None:
    """The preprocessing that the image processor of the file does; None if there is no file of it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    given = Section(read_json(path), "", str(path))
    given.fixed("do_resize", True)
    given.fixed("do_rescale", True)
    size = given.take("size", dict)
    normal = given.take("do_normalize", bool, True)
    options: dict[str, Any] = {"mean": given.take("image_mean", list, null=[0.0] * 3, default=[0.485, 0.456, 0.406])}
    options["std"] = given.take("image_std", list, null=[1.0] * 3, default=[0.229, 0.224, 0.225])
    if not normal:
        options = {"mean": [0.0] * 3, "std": [1.0] * 3}
    if set(size) == {"height", "width"} and size["height"] == size["width"]:
        options |= {"size": size["height"], "fit": "stretch"}
    elif set(size) == {"shortest_edge", "longest_edge"}:
        options |= {"size": size["shortest_edge"], "longest": size["longest_edge"], "fit": "shortest"}
    else:
        raise given.refused("size", f"the zoo supports a square, or shortest_edge and longest_edge, not {size}")
    try:
        return BoxPreprocess(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
