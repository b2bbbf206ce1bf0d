"""All models by name. A new family is a file in this folder and its presets in this table."""

import difflib
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from zoo.config import Config
from zoo.layer import count_parameters
from zoo.models import conformer, pyramid, vit

PRESETS: dict[str, Config] = {**vit.PRESETS, **pyramid.PRESETS, **conformer.PRESETS}
FAMILIES: dict[str, type[Config]] = {
    "vit": vit.ViTConfig,
    "pyramid": pyramid.PyramidConfig,
    "conformer": conformer.ConformerConfig,
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that create_model takes, those that match a shell pattern such as "vit_*"."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def configure(name: str, **choices: Any) -> Config:
    """The config of a preset with some of its fields replaced; ValueError where a name or a choice is wrong."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        raise ValueError(f"there is no model '{name}'; choose from: {', '.join(near or sorted(PRESETS))}")
    config = PRESETS[name]
    known = [field.name for field in fields(config)]
    if unknown := [choice for choice in choices if choice not in known]:
        raise ValueError(f"'{name}' has no field '{unknown[0]}'; it has: {', '.join(known)}")
    return replace(config, **choices)


def create_model(name: str, **choices: Any) -> nn.Module:
    """Builds a preset, some of its fields replaced: create_model("vit_small", mixer="sla", norm="prepbn", classes=10).

    `list_models()` lists the names; the fields are those of the family's config. ValueError, in one line, where a name,
    a field or a choice is wrong, or where two choices would ignore each other.
    """
    return configure(name, **choices).build()


def describe(name: str) -> str:
    """A preset's size and every field of its config, a line each."""
    config = configure(name)
    with torch.device("meta"):
        number = count_parameters(config.build())
    lines = [f"{name}: {number:,} parameters"]
    lines += [f"  {field.name}: {getattr(config, field.name)!r}" for field in fields(config)]
    return "\n".join(lines)
