"""timm."""

from zoo.convert.timm.preprocess import timm_preprocess
from zoo.convert.timm.vit import from_timm

__all__ = ["from_timm", "timm_preprocess"]
