"""PoolFormer, ConvFormer and CAFormer (Yu et al. 2022, arXiv:2111.11418, arXiv:2210.13452), DaViT (Ding et al. 2022,
arXiv:2204.03645), FlashInternImage (Xiong et al. 2024, arXiv:2401.06197), and PVT's shape with linear attention (Wang
et al. 2021, arXiv:2102.12122; Guo et al. 2024, arXiv:2405.11582)."""

from dataclasses import replace

from zoo.models.pyramid import PyramidConfig

_METAFORMER = PyramidConfig(
    dim=(64, 128, 320, 512),
    depth=(3, 3, 9, 3),
    heads=(2, 4, 10, 16),
    mixer="sepconv",
    ffn="mlp(activation='star_relu', bias=False)",
    norm="layernorm(bias=False)",
    placement=("pre", "pre", "res_scale", "res_scale"),
    stem="conv(kernel=7, padding=2)",
    reduction="conv(kernel=3, padding=1)",
    head="mlp",
    final_norm="layernorm",
)
_ATTENTION = "softmax(bias=False)"
_POOLFORMER = PyramidConfig(
    dim=(64, 128, 320, 512),
    depth=(2, 2, 6, 2),
    heads=(1, 2, 5, 8),
    mixer="pool",
    norm="groupnorm",
    layer_scale=1e-5,
    stem="conv(kernel=7, padding=2, after=False)",
    reduction="conv(kernel=3, padding=1, before=False)",
    head="linear(mean_first=True)",
    final_norm="layernorm",
)
_DAVIT = ("window(size=7)", "channel")
_INTERNIMAGE = PyramidConfig(
    dim=(64, 128, 256, 512),
    depth=(4, 4, 18, 4),
    heads=(4, 8, 16, 32),
    mixer="dcnv4(bias=False)",
    ffn="mlp(out_bias=False)",
    stem="double",
    reduction="conv(kernel=3, padding=1, after=True, bias=False)",
    head="conv",
)

ABOUT = {
    "poolformer": "PoolFormer (Yu et al. 2022, arXiv:2111.11418)",
    "convformer": "ConvFormer (Yu et al. 2022, arXiv:2210.13452)",
    "caformer": "CAFormer (Yu et al. 2022, arXiv:2210.13452)",
    "davit": "DaViT (Ding et al. 2022, arXiv:2204.03645)",
    "flash_internimage": "FlashInternImage (Xiong et al. 2024, arXiv:2401.06197)",
    "pvt_sla": "PVT (Wang et al. 2021, arXiv:2102.12122) with linear attention (Guo et al. 2024, arXiv:2405.11582)",
}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, PyramidConfig] = {
    "poolformer_s12": _POOLFORMER,
    "poolformer_s24": replace(_POOLFORMER, depth=(4, 4, 12, 4)),
    "convformer_s18": _METAFORMER,
    "caformer_s18": replace(_METAFORMER, mixer=("sepconv", "sepconv", _ATTENTION, _ATTENTION)),
    "davit_tiny": PyramidConfig(
        dim=(96, 192, 384, 768),
        depth=(2, 2, 6, 2),
        heads=(3, 6, 12, 24),
        layout=("conv", "mixer", "conv", "ffn"),
        conv="depthwise",
        mixer=(_DAVIT,) * 4,
        norm="layernorm(eps=1e-05)",
        stem="conv(kernel=7, padding=3)",
        head="linear(mean_first=True)",
    ),
    "flash_internimage_t": _INTERNIMAGE,
    "flash_internimage_s": replace(
        _INTERNIMAGE,
        dim=(80, 160, 320, 640),
        depth=(4, 4, 21, 4),
        heads=(5, 10, 20, 40),
        mixer="dcnv4(local=3, bias=False)",
        placement="res_post",
        layer_scale=1e-5,
        reduction="conv(kernel=3, padding=1, before=False, after=True, bias=False)",
        head="conv(norm_first=False)",
    ),
    "pvt_sla_tiny": PyramidConfig(
        dim=(64, 128, 320, 512),
        depth=(2, 2, 2, 2),
        heads=(1, 2, 5, 8),
        mixer="sla",
        ffn=("mlp(ratio=8.0)", "mlp(ratio=8.0)", "mlp", "mlp"),
        norm="prepbn",
        reduction="conv(before=False, after=True)",
    ),
}
