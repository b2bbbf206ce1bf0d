"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929), DeiT (Touvron et al. 2021, arXiv:2012.12877),
iLLaMA (Wang et al. 2024, arXiv:2404.06773) and CRATE (Yu et al. 2023, arXiv:2306.01129)."""

from dataclasses import replace

from zoo.models.vit import ViTConfig


def _deit(dim: int, heads: int) -> ViTConfig:
    return ViTConfig(dim=dim, depth=12, heads=heads, position="learned", pool="token", class_token=True)


ABOUT = {
    "vit": "Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)",
    "deit": "DeiT without distillation (Touvron et al. 2021, arXiv:2012.12877)",
    "illama": "iLLaMA: a ViT of the parts of LLaMA's decoder (Wang et al. 2024, arXiv:2404.06773)",
    "crate": "CRATE, without the norms around its patch embedding (Yu et al. 2023, arXiv:2306.01129)",
}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, ViTConfig] = {
    "vit_micro": ViTConfig(dim=96, depth=6, heads=3, image=32, patch=4),
    "vit_tiny": ViTConfig(dim=192, depth=12, heads=3),
    "vit_small": ViTConfig(dim=384, depth=12, heads=6),
    "vit_base": ViTConfig(dim=768, depth=12, heads=12),
    "vit_large": ViTConfig(dim=1024, depth=24, heads=16),
    "deit_tiny": _deit(192, 3),
    "deit_small": _deit(384, 6),
    "deit_base": _deit(768, 12),
    "illama_tiny": replace(_deit(192, 3), causal=True, mixer="causal", norm="rmsnorm", ffn="swiglu", position="rope"),
    "crate_tiny": replace(_deit(384, 6), mixer="mssa", ffn="ista", placement="crate"),
}
