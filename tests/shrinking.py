"""Every preset with small sizes: choices, layouts, stages and options stay, so that each kind of tensor is there."""

import re
from typing import Any

import torch

import zoo
from helpers import randomise
from zoo.models import PRESETS
from zoo.models.conformer_config import ConformerConfig
from zoo.models.detection import DetectorConfig
from zoo.models.dimr import DiMRConfig
from zoo.models.dit import DiTConfig
from zoo.models.pyramid import PyramidConfig
from zoo.models.udit import UDiTConfig
from zoo.models.vit import ViTConfig

CLASSES = 3
PYRAMID = {"dim": (16, 16, 32, 32), "depth": (2, 2, 2, 2), "heads": (2, 2, 4, 4)}
VIT = {"dim": 16, "depth": 3, "heads": 2}


def _trunk(name: str) -> str:
    """A small trunk of the same kind."""
    word = re.split(r"\W", name.removeprefix("timm:"), maxsplit=1)[0]
    if word.startswith("resnet"):  # that of timm's tests cannot be dilated
        return f"timm:resnet26{options}" if (options := name.removeprefix(f"timm:{word}")) else "timm:test_resnet"
    if word.startswith("hgnet"):
        return "timm:hgnetv2_b0"
    sizes = VIT if isinstance(PRESETS[word], ViTConfig) else PYRAMID | {"depth": (1, 1, 1, 1)}
    return f"{word}({', '.join(f'{field}={value}' for field, value in sizes.items())})"


def sizes_of(name: str) -> dict[str, Any]:
    """Fields that make a preset small."""
    match PRESETS[name]:
        case ViTConfig(patch=patch):
            return VIT | {"image": 2 * patch, "classes": CLASSES}
        case PyramidConfig():
            return PYRAMID | {"image": 64, "classes": CLASSES}
        case ConformerConfig(strided=strided, head=head):
            found: dict[str, Any] = {"dim": 16, "depth": 4, "heads": 2, "mels": 16, "vocabulary": 6}
            if strided:
                found |= {"widths": (16, 24, 32), "strided": (1, 3), "depth": 6}
            return found | ({"head": "transducer(hidden=16)"} if head != "ctc" else {})
        case DetectorConfig(trunk=trunk) as config:
            found = {"trunk": _trunk(trunk), "dim": 16, "depth": 2, "heads": 2, "queries": 12, "image": 64}
            found |= {"encoder_depth": min(2, config.encoder_depth), "classes": CLASSES}
            return found | ({"encoder_dim": 24} if getattr(config, "encoder_dim", 0) else {})
        case DiTConfig(patch=patch) as config:
            found = {"dim": 16, "depth": 3, "heads": 2, "image": 4 * patch, "classes": CLASSES}
            small = {"channels": 4, "bottleneck": 8, "class_tokens": 2, "class_block": 1, "head_depth": 1}
            small |= {"head_dim": 24}
            return found | {field: value for field, value in small.items() if getattr(config, field) > value}
        case UDiTConfig(dim=dim) as config:
            widths = tuple(8 * width // dim[0] for width in dim)
            return {"dim": widths, "depth": (1,) * 5, "heads": (2,) * 5, "image": 8 * config.patch, "classes": CLASSES}
        case DiMRConfig():
            return {"dim": (32, 16), "depth": (3, 3), "heads": (2, 2), "image": 8, "classes": CLASSES}
    raise AssertionError(f"no sizes for {name}")


def shrunk(name: str, **more: Any) -> Any:
    """A small model of a preset in eval mode; no tensor is constant, as gains, biases and statistics are at the start,
    and the norms of training are behind their blend."""
    torch.manual_seed(0)
    model = randomise(zoo.create_model(name, **sizes_of(name) | more))
    zoo.advance(model, 1.0)
    return model.eval()
