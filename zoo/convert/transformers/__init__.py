"""Hugging Face's transformers."""

from zoo.convert.transformers.parakeet import from_transformers

__all__ = ["from_transformers"]
