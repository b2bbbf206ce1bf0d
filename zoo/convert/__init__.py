"""Models of other libraries as models of this one, weights and all."""

from zoo.convert.timm import from_timm

__all__ = ["from_timm"]
