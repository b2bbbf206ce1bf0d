"""NVIDIA NeMo."""

from zoo.convert.nemo.archive import from_nemo

__all__ = ["from_nemo"]
