"""DiCo (Ai et al. 2025, arXiv:2505.11196)."""

from zoo.models.udit import UDiTConfig

_SIZES = {
    "s": (128, (5, 4, 4, 4, 4)),
    "b": (256, (5, 4, 4, 4, 4)),
    "l": (352, (9, 8, 9, 8, 9)),
    "xl": (416, (9, 9, 10, 9, 9)),
}
_WIDTHS = (1, 2, 4, 2, 2)

ABOUT = {
    "dico": "DiCo (Ai et al. 2025, arXiv:2505.11196)",
    "dico_micro": "DiCo (Ai et al. 2025, arXiv:2505.11196) for images of 32 to 64 pixels, with flow matching",
}
"""Descriptions of the presets, by the beginning of their names."""

PRESETS: dict[str, UDiTConfig] = {
    f"dico_{size}": UDiTConfig(
        dim=tuple(dim * width for width in _WIDTHS),
        depth=depth,
        heads=tuple(dim * width // 32 for width in _WIDTHS),
        time="sincos(count=True)",
        schedule="ddpm",
        prediction="noise",
        variance=True,
    )
    for size, (dim, depth) in _SIZES.items()
} | {
    "dico_micro": UDiTConfig(
        dim=(64, 128, 256, 128, 64), depth=(2, 2, 2, 2, 2), heads=(2, 4, 8, 4, 2), channels=3, classes=10, patch=2
    )
}
"""The sizes and choices of published models, by name."""
