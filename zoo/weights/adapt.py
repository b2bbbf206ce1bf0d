"""A checkpoint's model with some fields of its config replaced, for fine-tuning."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.config import field_names
from zoo.models.base import Model
from zoo.models.convolutional import TIMM, convolutional
from zoo.models.trunk import Trunk
from zoo.text import reason, unknown
from zoo.weights.load import Checkpoint, load_checkpoint


def misfits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The sorted names of the tensors that differ in shape between two state dicts or are in only one."""

    def shape(state: Mapping[str, Tensor], key: str) -> torch.Size | None:
        return state[key].shape if key in state else None

    return sorted(key for key in one.keys() | other.keys() if shape(one, key) != shape(other, key))


def adapted(start: Checkpoint, choices: dict[str, Any], name: str) -> tuple[Model, list[str]]:
    """The checkpoint's model with some fields of its config replaced, and the names of the weights that start
    untrained, which can only be those of a head.

    ValueError if a choice changes any other weight.
    """
    config = start.model.config
    preset = start.config["preset"]
    choices = config.migrated(choices, config)
    if (asked := choices.pop("name", preset)) != preset:
        raise ValueError(f"{name} was made from {preset}, not from model.backbone.name={asked}")
    known = field_names(config)
    if wrong := [choice for choice in choices if choice not in known]:
        raise ValueError(unknown("field of model.backbone", wrong[0], known))
    wanted = replace(config, **choices)
    if wanted == config:
        start.model.preset = start.model.preprocess = start.model.labels = None  # training sets its own
        start.model.about = {}
        return start.model, []
    if start.config["fused"]:
        raise ValueError(f"{name} is fused, so its config cannot change; start from the unfused one")
    model = wanted.build()
    assert isinstance(model, Model)
    state = start.model.state_dict()
    fresh = misfits(model.state_dict(), state)
    if other := [key for key in fresh if not key.startswith(model.replaceable)]:
        raise ValueError(f"the weights of {name} do not fit model.backbone: '{other[0]}' differs")
    model.load_state_dict({key: value for key, value in state.items() if key not in fresh}, strict=False)
    return model, fresh


def load_trunk(trunk: Trunk, name: str, channels: int) -> None:
    """Gives a detector's trunk the weights of an image classifier.

    Args:
        trunk: the trunk.
        name: a checkpoint of the zoo with the trunk's model; for a trunk of timm, `pretrained` for timm's weights, or a
            file of them.
        channels: channels of the images.

    Raises:
        ValueError: the weights are those of another model.
    """
    if trunk.name.startswith(TIMM):
        options = {} if name == "pretrained" else {"pretrained_cfg_overlay": {"file": name}}
        try:
            source = convolutional(trunk.name.removeprefix(TIMM), channels, pretrained=True, **options)
            trunk.model.net.load_state_dict(source.state_dict())
        except Exception as error:  # of the Hub, the file or the weights
            why = f"cannot be read from {name}: {reason(error)}"
            raise ValueError(f"the weights of trunk '{trunk.name}' {why}") from error
        return
    if name == "pretrained":
        raise ValueError(f"trunk '{trunk.name}' has no published weights; give a checkpoint, or null for random ones")
    found = load_checkpoint(name).model.state_dict()
    wanted = trunk.model.state_dict()
    if wrong := [key for key in misfits(wanted, found) if key in wanted]:
        raise ValueError(f"the weights of {name} do not fit trunk '{trunk.name}': '{wrong[0]}' differs")
    trunk.model.load_state_dict({key: found[key] for key in wanted})
