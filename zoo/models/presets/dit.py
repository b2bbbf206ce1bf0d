"""DiT (Peebles and Xie 2023, arXiv:2212.09748), JiT (Li and He 2025, arXiv:2511.13720), LightningDiT (Yao et
al. 2025, arXiv:2501.01423), and small ones for images."""

from dataclasses import replace

from zoo.models.dit import DiTConfig

_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_JIT = DiTConfig(
    dim=768,
    depth=12,
    heads=12,
    image=256,
    channels=3,
    patch=16,
    bottleneck=128,
    class_tokens=32,
    class_block=4,
    time="sincos(scale=1.0, reverse=True)",
    prediction="data",
    mixer="softmax(qk_norm='rmsnorm')",
    ffn="swiglu(multiple=1)",
    norm="rmsnorm",
    position="rope(absolute=True)",
)
_LIGHTNING = DiTConfig(
    dim=1152,
    depth=28,
    heads=16,
    image=16,
    channels=32,
    patch=1,
    time="sincos(scale=1.0, reverse=True)",
    ffn="swiglu(multiple=1)",
    norm="rmsnorm",
    position="rope(absolute=True)",
)
_DDT = replace(_LIGHTNING, position="rope", mixer="softmax(qk_norm='rmsnorm')")
_SMALL = DiTConfig(dim=192, depth=12, heads=3, image=32, channels=3, patch=4, classes=10)

ABOUT = {
    "dit": "DiT (Peebles and Xie 2023, arXiv:2212.09748)",
    "ddt": "DDT (Wang et al. 2025, arXiv:2504.05741)",
    "dit_dh": "DiT-DH (Zheng et al. 2025, arXiv:2510.11690) for latents of 768 channels",
    "dit_micro": "DiT (Peebles and Xie 2023, arXiv:2212.09748) for images of 8 to 32 pixels, with flow matching",
    "dit_tiny": "DiT (Peebles and Xie 2023, arXiv:2212.09748) for images of 32 to 64 pixels, with flow matching",
    "jit": "JiT (Li and He 2025, arXiv:2511.13720)",
    "lightningdit": "LightningDiT (Yao et al. 2025, arXiv:2501.01423) for latents of 32 channels",
}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, DiTConfig] = {
    f"dit_{size}_{patch}": DiTConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        patch=patch,
        time="sincos(count=True)",
        schedule="ddpm",
        prediction="noise",
        variance=True,
    )
    for size, (dim, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
PRESETS |= {
    "jit_b_16": _JIT,
    "jit_l_16": replace(_JIT, dim=1024, depth=24, heads=16, class_block=8),
    "jit_h_16": replace(_JIT, dim=1280, depth=32, heads=16, bottleneck=256, class_block=10),
    "lightningdit_xl_1": _LIGHTNING,
    "ddt_xl_2": replace(_DDT, depth=22, head_depth=6, image=32, channels=4, patch=2),
    "dit_dh_xl_1": replace(_DDT, head_depth=2, head_dim=2048, channels=768),
    "lightningdit_b_1": replace(_LIGHTNING, dim=768, depth=12, heads=12),
    "dit_tiny": _SMALL,
    "dit_micro": replace(_SMALL, dim=96, depth=6, image=8, channels=1, patch=2),
}
