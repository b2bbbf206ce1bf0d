"""Mixers that carry a state, against their recurrence token by token."""

import pytest
import torch
import torch.nn.functional as F

from helpers import randomise, relative
from mixers.test_kernelized import compare
from zoo.kernels import delta_attention
from zoo.kernels.delta import CHUNK
from zoo.layer import Context, Order, Place
from zoo.mixers import MIXERS
from zoo.spec import make


def recurrence(query, key, value, rate):
    """query and key [N, H, d], value [N, H, e] and rate [N, H]: [N, H, e]."""
    memory = torch.zeros(*key.shape[1:], value.shape[-1], dtype=key.dtype)
    read = []
    for q, k, v, b in zip(query, key, value, rate, strict=True):
        expected = torch.einsum("hd,hde->he", k, memory)
        memory = memory + torch.einsum("h,hd,he->hde", b, k, v - expected)
        read.append(torch.einsum("hd,hde->he", q, memory))
    return torch.stack(read)


@pytest.mark.parametrize("number", [1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
def test_chunks_are_the_recurrence(number):
    query, key = F.normalize(torch.randn(2, 2, number, 3, 8, dtype=torch.double), dim=-1)
    value, rate = torch.randn(2, number, 3, 5, dtype=torch.double), torch.rand(2, number, 3, 1, dtype=torch.double)
    wanted = [recurrence(*each) for each in zip(query, key, value, rate[..., 0], strict=True)]
    assert relative(delta_attention(query, key, value, rate), torch.stack(wanted)) < 1e-12


def test_equal_keys_cancel_nothing():
    """With full rates and nearly equal keys a series of the products of keys would overflow fp32."""
    near = torch.ones(1, 4 * CHUNK, 2, 8) + 1e-3 * torch.randn(1, 4 * CHUNK, 2, 8)
    key, value = F.normalize(near, dim=-1), torch.randn(1, 4 * CHUNK, 2, 4)
    wanted = recurrence(*(each[0].double() for each in (key, key, value)), torch.ones(4 * CHUNK, 2).double())
    assert relative(delta_attention(key, key, value, torch.ones(1, 4 * CHUNK, 2, 1))[0].double(), wanted) < 1e-5


def parts(sample):
    query, key = (F.normalize(F.silu(each), dim=-1) for each in (sample.query, sample.key))
    return query, key, sample.value, torch.sigmoid(sample.layer.rate(sample.x))


def both_ways(sample):
    one = recurrence(*parts(sample))
    return one + recurrence(*(each.flip(0) for each in parts(sample))).flip(0)


@pytest.mark.parametrize("axes", [1, 2])
def test_deltanet_reads_the_tokens_both_ways(axes):
    compare("deltanet", both_ways, axes)


def test_prefix_tokens_come_last_in_causal_models():
    layer = randomise(make(MIXERS, "deltanet(directions=1)", 16, 2, Place(2))).double()
    x = torch.randn(1, 2 + 12, 16, dtype=torch.double)
    moved = torch.cat([x[:, 2:], x[:, :2]], 1)
    wanted = layer(moved, Context((14,), order=Order()))
    got = layer(x, Context((3, 4), 2, order=Order(2)))
    assert relative(torch.cat([got[:, 2:], got[:, :2]], 1), wanted) < 1e-12


def test_wrong_directions():
    with pytest.raises(ValueError, match="^deltanet: directions must be 1 or 2, got 3$"):
        make(MIXERS, "deltanet(directions=3)", 16, 2, Place(2))
