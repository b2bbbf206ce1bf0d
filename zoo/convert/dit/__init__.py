"""Checkpoints of diffusion transformers as ours, and back: DiT, SiT and REPA, LightningDiT, JiT, and diffusers' DiT."""

from zoo.convert.dit.diffusers import from_diffusers
from zoo.convert.dit.jit import from_jit, to_jit
from zoo.convert.dit.lightning import from_lightningdit, to_lightningdit
from zoo.convert.dit.original import from_dit, to_dit

__all__ = ["from_diffusers", "from_dit", "from_jit", "from_lightningdit", "to_dit", "to_jit", "to_lightningdit"]
