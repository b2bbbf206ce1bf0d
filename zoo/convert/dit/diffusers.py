"""The state dict of diffusers' DiTTransformer2DModel."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.convert.dit.original import converted
from zoo.models.dit import DiT

_NAMES = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.attn."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)


def from_diffusers(
    state: Mapping[str, Tensor], *, heads: int | None = None, image: int = 32, shift: float = 0.0
) -> DiT:
    """Converts the state dict of diffusers' DiTTransformer2DModel.

    diffusers computes another function than the original with the same weights: its frequencies of the time are
    those of shift=1, and the eps of the second norm of a block is 1e-5, here 1e-6. Its blocks each hold the
    embeddings of time and label, which must be equal. `model.preprocess` is as in `from_dit`.

    Args:
        state: the state dict.
        heads: attention heads, if the width is not a published one.
        image: side of the latents.
        shift: 1 for the times of diffusers, 0 for those that the weights were trained with.

    Raises:
        ValueError: in one line: a tensor is missing, unused or of a wrong shape, or the embeddings differ.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.*)", name)
        if block is not None:
            first = state.get(f"transformer_blocks.0.norm1.emb.{block[2]}")
            if first is None or not torch.equal(first, tensor):
                raise ValueError(f"the state dict: '{name}' differs from that of block 0")
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    for name in [name for name in found if ".attn.to_q." in name]:
        parts = [name.replace(".to_q.", f".to_{each}.") for each in "qkv"]
        if missing := [part for part in parts if part not in found]:
            raise ValueError(f"the state dict: the tensor '{missing[0]}' is missing")
        found[name.replace(".to_q.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return converted(found, "dit", heads, image, "the state dict", shift)
