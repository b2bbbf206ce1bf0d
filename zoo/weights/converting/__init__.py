"""A trained model turned into one with other layers."""

from zoo.weights.converting.kv_heads import share_kv_heads
from zoo.weights.converting.norms import to_rmsnorm

__all__ = ["share_kv_heads", "to_rmsnorm"]
