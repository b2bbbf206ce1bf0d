"""Conformer (Gulati et al. 2020, arXiv:2005.08100), Squeezeformer (Kim et al. 2022, arXiv:2206.00888), Efficient
Conformer (Burchi and Vielzeuf 2021, arXiv:2109.01163) and Fast Conformer (Rekesh et al. 2023, arXiv:2305.05084)."""

from typing import Any

from zoo.models.conformer_config import SQUEEZEFORMER, ConformerConfig


def _conformer(dim: int, depth: int, heads: int, **fields: Any) -> ConformerConfig:
    return ConformerConfig(dim=dim, depth=depth, heads=heads, conv="glu(kernel=31)", **fields)


def _transducer(dim: int, depth: int, heads: int, hidden: int) -> ConformerConfig:
    return _conformer(dim, depth, heads, head=f"transducer(hidden={hidden})", vocabulary=1025)


def _squeezeformer(dim: int, depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        layout=SQUEEZEFORMER,
        conv="swish(kernel=31)",
        placement="scaled",
        subsampling="depthwise4",
        first_norm=True,
        unet=True,
    )


def _efficient(widths: tuple[int, ...], strided: tuple[int, ...], depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(
        dim=widths[0],
        depth=depth,
        heads=heads,
        widths=widths,
        strided=strided,
        mixer=("grouped(size=3)", "relative", "relative"),
        norm="layernorm",
        conv="glu(kernel=15)",
        subsampling="conv2",
        scale_input=False,
        vocabulary=257,
    )


def _fastconformer(dim: int, depth: int, heads: int) -> ConformerConfig:
    return ConformerConfig(dim=dim, depth=depth, heads=heads, conv="glu(kernel=9)", subsampling="depthwise8")


ABOUT = {
    "conformer": "Conformer with an RNN-T head (Gulati et al. 2020, arXiv:2005.08100)",
    "conformer_ctc": "Conformer with a CTC head (Gulati et al. 2020, arXiv:2005.08100)",
    "squeezeformer": "Squeezeformer (Kim et al. 2022, arXiv:2206.00888)",
    "efficient_conformer": "Efficient Conformer (Burchi and Vielzeuf 2021, arXiv:2109.01163)",
    "fastconformer": "Fast Conformer (Rekesh et al. 2023, arXiv:2305.05084)",
}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, ConformerConfig] = {
    "conformer_s": _transducer(144, 16, 4, 320),
    "conformer_m": _transducer(256, 16, 4, 640),
    "conformer_l": _transducer(512, 17, 8, 640),
    "conformer_ctc_s": _conformer(144, 16, 4),
    "conformer_ctc_m": _conformer(256, 16, 4),
    "conformer_ctc_l": _conformer(512, 18, 8),
    "squeezeformer_xs": _squeezeformer(144, 16, 4),
    "squeezeformer_s": _squeezeformer(196, 18, 4),
    "squeezeformer_sm": _squeezeformer(256, 16, 4),
    "squeezeformer_m": _squeezeformer(324, 20, 4),
    "squeezeformer_ml": _squeezeformer(512, 18, 8),
    "squeezeformer_l": _squeezeformer(640, 22, 8),
    "efficient_conformer_s": _efficient((120, 168, 240), (4, 9), 15, 4),
    "fastconformer_s": _fastconformer(176, 16, 4),
    "fastconformer_m": _fastconformer(256, 16, 4),
    "fastconformer_l": _fastconformer(512, 17, 8),
}
