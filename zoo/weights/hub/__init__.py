"""Checkpoints on the Hugging Face Hub: downloaded by name, published after their probe has passed."""

from zoo.weights.hub.downloading import download
from zoo.weights.hub.publishing import publish

__all__ = ["download", "publish"]
