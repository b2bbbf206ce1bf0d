"""Checkpoints: folders with a model's config, its weights, a card, and a probe that checks that the model still
computes the same. Only JSON and safetensors are read; no code from a file is ever run."""

from zoo.weights.adapt import Loaded, adapt
from zoo.weights.converting import share_kv_heads, to_rmsnorm
from zoo.weights.figures import Figure
from zoo.weights.files import FILES, CheckpointError
from zoo.weights.grafting import Graft, graft
from zoo.weights.load import load_checkpoint, load_model
from zoo.weights.read import Checkpoint
from zoo.weights.save import save_model

__all__ = ["FILES", "Checkpoint", "CheckpointError", "Figure", "Graft", "Loaded", "adapt", "graft", "load_checkpoint"]
__all__ += ["load_model", "save_model", "share_kv_heads", "to_rmsnorm"]
