"""A checkpoint's model with some fields of its config replaced, for fine-tuning."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.config import field_names
from zoo.models.base import Model
from zoo.text import unknown
from zoo.weights.load import Checkpoint


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
