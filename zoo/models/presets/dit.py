"""DiT (Peebles and Xie 2023, arXiv:2212.09748), JiT (Li and He 2025, arXiv:2511.13720), and small ones for images."""

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
_SMALL = DiTConfig(dim=192, depth=12, heads=3, image=32, channels=3, patch=4, classes=10)

ABOUT = {
    "dit": "DiT (Peebles and Xie 2023, arXiv:2212.09748)",
    "dit_micro": "DiT (Peebles and Xie 2023, arXiv:2212.09748) for images of 8 to 32 pixels, with flow matching",
    "dit_tiny": "DiT (Peebles and Xie 2023, arXiv:2212.09748) for images of 32 to 64 pixels, with flow matching",
    "jit": "JiT (Li and He 2025, arXiv:2511.13720)",
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
    "dit_tiny": _SMALL,
    "dit_micro": replace(_SMALL, dim=96, depth=6, image=8, channels=1, patch=2),
}
