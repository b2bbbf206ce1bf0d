"""Operators behind the mixers: one public function each, the reference in plain PyTorch beside the fast forms."""

from zoo.kernels.deformable import deformable, multiscale
from zoo.kernels.delta import delta_attention
from zoo.kernels.linear import exponential_attention, feature_attention, linear_attention, mean_attention
from zoo.kernels.suppression import suppressed

__all__ = [
    "deformable",
    "delta_attention",
    "exponential_attention",
    "feature_attention",
    "linear_attention",
    "mean_attention",
    "multiscale",
    "suppressed",
]
