"""DETR, RT-DETR, RT-DETRv2 and D-FINE of Hugging Face's transformers, read from their files without that library."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.detection import (
    RESNETS,
    ConvertedDetector,
    Named,
    build,
    ffn_of,
    hgnet_name,
    hgnet_of,
    resnet_name,
    resnet_of,
)
from zoo.convert.source import Section
from zoo.convert.timm.parts import spelled
from zoo.convert.transformers.files import HARMLESS, id_names, read_folder, read_json
from zoo.convert.transformers.images import read_box_preprocess
from zoo.models.detr import DETRConfig
from zoo.models.rtdetr import RTDETRConfig
from zoo.outputs.label_map import LabelMap

_UNUSED = ("N/A",)  # names of ids that COCO does not use
_TRAINING = (
    "activation_dropout",
    "attention_dropout",
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
    "weight_loss_ddf",
    "weight_loss_fgl",
    "weight_loss_giou",
    "weight_loss_vfl",
)
# Keys that say again what others say, or how something is computed that the zoo computes for any size.
_REPEATED = (
    "anchor_image_size",
    "auxiliary_loss",
    "backbone_kwargs",
    "encoder_in_channels",
    "scale_embedding",
)
_BACKBONE = (
    "features_only",
    "freeze_batch_norm_2d",
    "stage_names",
    "use_pretrained_backbone",
    "hidden_act",
)
_HGNET_REPEATED = (
    "depths",
    "embedding_size",
    "hidden_sizes",
    "initializer_range",
    "stage_downsample",
    "stage_downsample_strides",
    "stage_in_channels",
    "stage_kernel_size",
    "stage_light_block",
    "stage_mid_channels",
    "stem_channels",
    "stem_strides",
)
# The names of version 4 and those of version 5, in the order in which they are replaced.
_RENAMED = (
    (r"backbone\.conv_encoder\.", "backbone."),
    (r"\.out_proj\.", ".o_proj."),
    (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
    (r"encoder\.encoder\.(\d+)\.layers", r"encoder.aifi.\1.layers"),
    (r"(coder\.(?:aifi\.\d+\.)?layers\.\d+)\.mlp\.layers\.0\.", r"\1.mlp.fc1."),
    (r"(coder\.(?:aifi\.\d+\.)?layers\.\d+)\.mlp\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^model\.decoder\.(class|bbox)_embed\.", r"\1_embed."),
)
_DROPPED = (".n_points_scale", ".num_points_scale", "model.anchors", "model.valid_mask")


def convert_detector(folder: Path) -> ConvertedDetector:
    """Converts a DetrForObjectDetection or an RTDetr(V2)ForObjectDetection; see `from_transformers`."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    whole = Section(values, "", where)
    kind = whole.fixed("model_type", "detr", "rt_detr", "rt_detr_v2", "d_fine")
    names, rows, count = _classes(values, whole)
    whole.fixed("num_labels", count)
    shared = {"classes": len(names), "channels": 3}
    if kind == "detr":
        config, trunk = _detr(whole, shared)
    else:
        config, trunk = _rtdetr(whole, shared, fine=kind == "d_fine")
    whole.finish(*HARMLESS, *_TRAINING, *_REPEATED)
    tensors = _renamed(read_folder(folder), str(folder))
    if kind == "d_fine":
        _check_constants(tensors, values, str(folder))
    model = build(config, tensors, str(folder), trunk, rows if len(rows) < count else None, count + (kind == "detr"))
    preprocess = read_box_preprocess(folder, "Detr" if kind == "detr" else "RTDetr")
    return ConvertedDetector(model, preprocess, LabelMap(tuple(names), tuple(rows[: len(names)])))


def _classes(values: Mapping[str, Any], whole: Section) -> tuple[list[str], list[int], int]:
    """The names of the classes; the rows of the class heads that they are, for DETR with the last one, which means no
    object; and the number of rows without that one. Ids that COCO does not use are left out."""
    found = id_names(values, whole)
    kept = [id for id, name in enumerate(found) if name not in _UNUSED]
    rows = [*kept, len(found)] if values.get("model_type") == "detr" else kept
    return [found[id] for id in kept], rows if len(kept) < len(found) else rows[: len(kept)], len(found)


def _detr(whole: Section, shared: Mapping[str, Any]) -> tuple[DETRConfig, Named]:
    whole.fixed("position_embedding_type", "sine")
    dim, heads = whole.whole("d_model", 256), whole.whole("encoder_attention_heads", 8)
    whole.fixed("decoder_attention_heads", heads)
    whole.fixed("auxiliary_loss", False)  # with it transformers feeds normalized tokens to the next layer
    act = _activation(whole, "activation_function", "relu")
    trunk, named = _trunk(whole)
    layers = whole.whole("encoder_layers", 6)
    for key, value in (("hidden_size", dim), ("num_attention_heads", heads), ("num_hidden_layers", layers)):
        whole.fixed(key, value)  # other names of the same fields
    return (
        DETRConfig(
            trunk=trunk,
            trunk_norm="frozen",
            dim=dim,
            heads=heads,
            depth=whole.whole("decoder_layers", 6),
            encoder_depth=layers,
            queries=whole.whole("num_queries", 100),
            ffn=ffn_of(whole.whole("encoder_ffn_dim", 2048), act, dim),
            decoder_ffn=ffn_of(whole.whole("decoder_ffn_dim", 2048), act, dim),
            padding="published",
            dropout=0.1,
            **shared,
        ),
        named,
    )


def _rtdetr(whole: Section, shared: Mapping[str, Any], fine: bool) -> tuple[RTDETRConfig, Named]:
    dim, heads = whole.whole("d_model", 256), whole.whole("decoder_attention_heads", 8)
    inside = whole.whole("encoder_hidden_dim", 256)
    whole.fixed("encoder_attention_heads", heads)
    strides = whole.take("feat_strides", list, [8, 16, 32])
    for key, value in (
        ("num_feature_levels", len(strides)),
        ("encode_proj_layers", [len(strides) - 1]),
        ("decoder_in_channels", [inside] * len(strides)),
        ("hidden_size", dim),  # another name of d_model, as the next of encoder_attention_heads
        ("num_attention_heads", heads),
        ("eval_size", None),  # with it transformers adds no positions
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
    given: dict[str, Any] = {"depth": whole.whole("decoder_layers", 6)}
    points = whole.left.pop("decoder_n_points", 4)
    if not isinstance(points, int | list) or not all(type(each) is int for each in _listed(points)):
        raise whole.refused("decoder_n_points", f"it must be an integer, or one for each level, got {points!r}")
    options = [] if points == 4 else [f"points={tuple(points) if isinstance(points, list) else points}"]
    if fine:
        given |= _fine(whole, given["depth"], dim // heads)
        options += ["project=False", "gated=True"]
    else:
        whole.fixed("decoder_n_levels", len(strides))
    encoder = _activation(whole, "encoder_activation_function", "gelu")
    decoder = _activation(whole, "decoder_activation_function", "relu")
    trunk, named = _trunk(whole)
    config = RTDETRConfig(
        trunk=trunk,
        strides=tuple(strides),
        trunk_norm="frozen" if whole.take("freeze_backbone_batch_norms", bool, True) else "batch",
        dim=dim,
        encoder_dim=0 if inside == dim else inside,
        heads=heads,
        encoder_depth=whole.whole("encoder_layers", 1),
        queries=whole.whole("num_queries", 300),
        ffn=ffn_of(whole.whole("encoder_ffn_dim", 1024), encoder, inside),
        decoder_ffn=ffn_of(whole.whole("decoder_ffn_dim", 1024), decoder, dim),
        neck_ratio=whole.take("hidden_expansion", float, 1.0),
        cross=spelled("deformable", options),
        denoising=whole.take("num_denoising", int, 100) > 0,
        **given,
        **shared,
    )
    return config, named


def _fine(whole: Section, depth: int, width: int) -> dict[str, Any]:
    """The fields that are D-FINE's own."""
    whole.fixed("eval_idx", -1, depth - 1)
    whole.fixed("head_dim", width)
    for key, value in (("layer_scale", 1.0), ("lqe_hidden_dim", 64), ("lqe_layers", 2), ("top_prob_values", 4)):
        whole.fixed(key, value)
    whole.fixed("up", 0.5)
    options = [] if (bins := whole.whole("max_num_bins", 32)) == 32 else [f"bins={bins}"]
    options += [] if (scale := whole.take("reg_scale", float, 4.0)) == 4.0 else [f"scale={float(scale)}"]
    blocks = round(3 * whole.take("depth_mult", float, 1.0))
    return {"neck": "elan", "neck_depth": blocks, "box": spelled("distribution", options)}


def _check_constants(tensors: dict[str, Tensor], values: Mapping[str, Any], where: str) -> None:
    """Takes out the tensors that repeat numbers of a D-FINE's config; ValueError if they differ."""
    for key, usual in (("up", 0.5), ("reg_scale", 4.0)):
        found, wanted = tensors.pop(f"model.decoder.{key}", None), float(values.get(key, usual))
        if found is not None and (found.numel() != 1 or abs(found.item() - wanted) > 1e-3):
            raise ValueError(f"{where}: the tensor 'model.decoder.{key}' is not the {wanted:g} of the config")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _activation(whole: Section, key: str, usual: str) -> str:
    return whole.fixed(key, usual, *({"relu", "gelu", "silu"} - {usual}))


def _trunk(whole: Section) -> tuple[str, Named]:
    """The trunk, and from its parts to their names in the file."""
    timm, dilated = whole.left.pop("use_timm_backbone", None), whole.take("dilation", bool, False, null=False)
    name, given = whole.left.pop("backbone", None), whole.left.pop("backbone_config", None)
    channels = whole.fixed("num_channels", 3, None)
    if given is None:
        given = {"model_type": "timm_backbone", "backbone": name or "resnet50", "num_channels": channels or 3}
        if timm is False:
            raise whole.refused("backbone_config", "it is missing")
        more = Section(whole.left.pop("backbone_kwargs", None) or {}, "backbone_kwargs", whole.where)
        more.fixed("in_chans", 3)
        dilated = more.fixed("output_stride", None, 16, 32) == 16 or dilated
        _check_last_map(more)
        more.finish("features_only")
    else:
        dilated = False  # then the network's own config says it
    inside = Section(given, "backbone_config", whole.where)
    kind = inside.fixed("model_type", "timm_backbone", "resnet", "rt_detr_resnet", "hgnet_v2")
    inside.fixed("num_channels", 3)
    _check_last_map(inside)
    if kind == "timm_backbone":
        net = inside.take("backbone", str)
        if not re.fullmatch(r"resnet\d+d?", net):
            raise inside.refused("backbone", f"the zoo supports resnets, not {net!r}")
        dilated = inside.fixed("output_stride", None, 16, 32) == 16 or dilated
        named: Named = str
    elif kind == "hgnet_v2":
        net, named = _hgnet(inside), hgnet_name
    else:
        deep = kind == "rt_detr_resnet"
        basic = inside.fixed("layer_type", "bottleneck", "basic") == "basic"
        depths = inside.take("depths", list, [3, 4, 6, 3])
        if (net := resnet_of(basic, depths)) is None:
            raise inside.refused("depths", f"the zoo supports those of {', '.join(RESNETS)}, not {depths}")
        inside.fixed("hidden_sizes", [64, 128, 256, 512] if basic else [256, 512, 1024, 2048])
        inside.fixed("embedding_size", 64)
        inside.fixed("hidden_act", "relu")
        inside.fixed("downsample_in_first_stage", False)
        inside.fixed("downsample_in_bottleneck", False)
        named = partial(resnet_name, deep=deep, basic=basic)
        net += "d" * deep + "(shortcut=True)" * (deep and basic)
    inside.finish(*HARMLESS, *_BACKBONE)
    return f"timm:{net}" + "(output_stride=16)" * dilated, named


def _check_last_map(given: Section) -> None:
    """ValueError if the maps that a trunk gives do not end with its last one; the earlier ones follow from strides."""
    for key, last in (("out_indices", (4, -1)), ("out_features", ("stage4", "layer4"))):
        found = given.take(key, list, None, null=None)
        if found is not None and (not found or found[-1] not in last):
            raise given.refused(key, f"it must end with {last[0]!r}, the last map, got {found!r}")


def _hgnet(inside: Section) -> str:
    """timm's name of an HGNetV2."""
    keys = ("stage_out_channels", "stage_num_blocks", "stage_numb_of_layers")
    usual = ([128, 512, 1024, 2048], [1, 1, 3, 1], [6, 6, 6, 6])
    sizes = [inside.take(key, list, value) for key, value in zip(keys, usual, strict=True)]
    if (net := hgnet_of(*sizes)) is None:
        raise inside.refused(keys[0], f"the zoo supports those of hgnetv2_b0, b2, b4 and b5, not {sizes[0]}")
    inside.fixed("use_learnable_affine_block", net in ("hgnetv2_b0", "hgnetv2_b2"))
    inside.fixed("hidden_act", "relu")
    for key in _HGNET_REPEATED:
        inside.left.pop(key, None)  # the shapes of the tensors say them again
    return net


def _renamed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors with the names of version 5; those that only say where something lies are dropped. ValueError if two
    that get one name differ, as heads that are not shared do."""
    found = dict[str, Tensor]()
    for first, tensor in tensors.items():
        name = first
        for theirs, other in _RENAMED:
            name = re.sub(theirs, other, name)
        if name in found and not torch.equal(found[name], tensor):
            raise ValueError(f"{where}: the tensor '{first}' differs from '{name}', which it must repeat")
        if not name.endswith(_DROPPED):
            found[name] = tensor
    return found
