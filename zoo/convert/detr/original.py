"""The checkpoints of the original DETR and RT-DETRv2 as ours, from the names and shapes of their tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.detection import RESNETS, ConvertedDetector, Named, build, ffn_of, resnet_name, resnet_of
from zoo.convert.source import refusal
from zoo.models.detection import DetectorConfig
from zoo.models.detr import DETRConfig
from zoo.models.rtdetr import RTDETRConfig
from zoo.outputs.label_map import LabelMap
from zoo.text import one_line

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
    (r"^(model\.backbone\.model\..*)\.conv\.", r"\1.convolution."),
    (r"^(model\.backbone\.model\..*)\.norm\.", r"\1.normalization."),
    (r"^(en|de)coder\.input_proj\.(\d)\.(conv|0)\.", r"model.\1coder_input_proj.\2.0."),
    (r"^(en|de)coder\.input_proj\.(\d)\.(norm|1)\.", r"model.\1coder_input_proj.\2.1."),
    (r"^encoder\.encoder\.0\.", "model.encoder.aifi.0."),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.decoder\.", "model.decoder."),
    (r"^decoder\.dec_score_head\.", "class_embed."),
    (r"^decoder\.dec_bbox_head\.", "bbox_embed."),
    (r"^decoder\.enc_output\.(proj|0)\.", "model.enc_output.0."),
    (r"^decoder\.enc_output\.(norm|1)\.", "model.enc_output.1."),
    (r"^decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"^decoder\.(?=enc_|denoising)", "model."),
    (r"\.cross_attn\.", ".encoder_attn."),
    *_SHARED,
)
_DROPPED = (".num_points_scale", "decoder.anchors", "decoder.valid_mask")


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
    """Converts a checkpoint of the original code of DETR or RT-DETRv2, with equal outputs in eval mode.

    A DETR has padding="published", as in `from_transformers`. Of an RT-DETRv2 the averaged weights are taken if there
    are any; its decoder must sample bilinearly. Backbones are resnets.

    Args:
        checkpoint: the file, which is read without running code, or a state dict.
        labels: categories of the classes that are kept, each with the id that is its row of the class heads: for the
            published DETR, the ids of COCO. None keeps all rows.
        heads: attention heads.
        queries: queries of an RT-DETRv2; a DETR's are in its file.
        dilated: whether the last stage of a DETR's backbone is dilated (DC5), which the file does not show.

    Returns:
        The model in eval mode, no preprocessing, and the labels.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    where = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint).expanduser())
    classic = any(name.startswith("transformer.") for name in state)
    if not classic and not any(name.startswith("decoder.dec_score_head.") for name in state):
        raise ValueError(
            f"{where} is neither a DETR nor an RT-DETRv2; their tensors are named transformer. or decoder."
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
    return ConvertedDetector(build(config, tensors, where, trunk, rows, count + classic), None, labels)


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in a file of PyTorch, of which only tensors and plain values are read."""
    import argparse

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the system, of zip files, and of what the file asks for
        raise ValueError(one_line(f"{path} cannot be read: {refusal(error)}", 300)) from error
    for key in ("ema", "module", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"{path} holds no state dict; DETR's is under 'model', RT-DETRv2's under 'ema' or 'model'")
    return {str(name): tensor for name, tensor in found.items()}


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

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
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
        raise ValueError(f"{facts.where}: dilated is for a DETR, and this is an RT-DETRv2")
    backbone = "model.backbone.model.encoder.stages."
    basic = f"{backbone}0.layers.0.layer.2.convolution.weight" not in facts.tensors
    net = facts.resnet([f"{backbone}{stage}.layers." for stage in range(4)], basic)
    dim = facts.size("model.enc_output.0.weight")
    samples = facts.size("model.decoder.layers.0.encoder_attn.attention_weights.weight")
    points = samples // (3 * heads)
    config = RTDETRConfig(
        trunk=f"timm:{net}d" + "(shortcut=True)" * basic,
        trunk_norm="batch" if basic else "frozen",
        dim=dim,
        heads=heads,
        depth=facts.depth("model.decoder.layers."),
        encoder_depth=facts.depth("model.encoder.aifi.0.layers."),
        queries=queries,
        classes=facts.size("model.enc_score_head.weight"),
        ffn=facts.ffn("model.encoder.aifi.0.layers.0", "gelu"),
        decoder_ffn=facts.ffn("model.decoder.layers.0", "relu"),
        neck_depth=facts.depth("model.encoder.fpn_blocks.0.bottlenecks."),
        neck_ratio=facts.size("model.encoder.fpn_blocks.0.conv1.conv.weight") / dim,
        cross="deformable" if points == 4 else f"deformable(points={points})",
        denoising="model.denoising_class_embed.weight" in facts.tensors,
    )
    return config, partial(resnet_name, deep=True, basic=basic)
