"""Converts models of other libraries, with their weights; one folder for each library."""

from zoo.convert.detr import from_detr
from zoo.convert.dico import from_dico, to_dico
from zoo.convert.dit import from_diffusers, from_dit, from_jit, from_lightningdit, to_dit, to_jit, to_lightningdit
from zoo.convert.nemo import from_nemo
from zoo.convert.timm import from_timm, timm_preprocess
from zoo.convert.transformers import from_transformers

__all__ = [
    "from_detr",
    "from_dico",
    "from_diffusers",
    "from_dit",
    "from_jit",
    "from_lightningdit",
    "from_nemo",
    "from_timm",
    "from_transformers",
    "timm_preprocess",
    "to_dico",
    "to_dit",
    "to_jit",
    "to_lightningdit",
]
