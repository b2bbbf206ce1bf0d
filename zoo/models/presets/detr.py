"""DETR (Carion et al. 2020, arXiv:2005.12872) on ResNets.

dc5 has a map of stride 16: the last stage is dilated. For the published weights, padding is to be `published`; the dc5
ones were trained on single images, and lose about 10 AP on padded ones.
"""

from dataclasses import replace

from zoo.models.detr import DETRConfig

_R50 = DETRConfig(trunk="timm:resnet50", trunk_norm="frozen", dropout=0.1)

ABOUT = {"detr": "DETR (Carion et al. 2020, arXiv:2005.12872)"}

PRESETS: dict[str, DETRConfig] = {
    "detr_r50": _R50,
    "detr_r50_dc5": replace(_R50, trunk="timm:resnet50(output_stride=16)"),
    "detr_r101": replace(_R50, trunk="timm:resnet101"),
}
