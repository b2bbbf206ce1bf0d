"""Operators behind the mixers: one public function each, the reference in plain PyTorch beside the fast forms."""

from zoo.kernels.deformable import deformable

__all__ = ["deformable"]
