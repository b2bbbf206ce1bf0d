"""timm."""

from zoo.convert.timm.vit import from_timm

__all__ = ["from_timm"]
