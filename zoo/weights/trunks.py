"""The weights of an image classifier in the trunk of a detector, or in a teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.models.convolutional import TIMM, convolutional
from zoo.models.trunk import Trunk
from zoo.text import reason
from zoo.weights.load import load_checkpoint


def misfits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The sorted names of the tensors that differ in shape between two state dicts or are in only one."""

    def shape(state: Mapping[str, Tensor], key: str) -> torch.Size | None:
        return state[key].shape if key in state else None

    return sorted(key for key in one.keys() | other.keys() if shape(one, key) != shape(other, key))


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
