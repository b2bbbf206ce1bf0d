"""Detectors of transformers with random weights, to compare with ours."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    HGNetV2Config,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from helpers import prepared

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "encoder_attention_heads": 4, "num_queries": 10}
SMALL |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
NAMES = {0: "N/A", 1: "cat", 2: "N/A", 3: "dog"}  # as COCO's ids have holes
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
DEPTHS = {"basic": [2, 2, 2, 2], "bottleneck": [3, 4, 6, 3]}


def detr(**options: Any) -> Any:
    """transformers' DETR with random weights and labels with holes."""
    config = DetrConfig(**SMALL, **options)
    config.id2label = NAMES  # pyright: ignore[reportAttributeAccessIssue]
    return prepared(DetrForObjectDetection(config))


def timm(name: str = "resnet18", **options: Any) -> dict[str, Any]:
    return {"backbone": name, "use_pretrained_backbone": False, "use_timm_backbone": True} | options


def rtdetr(
    layer: str = "basic", kind: Any = RTDetrV2Config, model: Any = RTDetrV2ForObjectDetection, inside: int = 32
) -> Any:
    """transformers' RT-DETR with random weights."""
    backbone = {"layer_type": layer, "depths": DEPTHS[layer], "hidden_sizes": WIDTHS[layer]}
    sizes = SMALL | {
        "encoder_hidden_dim": inside,
        "decoder_in_channels": [inside] * 3,
        "encoder_in_channels": WIDTHS[layer][1:],
    }
    config = RTDetrResNetConfig(**backbone, out_features=["stage2", "stage3", "stage4"])
    return prepared(model(kind(**sizes, backbone_config=config, num_labels=5, hidden_expansion=0.5)))


def written(model: Any, folder: Path, version: int) -> Path:
    """A folder as version 4 or 5 of transformers leaves it."""
    model.save_pretrained(folder)
    assert any("out_proj" in name for name in load_file(folder / "model.safetensors"))  # the layout of version 4
    if version == 5:
        state = {name: each.contiguous().clone() for name, each in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
    return folder


def padded_batch() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, 75, 96, dtype=torch.bool)
    mask[0], mask[1, :40, :70] = True, True
    return torch.randn(2, 3, 75, 96, dtype=torch.float64) * mask[:, None], mask


@torch.no_grad()
def compare_detr(theirs: Any, model: Any, rows: list[int]) -> None:
    images, mask = padded_batch()
    wanted, found = theirs(images, pixel_mask=mask.long()), model.double()(images, mask)
    assert (found["logits"] - wanted.logits[..., rows]).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


@torch.no_grad()
def compare_rtdetr(theirs: Any, model: Any) -> None:
    images = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    wanted, found = theirs(images), model.double()(images)
    assert (found["logits"] - wanted.logits).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


# HGNetV2: channels of the stem, in front of the stages, within and behind them, blocks, and layers of a block.
HGNETS = {
    "b0": ([3, 16, 16], [16, 64, 256, 512], [16, 32, 64, 128], [64, 256, 512, 1024], [1, 1, 2, 1], 3),
    "b2": ([3, 24, 32], [32, 96, 384, 768], [32, 64, 128, 256], [96, 384, 768, 1536], [1, 1, 3, 1], 4),
    "b4": ([3, 32, 48], [48, 128, 512, 1024], [48, 96, 192, 384], [128, 512, 1024, 2048], [1, 1, 3, 1], 6),
    "b5": ([3, 32, 64], [64, 128, 512, 1024], [64, 128, 256, 512], [128, 512, 1024, 2048], [1, 2, 5, 2], 6),
}
# The published D-FINE: trunk, channels, decoder layers, expansion, depth, points, feed-forward, and scale.
DFINES = {
    "dfine_n": ("b0", 128, 128, 3, 0.34, 0.5, [6, 6], 512, 4.0),
    "dfine_s": ("b0", 256, 256, 3, 0.5, 0.34, [3, 6, 3], 1024, 4.0),
    "dfine_m": ("b2", 256, 256, 4, 1.0, 0.67, [3, 6, 3], 1024, 4.0),
    "dfine_l": ("b4", 256, 256, 6, 1.0, 1.0, [3, 6, 3], 1024, 4.0),
    "dfine_x": ("b5", 384, 256, 6, 1.0, 1.0, [3, 6, 3], 2048, 8.0),
}


def dfine(name: str, **options: Any) -> Any:
    """The config of a published D-FINE in transformers."""
    net, inside, dim, layers, expansion, depth, points, width, scale = DFINES[name]
    stem, before, within, behind, blocks, each = HGNETS[net]
    levels = len(points)
    backbone = HGNetV2Config(
        stem_channels=stem,
        stage_in_channels=before,
        stage_mid_channels=within,
        stage_out_channels=behind,
        stage_num_blocks=blocks,
        stage_numb_of_layers=[each] * 4,
        hidden_sizes=behind,
        depths=blocks,
        use_learnable_affine_block=net in ("b0", "b2"),
        out_features=["stage2", "stage3", "stage4"][-levels:],
    )
    sizes: dict[str, Any] = {"backbone_config": backbone, "encoder_in_channels": behind[-levels:], "d_model": dim}
    sizes |= {"feat_strides": [8, 16, 32][-levels:], "num_feature_levels": levels, "decoder_n_points": points}
    sizes |= {"encode_proj_layers": [levels - 1], "encoder_hidden_dim": inside, "encoder_ffn_dim": width}
    sizes |= {"decoder_in_channels": [inside] * levels, "decoder_ffn_dim": min(width, 1024), "reg_scale": scale}
    sizes |= {"decoder_layers": layers, "hidden_expansion": expansion, "depth_mult": depth, "num_labels": 80}
    return DFineConfig(**sizes | options)
