"""RT-DETR (Zhao et al. 2024, arXiv:2304.08069; RT-DETRv2, Lv et al. 2024, arXiv:2407.17140) on several trunks, and
D-FINE (Peng et al. 2024, arXiv:2410.13842)."""

from dataclasses import replace

from zoo.models.rtdetr import RTDETRConfig

_R50 = RTDETRConfig(trunk="timm:resnet50d")
_SMALL = replace(_R50, depth=3, neck_ratio=0.5)
_FINE = RTDETRConfig(
    trunk="timm:hgnetv2_b4",
    neck="elan",
    cross="deformable(points=(3, 6, 3), project=False, gated=True)",
    box="distribution",
)

ABOUT = {
    "rtdetr": "RT-DETR (Zhao et al. 2024, arXiv:2304.08069)",
    "dfine": "D-FINE (Peng et al. 2024, arXiv:2410.13842)",
}

PRESETS: dict[str, RTDETRConfig] = {
    "rtdetr_r18": replace(_SMALL, trunk="timm:resnet18d"),
    "rtdetr_r34": replace(_SMALL, trunk="timm:resnet34d", depth=4),
    "rtdetr_r50": _R50,
    "rtdetr_r101": replace(_R50, trunk="timm:resnet101d", encoder_dim=384, ffn=f"mlp(ratio={16 / 3})"),
    "rtdetr_vit_tiny": replace(_SMALL, trunk="vit_tiny"),
    "rtdetr_vit_small": replace(_SMALL, trunk="vit_small"),
    "rtdetr_pool_s12": replace(_SMALL, trunk="poolformer_s12"),
    "rtdetr_dcnv4_tiny": replace(_SMALL, trunk="flash_internimage_t"),
    "rtdetr_micro": RTDETRConfig(
        trunk="flash_internimage_t(dim=(32, 64, 128, 256), depth=(1, 1, 3, 1), heads=(2, 4, 8, 16))",
        dim=128,
        depth=3,
        heads=8,
        image=320,
        queries=100,
        neck_depth=1,
        neck_ratio=0.5,
    ),
    "dfine_n": replace(
        _FINE,
        trunk="timm:hgnetv2_b0",
        strides=(16, 32),
        dim=128,
        depth=3,
        neck_depth=2,
        neck_ratio=0.34,
        cross="deformable(points=(6, 6), project=False, gated=True)",
    ),
    "dfine_s": replace(_FINE, trunk="timm:hgnetv2_b0", depth=3, neck_depth=1, neck_ratio=0.5),
    "dfine_m": replace(_FINE, trunk="timm:hgnetv2_b2", depth=4, neck_depth=2),
    "dfine_l": _FINE,
    "dfine_x": replace(
        _FINE, trunk="timm:hgnetv2_b5", encoder_dim=384, ffn=f"mlp(ratio={16 / 3})", box="distribution(scale=8.0)"
    ),
}
