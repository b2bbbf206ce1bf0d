"""All models by name. A new family is a file in this folder, one for its presets, and three rows here."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import zoo
from zoo.config import Config, field_names
from zoo.models import conformer, detr, dimr, dit, pyramid, rtdetr, udit, vit
from zoo.models.base import Model, count_parameters
from zoo.models.presets import conformer as conformer_presets
from zoo.models.presets import detr as detr_presets
from zoo.models.presets import dimr as dimr_presets
from zoo.models.presets import dit as dit_presets
from zoo.models.presets import pyramid as pyramid_presets
from zoo.models.presets import rtdetr as rtdetr_presets
from zoo.models.presets import udit as udit_presets
from zoo.models.presets import vit as vit_presets
from zoo.tensors import shapes_alone
from zoo.text import unknown

_PRESETS = (vit_presets, pyramid_presets, conformer_presets, detr_presets, rtdetr_presets)
_PRESETS += (dit_presets, udit_presets, dimr_presets)
PRESETS: dict[str, Config] = {name: config for each in _PRESETS for name, config in each.PRESETS.items()}
ABOUT: dict[str, str] = {name: about for each in _PRESETS for name, about in each.ABOUT.items()}
FAMILIES: dict[str, type[Config]] = {
    "vit": vit.ViTConfig,
    "pyramid": pyramid.PyramidConfig,
    "conformer": conformer.ConformerConfig,
    "detr": detr.DETRConfig,
    "rtdetr": rtdetr.RTDETRConfig,
    "dit": dit.DiTConfig,
    "udit": udit.UDiTConfig,
    "dimr": dimr.DiMRConfig,
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that create_model takes, those that match a shell pattern such as "vit_*"."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def configure(name: str, **choices: Any) -> Config:
    """The config of a preset with some of its fields replaced; ValueError if a name or a choice is invalid."""
    if name not in PRESETS:
        raise ValueError(unknown("model", name, PRESETS))
    config = PRESETS[name]
    choices = config.migrated(choices, config)
    known = field_names(config)
    if wrong := [choice for choice in choices if choice not in known]:
        raise ValueError(unknown(f"field of {name}", wrong[0], known))
    return replace(config, **choices)


def create_model(name: str, pretrained: str | None = None, **choices: Any) -> nn.Module:
    """Builds a preset, some of its fields replaced: create_model("vit_small", mixer="sla", norm="prepbn", classes=10).

    `list_models()` lists the names; the fields are those of the family's config. ValueError, in one line, if a name,
    a field or a choice is invalid, or if two choices would ignore each other.

    `pretrained` names a checkpoint of the preset: create_model("vit_micro", pretrained="digits", classes=37) is
    `zoo.load_model("vit_micro.digits", classes=37)`, with the same options and errors.
    """
    if isinstance(pretrained, str):
        return zoo.load_model(f"{name}.{pretrained}", **choices)
    if pretrained is not None:
        raise ValueError("pretrained is the name of a checkpoint, as in create_model('vit_micro', pretrained='digits')")
    _check_habits(name, choices)
    return configure(name, **choices).build()


# timm's names of some of our fields.
HABITS = {"num_classes": "classes", "img_size": "image", "in_chans": "channels", "patch_size": "patch"}
HABITS |= {"embed_dim": "dim", "num_heads": "heads", "drop_path_rate": "drop_path", "drop_rate": "dropout"}


def _check_habits(name: str, choices: Mapping[str, Any]) -> None:
    """ValueError, with the right call, for arguments that users of other libraries expect to work."""
    if name not in PRESETS and name.partition(".")[0] in PRESETS and "." in name:
        raise ValueError(f"'{name}' is the name of a checkpoint, not of a model; zoo.load_model('{name}') reads it")
    for choice in choices:
        if choice.startswith("pretrained"):
            raise ValueError(
                f"create_model has no option '{choice}'; zoo.load_model(NAME) reads a checkpoint with its weights"
            )
        if choice in HABITS:
            raise ValueError(f"'{name}' has no field '{choice}'; did you mean {HABITS[choice]}?")


def family_of(model: object) -> str | None:
    """The name of a model's family; None if it is not a model of the zoo."""
    config = model.config if isinstance(model, Model) else None
    return next((name for name, kind in FAMILIES.items() if type(config) is kind), None)


def describe(name: str, **choices: Any) -> dict[str, Any]:
    """The facts of a preset for `zoo list` and `zoo info`, some of its fields replaced: `about`, `family`,
    `parameters`, and `fields`, each with its value as text; stages separated by commas, turns by slashes.
    """
    config = configure(name, **choices)
    with shapes_alone():
        number = count_parameters(config.build())
    begins = max((each for each in ABOUT if f"{name}_".startswith(f"{each}_")), key=len, default=None)
    return {
        "about": ABOUT[begins] if begins else "",
        "family": next((family for family, kind in FAMILIES.items() if type(config) is kind), None),
        "parameters": number,
        "fields": {field: config.described(field) for field in field_names(config)},
    }
