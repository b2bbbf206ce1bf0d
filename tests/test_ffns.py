"""Feed-forward layers against their formulas."""

from typing import Any

import pytest
import torch

from test_parity import DIM, GRID, check, scattered, tokens
from zoo import create_model
from zoo.ffns import FFNS
from zoo.norms import Affine


@pytest.mark.parametrize(("parts", "ratio", "inner"), [(2, 4.0, False), (4, 2.5, True), (1, 1.0, True)])
def test_chunked_is_an_mlp_of_each_chunk(parts, ratio, inner):
    """One matrix for all channels, block-diagonal."""
    layer: Any = scattered(FFNS["chunked"](DIM, parts=parts, ratio=ratio, activation="relu"))
    wide = int(ratio * (DIM // parts)) * parts
    assert sum(each.numel() for each in layer.parameters()) == 2 * DIM * wide // parts + wide + DIM
    x = tokens()
    hidden = x @ torch.block_diag(*(each.weight for each in layer.expands)).T
    hidden = (hidden + torch.cat([each.bias for each in layer.expands])).clamp(min=0)
    if inner:
        layer.inner = scattered(Affine(wide))
        hidden = hidden * layer.inner.weight + layer.inner.bias
    wanted = hidden @ torch.block_diag(*(each.weight for each in layer.outs)).T
    check(layer(x, GRID), wanted + torch.cat([each.bias for each in layer.outs]), (x,))


def test_chunks_of_one_width_alone():
    with pytest.raises(ValueError, match="^ffn 'chunked\\(parts=5\\)': parts must divide dim 32, got 5$"):
        create_model("vit_micro", dim=32, heads=2, ffn="chunked(parts=5)")
    with pytest.raises(ValueError, match="unknown activation 'gleu'"):
        FFNS["chunked"](DIM, activation="gleu")
