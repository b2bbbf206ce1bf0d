"""Linear attention against the sum over all pairs of tokens, written out."""

import pytest
import torch

from helpers import relative
from zoo.kernels import feature_attention, linear_attention
from zoo.kernels.linear import PART


def written_out(query, key, value, mask=None, turned=None):
    """Every pair of tokens, in fp64; the share of each key is its product over the sum of all."""
    query, key, value = query.double(), key.double(), value.double()
    products = torch.einsum("bnhd,bmhd->bhnm", query, key)
    above = products if turned is None else torch.einsum("bnhd,bmhd->bhnm", turned[0].double(), turned[1].double())
    if mask is not None:
        products, above = (each.masked_fill(~mask[:, None, None], 0.0) for each in (products, above))
    total = products.sum(-1).transpose(1, 2)[..., None]
    return torch.einsum("bhnm,bmhe->bnhe", above, value) / total


def given(batch=2, queries=9, keys=9, heads=3, width=8, depth=8, kind=torch.float64):
    query = torch.rand(batch, queries, heads, width, dtype=torch.float64)
    key = torch.rand(batch, keys, heads, width, dtype=torch.float64)
    value = torch.randn(batch, keys, heads, depth, dtype=torch.float64)
    return [each.to(kind).requires_grad_() for each in (query, key, value)]


def differing(form, wanted, leaves):
    """The relative differences of the outputs and of all gradients."""
    weight = torch.randn(wanted.shape, dtype=wanted.dtype)
    found = [relative(form.double(), wanted)]
    got = torch.autograd.grad((form * weight.to(form.dtype)).sum(), leaves)
    true = torch.autograd.grad((wanted * weight).sum(), leaves)
    return found + [relative(one.double(), other.double()) for one, other in zip(got, true, strict=True)]


# Few tokens for wide heads, and many for narrow ones: each order of the products.
SHAPES = {
    "scores first": {"queries": 5, "keys": 4, "width": 16, "depth": 12},
    "summary first": {"queries": 40, "keys": 33},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_all_pairs(shape, turning, masked):
    leaves = given(**SHAPES[shape])
    query, key, value = leaves
    turned = (query.roll(1, -1) - 0.5, key.roll(1, -1) - 0.3) if turning else None
    mask = torch.arange(key.shape[1])[None] < torch.tensor([[key.shape[1]], [3]]) if masked else None
    got, wanted = linear_attention(*leaves, mask, turned), written_out(*leaves, mask, turned)
    assert max(differing(got, wanted, leaves)) < 1e-5  # the 1e-6 that keeps the sum off zero


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_lower_precision_is_near(shape, kind, limit):
    leaves = [each.detach() for each in given(**SHAPES[shape], kind=kind)]
    assert relative(linear_attention(*leaves).double(), written_out(*leaves)) < limit


def test_the_result_is_added_to_onto_and_overwrites_it_only_without_gradients():
    leaves = given()
    onto = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    kept, wanted = onto.clone(), linear_attention(*leaves) + onto
    assert relative(linear_attention(*leaves, onto=onto), wanted) < 1e-14 and torch.equal(onto, kept)
    with torch.no_grad():
        got = linear_attention(*leaves, onto=onto)
    assert relative(got, wanted) < 1e-14 and got.data_ptr() == onto.data_ptr()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1000.0])
def test_half_precision_holds_at_12544_tokens(kind, size):
    """Whatever the size of the numbers: plain sums would overflow fp16 at 65,504 or vanish."""
    query, key, value = (
        (size * each).to(kind) for each in given(batch=1, queries=12544, keys=12544, heads=1, width=16, depth=16)
    )
    got = linear_attention(query, key, value)[:, :64]
    assert relative(got.double(), written_out(query[:, :64], key, value)) < 2e-2


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("few", [1e-6, 1e-3])
def test_a_query_that_hardly_meets_a_key_stays_within_the_values(kind, few):
    """Half of the channels are dead in the keys; the first queries live in those alone, the next ones nearly so."""
    query, key, value = (each.detach() for each in given(queries=64, keys=64, kind=kind))
    key[..., 4:] = 0.0
    query[:, :3, :, :4] = 0.0
    query[:, 3:6, :, :4] *= few
    leaves = [each.requires_grad_() for each in (query, key, value)]
    got = linear_attention(*leaves)
    assert torch.equal(got[:, :3], torch.zeros_like(got[:, :3]))
    assert got.abs().max() <= 1.01 * value.abs().max()
    got.sum().backward()
    assert all(each.grad.isfinite().all() for each in leaves)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_turning_cannot_blow_up_what_hardly_overlaps(kind):
    query, key, value = (each.detach() for each in given(queries=64, keys=64, kind=kind))
    key[..., 4:] = 0.0
    query[:, :3, :, :4] = 0.0
    leaves = [each.requires_grad_() for each in (query, key, value)]
    got = linear_attention(*leaves, turned=(query.roll(4, -1), key))
    assert got[:, :3].abs().max() > 0 and got.abs().max() <= 200 * value.abs().max()
    got.sum().backward()
    assert all(each.grad.isfinite().all() for each in leaves)


def test_numbers_of_autocast_in_fp16_stay_finite():
    query, key, value = (10 + 10 * each.detach().abs() for each in given(queries=4096, keys=4096, kind=torch.float32))
    wanted = written_out(query[:, :32], key, value)
    with torch.autocast("cpu", torch.float16):
        got = linear_attention(query, key, value)
    assert relative(got[:, :32].double(), wanted) < 5e-3


def test_without_a_real_key_the_result_is_zero():
    leaves = [each.detach() for each in given()]
    got = linear_attention(*leaves, torch.zeros(2, 9, dtype=torch.bool))
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_mates_change_nothing(batch):
    leaves = [each.detach() for each in given(batch=4, queries=40, keys=40, kind=torch.float32)]
    alone = linear_attention(*(each[:batch] for each in leaves))
    assert relative(alone, linear_attention(*leaves)[:batch]) < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(PART + 1, 3 * PART + 7), (2 * PART, 5), (3, 2 * PART), (9, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_features_made_in_parts_give_the_attention_of_all(queries, keys, masked):
    leaves = given(queries=queries, keys=keys, width=4)
    mask = torch.arange(keys) < torch.tensor([[keys], [3]]) if masked else None
    most = []

    def squares(x):
        most.append(x.shape[1])
        return torch.cat([torch.ones_like(x[..., :1]), x, x.square()], -1)

    with torch.no_grad():
        got = feature_attention(squares, *leaves, mask)
        wanted = written_out(squares(leaves[0]), squares(leaves[1]), leaves[2], mask)
    assert relative(got, wanted) < 1e-5  # the 1e-6 that keeps the sum off zero
    assert max(most[:-2]) <= PART
    whole = feature_attention(squares, *leaves, mask)
    assert relative(got, whole.detach()) < 1e-12
    assert whole.requires_grad and most[-2:] == [queries, keys]


@pytest.mark.parametrize(("kind", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_features_made_in_parts_in_lower_precision(kind, limit):
    leaves = [each.detach() for each in given(queries=2 * PART, keys=2 * PART + 3, kind=kind)]
    with torch.no_grad():
        got = feature_attention(torch.square, *leaves)
    wanted = written_out(leaves[0].double().square(), leaves[1].double().square(), leaves[2])
    assert relative(got.double(), wanted) < limit
