"""The conversion of diffusers' DiT, which computes another function than the original with the same weights."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from helpers import prepared, relative
from zoo.convert import from_diffusers


def theirs(**options: Any) -> Any:
    given = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    given |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6}
    model: Any = prepared(DiTTransformer2DModel(**given | options)).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


@torch.no_grad()
def test_equal_to_diffusers():
    """With its two deviations: the frequencies of shift=1, and here its second norm has our eps."""
    model = theirs()
    ours = from_diffusers(model.state_dict(), heads=2, image=8, shift=1.0)
    x, steps, labels = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 417, 999]), torch.tensor([0, 3, 10])
    wanted = model(x, timestep=steps, class_labels=labels).sample
    assert relative(ours(x, (steps + 1).double() / 1000, labels), wanted) < 1e-6
    plain = from_diffusers(model.state_dict(), heads=2, image=8)
    assert relative(plain(x, (steps + 1).double() / 1000, labels), wanted) > 1e-4
    deviating = theirs(norm_eps=1e-1)
    assert relative(deviating(x, timestep=steps, class_labels=labels).sample, wanted) > 1e-3


def test_refused():
    given = theirs().state_dict()
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match="differs from that of block 0"):
        from_diffusers(given | {name: given[name] + 1}, heads=2)
    with pytest.raises(ValueError, match=r"'blocks.0.attn.to_v.bias' is missing"):
        from_diffusers({key: each for key, each in given.items() if "0.attn1.to_v.bias" not in key}, heads=2)
