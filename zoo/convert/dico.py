"""Checkpoints of DiCo as ours, and the way back."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from zoo.convert.dit.layout import filled, of_stable_diffusion, opened, renamed, shape_of, unchanged
from zoo.models.udit import UDiT, UDiTConfig

_STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
_BLOCK = {
    "steps.0.branch.expand": "conv1",
    "steps.0.branch.conv": "conv2",
    "steps.0.branch.gate": "ca.1",
    "steps.0.branch.out": "conv3",
    "steps.1.branch.expand": "conv4",
    "steps.1.branch.out": "conv5",
    "steps.0.modulation": "adaLN_modulation.1.0",  # the first half of adaLN_modulation.1
    "steps.1.modulation": "adaLN_modulation.1.1",
}
_WHOLE = {
    "stem.conv": "x_embedder.proj",
    "stages.1.down.conv": "down1_2.body.0",
    "stages.2.down.conv": "down2_3.body.0",
    "stages.3.up.conv": "up3_2.body.0",
    "stages.3.up.out": "reduce_chan_level2",
    "stages.4.up.conv": "up2_1.body.0",
    "stages.4.up.out": "reduce_chan_level1",
    "modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.out_proj",
}
for _index in range(3):
    _WHOLE[f"embeddings.{_index}.time.expand"] = f"t_embedder_{_index + 1}.mlp.0"
    _WHOLE[f"embeddings.{_index}.time.out"] = f"t_embedder_{_index + 1}.mlp.2"
    _WHOLE[f"embeddings.{_index}.label_table"] = f"y_embedder.embedding_table_{_index}"
_POINTWISE = re.compile(r"(conv1|ca\.1|conv3|conv4|conv5|reduce_chan_level\d)\.weight$")  # convolutions, here linears


def from_dico(checkpoint: str | Path | Mapping[str, Tensor], *, image: int = 32) -> UDiT:
    """Converts a checkpoint of DiCo (Ai et al. 2025, arXiv:2505.11196); the model gives what theirs gives.

    Time 0 is data here: step k of 0 .. 999 is the time (k + 1) / 1000. `model.preprocess` is as in `from_dit`.

    Args:
        checkpoint: the file, which is read without running code, or a state dict; averaged weights are preferred.
        image: side of the latents.

    Raises:
        ValueError: in one line: the file cannot be read, or a tensor is missing, unused or of a wrong shape.
    """
    state, where = opened(checkpoint, ("ema", "model"))
    model: UDiT = filled(state, _config(state, image, where), _original, where, unchanged)
    model.preprocess = of_stable_diffusion(model.config)
    return model


def to_dico(model: UDiT) -> dict[str, Tensor]:
    """The state dict of a model in DiCo's layout: the inverse of `from_dico`. ValueError if the model is not a DiCo."""
    refused = ValueError("only a model with the stages, blocks and times of DiCo has its layout")
    try:
        found = renamed(model, _original, _squared)
    except KeyError:
        raise refused from None
    config = model.config
    try:
        again = _config(found, config.image, "the model")
    except ValueError:
        raise refused from None
    free = {name: getattr(config, name) for name in ("heads", "drop_path", "dropout")}
    if replace(again, **free) != config:
        raise refused
    return found


def _squared(name: str, tensor: Tensor) -> Tensor:
    """Weights of a linear that is a convolution in DiCo, as those of one."""
    return tensor[:, :, None, None] if _POINTWISE.search(_original(name)) else tensor


def _original(name: str) -> str:
    """DiCo's name of one of our tensors; KeyError if it has none."""
    path, _, leaf = name.rpartition(".")
    if (block := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", path)) is not None:
        if (stage := int(block[1])) >= len(_STAGES):
            raise KeyError(name)
        return f"{_STAGES[stage]}.{block[2]}.{_BLOCK[block[3]]}.{leaf}"
    return f"{_WHOLE[path]}.{leaf}"


def _config(state: Mapping[str, Tensor], image: int, where: str) -> UDiTConfig:
    width, channels, *_ = shape_of(state, "x_embedder.proj.weight", 4, where)
    hidden = shape_of(state, f"{_STAGES[0]}.0.conv4.weight", 4, where)[0]
    dim = (width, 2 * width, 4 * width, 2 * width, 2 * width)
    return UDiTConfig(
        dim=dim,
        depth=tuple(len({name.split(".")[1] for name in state if name.startswith(f"{each}.")}) for each in _STAGES),
        heads=tuple(max(1, each // 32) for each in dim),
        image=image,
        channels=channels,
        classes=shape_of(state, "y_embedder.embedding_table_0.weight", 2, where)[0] - 1,
        ffn=f"mlp(ratio={hidden / width})",
        time="sincos(count=True)",
        schedule="ddpm",
        prediction="noise",
        variance=shape_of(state, "final_layer.out_proj.weight", 4, where)[0] == 2 * channels,
    )
