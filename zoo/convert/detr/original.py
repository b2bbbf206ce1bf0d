"""The checkpoints of the original DETR, RT-DETRv2 and D-FINE as ours, from the names and shapes of their tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from zoo.convert.detection import (
    HGNETS,
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
from zoo.convert.source import state_dict_of
from zoo.convert.timm.parts import spelled
from zoo.models.detection import DetectorConfig
from zoo.models.detr import DETRConfig
from zoo.models.rtdetr import RTDETRConfig
from zoo.outputs.label_map import LabelMap

# From the original names to those of transformers, in the order in which they are replaced.
_SHARED = (
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+|aifi\.0\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"\.norm3\.", ".final_layer_norm."),
)
_DETR = (
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"\.multihead_attn\.", ".encoder_attn."),
    *_SHARED,
)
_BRANCH = r"^backbone\.res_layers\.(\d)\.blocks\.(\d+)\."
_RTDETR = (
    (r"^backbone\.conv1\.conv1_(\d)\.", lambda m: f"model.backbone.model.embedder.embedder.{int(m[1]) - 1}."),
    (
        _BRANCH + r"branch2([abc])\.",
        lambda m: f"model.backbone.model.encoder.stages.{m[1]}.layers.{m[2]}.layer.{'abc'.index(m[3])}.",
    ),
    (_BRANCH + r"short\.(conv\.)?(?=conv\.|norm\.)", lambda m: _short(m[1], m[2], bool(m[3]))),
    (r"^backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^backbone\.stages\.", "model.backbone.model.encoder.stages."),
    (r"^(model\.backbone\.model\..*)\.conv\.", r"\1.convolution."),
    (r"^(model\.backbone\.model\..*)\.(norm|bn)\.", r"\1.normalization."),
    (r"(_blocks\.\d)\.cv([14])\.", r"\1.conv\2."),
    (r"(_blocks\.\d)\.cv([23])\.0\.", lambda m: f"{m[1]}.csp_rep{int(m[2]) - 1}."),
    (r"(_blocks\.\d)\.cv([23])\.1\.", r"\1.conv\2."),
    (r"(downsample_convs\.\d)\.0\.cv([12])\.", r"\1.conv\2."),
    (r"^(en|de)coder\.input_proj\.(\d)\.(conv|0)\.", r"model.\1coder_input_proj.\2.0."),
    (r"^(en|de)coder\.input_proj\.(\d)\.(norm|1)\.", r"model.\1coder_input_proj.\2.1."),
    (r"^encoder\.encoder\.0\.", "model.encoder.aifi.0."),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.decoder\.", "model.decoder."),
    (r"^decoder\.dec_score_head\.", "class_embed."),
    (r"^decoder\.dec_bbox_head\.", "bbox_embed."),
    (r"^decoder\.enc_output\.(proj|0)\.", "model.enc_output.0."),
    (r"^decoder\.enc_output\.(norm|1)\.", "model.enc_output.1."),
    (r"^decoder\.(query_pos|pre_bbox)_head\.", r"model.decoder.\1_head."),
    (r"^decoder\.(?=enc_|denoising)", "model."),
    (r"\.cross_attn\.", ".encoder_attn."),
    *_SHARED,
)
_DROPPED = ("decoder.anchors", "decoder.valid_mask")
_POINTS = ".num_points_scale"  # for each sample of an attention, 1 / the number of points of its level
_STRIDES = (4, 8, 16, 32)


def _short(stage: str, block: str, pooled: bool) -> str:
    inner = "shortcut.1." if pooled else "shortcut."
    return f"model.backbone.model.encoder.stages.{stage}.layers.{block}.{inner}"


def from_detr(
    checkpoint: str | Path | Mapping[str, Tensor],
    labels: LabelMap | None = None,
    *,
    heads: int = 8,
    queries: int = 300,
    dilated: bool = False,
) -> ConvertedDetector:
    """Converts a checkpoint of the original code of DETR, RT-DETRv2 or D-FINE, with equal outputs in eval mode.

    A DETR has padding="published", as in `from_transformers`. Of the others the averaged weights are taken if there are
    any, and all decoder layers; the decoder must sample bilinearly. Backbones are resnets, and HGNetV2 for a D-FINE.

    Args:
        checkpoint: the file, which is read without running code, or a state dict.
        labels: categories of the classes that are kept, each with the id that is its row of the class heads: for the
            published DETR, the ids of COCO. None keeps all rows.
        heads: attention heads.
        queries: queries of an RT-DETRv2 or a D-FINE; a DETR's are in its file.
        dilated: whether the last stage of a DETR's backbone is dilated (DC5), which the file does not show.

    Returns:
        The model in eval mode, no preprocessing, and the labels.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    where = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = (
        checkpoint
        if isinstance(checkpoint, Mapping)
        else state_dict_of(Path(checkpoint).expanduser(), ("ema", "module", "model"))
    )
    classic = any(name.startswith("transformer.") for name in state)
    if not classic and not any(name.startswith("decoder.dec_score_head.") for name in state):
        raise ValueError(
            f"{where} is not a DETR, an RT-DETRv2 or a D-FINE; their tensors are named transformer. or decoder."
        )
    tensors = _renamed(state, _DETR if classic else _RTDETR, where)
    facts = _Facts(tensors, where)
    config, trunk = (_detr if classic else _rtdetr)(facts, heads, queries, dilated)
    count, rows = config.labelled, None
    if labels is not None:
        if max(labels.ids) >= count:
            raise ValueError(f"{where} has {count} classes, so ids of labels must be below that, got {max(labels.ids)}")
        rows = [*labels.ids, *([count] if classic else [])]
        config = replace(config, classes=len(labels))
    tensors = {name: each for name, each in tensors.items() if not name.endswith(_POINTS)}
    return ConvertedDetector(build(config, tensors, where, trunk, rows, count + classic), None, labels)


def _renamed(state: Mapping[str, Tensor], table: Sequence[tuple[str, Any]], where: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_DROPPED):
            continue
        for theirs, other in table:
            name = re.sub(theirs, other, name)
        if ".in_proj_" not in name:
            found[name] = tensor
            continue
        if len(tensor) % 3:
            raise ValueError(f"{where}: '{name}' has {len(tensor)} rows, which are not queries, keys and values")
        for part, each in zip("qkv", tensor.chunk(3), strict=True):
            found[name.replace(".in_proj_", f".{part}_proj.")] = each
    return found


class _Facts:
    """What the names and shapes of tensors say about a network."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.tensors, self.where = tensors, where

    def size(self, name: str, axis: int = 0) -> int:
        """One side of a tensor; ValueError if it is missing."""
        if name not in self.tensors or self.tensors[name].ndim <= axis:
            raise ValueError(f"{self.where}: the tensor '{name}' is missing")
        return self.tensors[name].shape[axis]

    def depth(self, prefix: str) -> int:
        """How many numbered parts begin so."""
        return len({name[len(prefix) :].partition(".")[0] for name in self.tensors if name.startswith(prefix)})

    def resnet(self, layers: Sequence[str], basic: bool) -> str:
        """The name of a resnet with these layers."""
        depths = [self.depth(layer) for layer in layers]
        if (name := resnet_of(basic, depths)) is None:
            found = f"a backbone of {depths} {'basic' if basic else 'bottleneck'} blocks"
            raise ValueError(f"{self.where}: {found}; the zoo supports {', '.join(RESNETS)}")
        return name

    def points(self, path: str, levels: int, heads: int, required: bool) -> tuple[int, ...]:
        """The points of each level that an attention samples; where the file does not hold them, equal ones."""
        samples, scales = self.size(f"{path}.attention_weights.weight"), self.tensors.get(path + _POINTS)
        if scales is None and not required:
            return (samples // (levels * heads),) * levels
        self.size(path + _POINTS)
        given, found = cast(Tensor, scales).flatten().tolist(), list[int]()
        while sum(found) < len(given):
            share = given[sum(found)]
            found.append(round(1 / share) if 0 < share <= 1 else len(given) + 1)
        if len(found) != levels or sum(found) * heads != samples:
            why = f"{len(found)} levels with {found} points and {heads} heads do not give its {samples} samples"
            raise ValueError(f"{self.where}: '{path}': {why} in {levels} levels")
        return tuple(found)

    def constant(self, name: str) -> float:
        """Takes out the number that the decoder and its layers both hold."""
        found = [
            self.tensors.pop(each) for each in (f"decoder.{name}", f"model.decoder.{name}") if each in self.tensors
        ]
        if not found:
            raise ValueError(f"{self.where}: the tensor 'decoder.{name}' is missing")
        if any(each.numel() != 1 or not 0 < each.item() < math.inf for each in found) or len({*map(float, found)}) > 1:
            raise ValueError(f"{self.where}: the tensors 'decoder.{name}' must be the same positive number")
        return float(found[0])

    def hgnet(self) -> str:
        """The name of an HGNetV2."""
        stages = [f"model.backbone.model.encoder.stages.{stage}.blocks." for stage in range(4)]
        widths = [self.size(f"{stage}0.aggregation.1.convolution.weight") for stage in stages]
        sizes = widths, [self.depth(stage) for stage in stages], [self.depth(f"{stage}0.layers.") for stage in stages]
        if (name := hgnet_of(*sizes)) is None:
            known = ", ".join(HGNETS.values())
            raise ValueError(f"{self.where}: an HGNetV2 with {widths} channels; the zoo supports {known}")
        return name

    def ffn(self, path: str, activation: str) -> str:
        """The feed-forward layer of a block."""
        name = f"{path}.mlp.fc1.weight"
        return ffn_of(self.size(name), activation, self.size(name, 1))


def _detr(facts: _Facts, heads: int, queries: int, dilated: bool) -> tuple[DetectorConfig, Named]:
    backbone = "model.backbone.model.layer"
    basic = f"{backbone}1.0.conv3.weight" not in facts.tensors
    net = facts.resnet([f"{backbone}{stage}." for stage in (1, 2, 3, 4)], basic)
    config = DETRConfig(
        trunk=f"timm:{net}" + "(output_stride=16)" * dilated,
        trunk_norm="frozen",
        dim=facts.size("model.input_projection.weight"),
        heads=heads,
        depth=facts.depth("model.decoder.layers."),
        encoder_depth=facts.depth("model.encoder.layers."),
        queries=facts.size("model.query_position_embeddings.weight"),
        classes=facts.size("class_labels_classifier.weight") - 1,
        ffn=facts.ffn("model.encoder.layers.0", "relu"),
        decoder_ffn=facts.ffn("model.decoder.layers.0", "relu"),
        padding="published",
        dropout=0.1,
    )
    return config, str


def _rtdetr(facts: _Facts, heads: int, queries: int, dilated: bool) -> tuple[DetectorConfig, Named]:
    if dilated:
        raise ValueError(f"{facts.where}: dilated is for a DETR, and this is another detector")
    fine = any(name.startswith("model.decoder.pre_bbox_head.") for name in facts.tensors)
    dim, inside = facts.size("model.enc_output.0.weight"), facts.size("model.encoder_input_proj.0.0.weight")
    levels = facts.depth("model.encoder_input_proj.")
    points = facts.points("model.decoder.layers.0.encoder_attn", levels, heads, fine)
    if any(name.startswith("model.backbone.model.embedder.stem1.") for name in facts.tensors):
        counted = any(re.match(r"model\.backbone\..*\.num_batches_tracked$", name) for name in facts.tensors)
        trunk, named = {"trunk": f"timm:{facts.hgnet()}", "trunk_norm": "batch" if counted else "frozen"}, hgnet_name
    else:
        backbone = "model.backbone.model.encoder.stages."
        basic = f"{backbone}0.layers.0.layer.2.convolution.weight" not in facts.tensors
        net = facts.resnet([f"{backbone}{stage}.layers." for stage in range(4)], basic)
        trunk = {"trunk": f"timm:{net}d" + "(shortcut=True)" * basic, "trunk_norm": "batch" if basic else "frozen"}
        named = partial(resnet_name, deep=True, basic=basic)
    config = RTDETRConfig(
        dim=dim,
        encoder_dim=0 if inside == dim else inside,
        strides=_STRIDES[-levels:],
        heads=heads,
        depth=facts.depth("model.decoder.layers."),
        encoder_depth=facts.depth("model.encoder.aifi.0.layers."),
        queries=queries,
        classes=facts.size("model.enc_score_head.weight"),
        ffn=facts.ffn("model.encoder.aifi.0.layers.0", "gelu"),
        decoder_ffn=facts.ffn("model.decoder.layers.0", "relu"),
        denoising="model.denoising_class_embed.weight" in facts.tensors,
        **trunk,
        **(_fine if fine else _plain)(facts, inside, points),
    )
    return config, named


def _plain(facts: _Facts, inside: int, points: tuple[int, ...]) -> dict[str, Any]:
    """The fields that are an RT-DETRv2's own."""
    block = "model.encoder.fpn_blocks.0"
    return {
        "neck_depth": facts.depth(f"{block}.bottlenecks."),
        "neck_ratio": facts.size(f"{block}.conv1.conv.weight") / inside,
        "cross": spelled("deformable", _points(points)),
    }


def _fine(facts: _Facts, inside: int, points: tuple[int, ...]) -> dict[str, Any]:
    """The fields that are a D-FINE's own."""
    if (up := facts.constant("up")) != 0.5:
        raise ValueError(f"{facts.where}: the tensor 'decoder.up' is {up:g}; the zoo supports 0.5")
    block, scale = "model.encoder.fpn_blocks.0.csp_rep1", facts.constant("reg_scale")
    bins = facts.size("bbox_embed.0.layers.2.weight") // 4 - 1
    options = [f"bins={bins}"] * (bins != 32) + [f"scale={scale}"] * (scale != 4.0)
    return {
        "neck": "elan",
        "neck_depth": facts.depth(f"{block}.bottlenecks."),
        "neck_ratio": 2 * facts.size(f"{block}.conv1.conv.weight") / inside,
        "cross": spelled("deformable", [*_points(points), "project=False", "gated=True"]),
        "box": spelled("distribution", options),
    }


def _points(points: tuple[int, ...]) -> list[str]:
    equal = len({*points}) == 1
    return [] if equal and points[0] == 4 else [f"points={points[0] if equal else points}"]
