"""Scores that fall with the distance, against formulas and over one stream, and what they need in memory."""

import math
from typing import Any

import pytest
import torch

import zoo
from helpers import Given, position, randomise, rectangle, relative
from zoo.layer import Context, Notes, Place
from zoo.mixers import MIXERS
from zoo.spec import make

DIM, HEADS = 32, 4


def distances(grid: tuple[int, ...], prefix: int, manhattan: bool = False) -> torch.Tensor:
    """By loops over all pairs."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])] if len(grid) == 2 else None
    total = prefix + math.prod(grid)
    found = torch.zeros(total, total, dtype=torch.float64)
    for one in range(prefix, total):
        for other in range(prefix, total):
            if places is None:
                found[one, other] = abs(one - other)
            else:
                gaps = [abs(a - b) for a, b in zip(places[one - prefix], places[other - prefix], strict=True)]
                found[one, other] = sum(gaps) if manhattan else math.hypot(*gaps)
    return found


@pytest.mark.parametrize("grid", [(7,), (3, 4)])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_scores_fall_with_the_distance(grid, prefix, distance):
    rule = position("alibi", DIM, DIM // HEADS, grid, prefix, distance=distance).place(Context(grid, prefix)).bias
    total = prefix + math.prod(grid)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    wanted = -slopes[:, None, None] * distances(grid, prefix, distance == "manhattan")
    assert relative(rule.between(torch.arange(total), torch.arange(total))[0].double(), wanted) < 1e-6
    some = rule.between(torch.tensor([3, 1]), torch.tensor([0, 4, 2]))
    assert relative(some[0].double(), wanted[:, [3, 1]][:, :, [0, 4, 2]]) < 1e-6


@pytest.mark.parametrize("mixer", ["softmax", "softmax(null=True, log_n=True)", "differential", "nap"])
def test_a_bias_in_chunks_is_that_of_all(mixer, monkeypatch):
    """In inference it is made for some queries at a time."""
    monkeypatch.setattr("zoo.mixers.scored.LEAST_ROWS", 3)
    monkeypatch.setitem(zoo.mixers.scored.SCORES_AT_ONCE, "cpu", 1)
    layer = make(MIXERS, mixer, DIM, HEADS, Place(2)).eval()
    context = Context((4, 5), 2, torch.arange(22) < torch.tensor([[22], [18]]))
    context = position("alibi", DIM, DIM // HEADS, (4, 5), 2).place(context)
    rule, asked, x = context.bias, [], torch.randn(2, 22, DIM)

    class Counted:
        def between(self, queries, keys):
            asked.append(len(queries))
            return rule.between(queries, keys)

    whole = layer(x, context)
    with torch.no_grad():
        some = layer(x, context._replace(bias=Counted()))
    assert relative(some, whole) < 1e-5 and max(asked) == 3 and sum(asked) == 22
    assert relative(whole, layer(x, context._replace(bias=None))) > 1e-3


@pytest.mark.parametrize("given", ["random", "alibi"])
@pytest.mark.parametrize(("grid", "extents"), [((11,), [(11,), (7,)]), ((5, 7), [(5, 7), (4, 3)])])
def test_windows_have_the_bias_of_their_pairs(grid, extents, given):
    """As softmax attention whose bias leaves out the pairs of other windows."""
    number, axes = math.prod(grid), len(grid)
    windows: Any = randomise(make(MIXERS, "window(size=3)", DIM, HEADS, Place(axes))).double()
    whole: Any = make(MIXERS, "softmax", DIM, HEADS, Place(axes)).double()
    whole.load_state_dict(windows.state_dict())
    bias = torch.randn(HEADS, number, number, dtype=torch.double)
    context = Context(grid, mask=torch.stack([rectangle(grid, extent) for extent in extents]))
    if given == "alibi":
        context = position("alibi", DIM, DIM // HEADS, grid).place(context)
        bias = context.bias.between(torch.arange(number), torch.arange(number))[0].double()
    else:
        context = context._replace(bias=Given(bias))
    numbers = windows.windows(grid, torch.device("cpu"))[0]
    apart = torch.where(numbers[:, None] == numbers, bias, -torch.inf)
    x = torch.randn(2, number, DIM, dtype=torch.double)
    got, wanted = windows(x, context), whole(x, context._replace(bias=Given(apart)))
    assert relative(got[context.mask], wanted[context.mask]) < 1e-6
    assert relative(got, windows(x, context._replace(bias=None))) > 1e-3
    notes = Notes()
    windows(x, context._replace(notes=notes))
    weights = notes.values[".weights"] @ windows.project(x, context)[2].transpose(1, 2)
    assert relative(windows.out(weights.transpose(1, 2).flatten(2))[context.mask], wanted[context.mask]) < 1e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_long_grids_stay_finite(kind):
    """The square of 300 tokens is none of half precision; the class token has no distance."""
    choices = {"position": "alibi", "class_token": True, "pool": "token", "dim": 32, "depth": 1, "heads": 4, "patch": 4}
    model = randomise(zoo.create_model("vit_micro", image=32, classes=3, **choices)).eval()
    image = torch.randn(1, 3, 4, 1200)
    with torch.no_grad():
        wanted = model(image)
        assert relative(model.to(kind)(image.to(kind)).float(), wanted) < 0.05


def test_a_padded_clip_is_the_clip():
    model = randomise(zoo.create_model("conformer_ctc_s", position="alibi", mixer="softmax", dim=32, depth=2, heads=4))
    short, long = torch.randn(1, 60, 80), torch.randn(1, 140, 80)
    batch = torch.cat([torch.nn.functional.pad(short, (0, 0, 0, 80)), long])
    with torch.no_grad():
        got, lengths = model.eval()(batch, torch.tensor([60, 140]))
        wanted, _ = model(short, torch.tensor([60]))
    assert relative(got[:1, : lengths[0]], wanted[:, : lengths[0]]) < 1e-5


def test_it_is_made_on_the_default_device():
    with torch.device("meta"):
        model = zoo.create_model("vit_micro", position="alibi", image=32, classes=3)
        assert model(torch.randn(1, 3, 48, 64)).shape == (1, 3)


def test_mixers_that_do_not_read_it_and_other_distances_are_refused():
    with pytest.raises(ValueError, match="alibi"):
        zoo.create_model("vit_micro", position="alibi", mixer="sla")
    with pytest.raises(ValueError, match="unknown distance 'far'"):
        zoo.create_model("vit_micro", position="alibi(distance='far')")


def test_a_loaded_model_has_its_slopes(tmp_path):
    model = randomise(zoo.create_model("vit_micro", position="alibi", image=32, classes=3)).eval()
    zoo.save_model(model, tmp_path / "model")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(zoo.load_model(tmp_path / "model", check=True)(image), model(image)) < 1e-6
