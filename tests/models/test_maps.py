"""Attention maps of every mixer with explicit weights, and their rollout."""

import pytest
import torch
from torch.nn.functional import one_hot

import zoo
from helpers import randomise
from zoo.layer import Context, Memory, Notes
from zoo.mixers import CROSSES, MIXERS
from zoo.spec import make

DIM, HEADS = 32, 2
EXPLICIT = {
    "softmax": 2,
    "softmax(kv_heads=1, qk_norm='rmsnorm')": 2,
    "softmax(null=True, log_n=True)": 2,
    **dict.fromkeys(["power", "entmax", "topk(k=3)", "nap", "sinkhorn", "mgk", "coda", "polar", "additive", "shaw"], 2),
    **dict.fromkeys(["gqa", "conv_projection", "irpe", "cope", "coca", "symmetric", "fixed_point", "moh"], 2),
    "relaxed": 2,
    "window(size=3)": 2,
    "area(areas=3)": 2,
    "relative": 1,
    "relative(window=3)": 1,
    "local(window=3, tokens=2)": 1,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("spec", "axes"), EXPLICIT.items(), ids=EXPLICIT)
def test_noted_weights_times_values_are_the_output(spec, axes, masked):
    """By values that are one-hot in the place of their token: the output of each head is then its weights."""
    torch.manual_seed(0)
    layer = randomise(make(MIXERS, spec, DIM, HEADS, zoo.layer.Place(axes))).double().eval()
    grid = (3, 4) if axes == 2 else (12,)
    number = 12
    mask = None
    if masked:
        real = torch.ones(grid, dtype=torch.bool)
        real[..., 3 if axes == 2 else 9 :] = False
        mask = torch.stack([real.flatten(), torch.ones(number, dtype=torch.bool)])
    notes = Notes()
    context = Context(grid, mask=mask, notes=notes)
    query, key, _ = layer.project(torch.randn(2, number, DIM).double(), context)
    heads = getattr(layer, "kv_heads", HEADS)
    value = torch.eye(number).double()[None, :, None].expand(2, -1, heads, -1)
    width = layer.head_dim
    if hasattr(layer, "conv"):  # area adds a convolution of the values
        layer.conv.weight.data.zero_(), layer.conv.bias.data.zero_()
    if getattr(layer, "null", None) is not None:
        layer.null.data[1].zero_()
    parts = []
    for start in range(0, number, width):
        part = torch.zeros(2, number, heads, width, dtype=torch.double)
        part[..., : value[..., start : start + width].shape[-1]] = value[..., start : start + width]
        parts.append(layer.mix(query, key, part, context))
    got = torch.cat(parts, -1)[..., :number].transpose(1, 2)
    weights = notes.values[".weights"]
    rows = torch.ones(2, number, dtype=torch.bool) if mask is None else mask
    assert (got - weights).abs().amax((1, 3))[rows].max() < 1e-12
    assert weights.shape[:3] == (2, HEADS, number)


@pytest.mark.parametrize("name", ["differential", "dint"])
def test_noted_weights_of_differential_attention(name):
    layer = randomise(MIXERS[name](DIM, HEADS)).double().eval()
    mask = torch.tensor([[True] * 9 + [False] * 3, [True] * 12])
    context = Context((12,), mask=mask, notes=Notes())
    query, key, value = layer.project(torch.randn(2, 12, DIM).double(), context)
    got = layer.mix(query, key, value, context)
    mixed = (context.notes.values[".weights"] @ value.transpose(1, 2)).transpose(1, 2)
    assert (got - layer.normalized(mixed, context))[mask].abs().max() < 1e-12


@pytest.mark.parametrize("spec", ["softmax", "additive", "additive(score='mlp', width=5)"])
def test_weights_of_cross_attention(spec):
    layer = randomise(make(CROSSES, spec, DIM, HEADS)).double().eval()
    notes = Notes()
    memory = Memory(torch.randn(2, 7, DIM).double(), torch.tensor([[True] * 5 + [False] * 2, [True] * 7]))
    x = torch.randn(2, 3, DIM).double()
    y = layer(x, Context((3,), memory=memory, notes=notes))
    values = layer.values(memory.tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    wanted = layer.out((notes.values[".weights"] @ values).transpose(1, 2).flatten(2))
    assert (y - wanted).abs().max() < 1e-12


def test_maps_of_a_model_are_those_of_its_layers():
    model = randomise(zoo.create_model("vit_micro", mixer=("softmax", "sla"), depth=4, classes=3)).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = zoo.maps(model, images)
    assert list(maps) == [f"blocks.{index}.steps.0.branch" for index in (0, 2)]
    branch = model.blocks[0].steps[0]
    x, context = model.embed(images, None)
    query, key, _ = branch.branch.project(branch.before(x, context), context)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    assert torch.allclose(maps["blocks.0.steps.0.branch"], scores.softmax(-1), atol=1e-5)
    assert model.notes is None


SMALL = {
    "rtdetr_micro": {},
    "dit_micro": {},
    "squeezeformer_xs": {"depth": 2},
    "caformer_s18": {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 2), "heads": (1, 1, 2, 2), "image": 64},
}


@pytest.mark.parametrize(("name", "choices"), SMALL.items(), ids=SMALL)
def test_every_family_has_maps(name, choices):
    model = randomise(zoo.create_model(name, **choices)).eval()
    generator = torch.Generator().manual_seed(0)
    maps = zoo.maps(model, **model.config.probe_inputs(generator))
    assert maps and all(weights.isfinite().all() and weights.ndim == 4 for weights in maps.values())
    assert all(torch.allclose(weights.sum(-1).max(), torch.ones(()), atol=1e-4) for weights in maps.values())


def test_maps_leave_a_model_as_it_is():
    """Running statistics stay, and dropout and dropped paths are off, even if the model is in training."""
    model = randomise(zoo.create_model("vit_micro", norm="prepbn", depth=2, classes=3, dropout=0.5)).train()
    model.head.eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    first, second = (zoo.maps(model, images) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training and model.blocks[0].training and not model.head.training


def test_a_model_without_explicit_weights_is_refused():
    model = zoo.create_model("vit_micro", mixer="sla", classes=3)
    with pytest.raises(ValueError, match="no layer of this model has explicit attention weights"):
        zoo.maps(model, torch.randn(1, 3, 32, 32))


def test_rollout_follows_tokens_through_the_layers():
    """Attention that moves every token by one place: after three layers, by three; with a residual, binomially."""
    move = one_hot((torch.arange(5) - 1) % 5, 5).float()[None, None].expand(1, 2, -1, -1)
    gone = zoo.rollout([move] * 3, residual=0.0)
    assert torch.equal(gone[0].argmax(-1), (torch.arange(5) - 3) % 5)
    half = zoo.rollout([move] * 3)
    assert torch.allclose(half[0, 3], torch.tensor([1.0, 3.0, 3.0, 1.0, 0.0]) / 8)
    assert torch.allclose(zoo.rollout([3 * move, -move]), zoo.rollout([move, move]))


def test_rollout_refuses_layers_of_other_tokens():
    with pytest.raises(ValueError, match="of the same tokens, got"):
        zoo.rollout([torch.ones(1, 2, 4, 4), torch.ones(1, 2, 3, 3)])
    with pytest.raises(ValueError, match="got none"):
        zoo.rollout([])
    with pytest.raises(ValueError, match="residual must be from 0 to 1"):
        zoo.rollout([torch.ones(1, 2, 4, 4)], residual=2.0)
