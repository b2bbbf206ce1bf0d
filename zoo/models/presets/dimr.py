"""DiMR (Liu et al. 2024, arXiv:2406.09416). The published models were trained with the noise schedule of Stable
Diffusion, their gains see the time in place of the noise ratio, and their queries, keys and values have no bias."""

from zoo.models.dimr import DiMRConfig

_SIZES = {"xl": ((960, 480), (39, 21)), "g": ((1152, 576), (57, 29))}

ABOUT = {"dimr": "DiMR with two resolutions (Liu et al. 2024, arXiv:2406.09416)"}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, DiMRConfig] = {
    f"dimr_{size}_2r": DiMRConfig(dim=dim, depth=depth, heads=(16, 8), schedule="ddpm", prediction="noise")
    for size, (dim, depth) in _SIZES.items()
}
"""The sizes and choices of published models, by name."""
