"""Positions that change from block to block: against the formula with matrices written out, and its symmetries."""

import math
from typing import Any

import pytest
import torch

from helpers import randomise, relative
from zoo import create_model
from zoo.layer import Context, Place
from zoo.mixers.tape import Tape

SIZES: dict[str, Any] = {"dim": 32, "depth": 3, "heads": 2, "classes": 3, "image": 32, "patch": 8, "norm": "rmsnorm"}
PAIRS = 8  # of the 16 channels of a head


def vit(mixer: Any, position: str = "rope", **fields: Any) -> Any:
    return randomise(create_model("vit_micro", **(SIZES | fields), mixer=mixer, position=position)).double()


def rotations(context: Context) -> torch.Tensor:
    """For every token and pair the transpose of the matrix by which rotary positions turn it: [N, P, 2, 2]."""
    assert context.rotary is not None
    rows = []
    for cosines, sines in zip(*context.rotary.double(), strict=True):
        rows.append(torch.stack([torch.tensor([[c, -s], [s, c]]).T for c, s in zip(cosines, sines, strict=True)]))
    return torch.stack(rows).double()


def written_out(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The tokens behind the last block."""
    x, context = model.embed(images, None)
    states = rotations(context).expand(len(x), 2, -1, -1, -1, -1)  # [B, H, N, P, 2, 2]
    for block in model.blocks:
        mixer, ffn = block.steps
        layer = mixer.branch
        q, k, v = layer.qkv(mixer.before(x, context)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (each.unflatten(-1, (2, PAIRS)).transpose(-1, -2) for each in (q, k))  # [B, H, N, P, 2]
        relations = torch.einsum("bhiplr,bhjpmr->bhijplm", states, states)
        scores = torch.einsum("bhipl,bhijplm,bhjpm->bhij", q, relations, k) / math.sqrt(16)
        weights = scores.softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        if layer.share is not None:
            states = states.transpose(1, 2)  # [B, N, H, P, 2, 2]
            share = layer.share[:, None, None, None]
            states = states + share * torch.einsum("bhij,bjhplr->bihplr", weights, states)
            gate = torch.nn.functional.silu(y @ layer.gate.weight.T)
            hidden = torch.einsum("uh,bihplr->biuplr", layer.down.weight, states) * gate[..., None, None, None]
            states = states + torch.einsum("hu,biuplr->bihplr", layer.up.weight, hidden)
            states = states.transpose(1, 2)
        x = ffn(x + layer.out(y), context)
    return x


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_it_is_the_formula(checkpointing):
    model = vit("tape(rank=5)", class_token=True, pool="token")
    model.checkpointing = checkpointing
    images = torch.randn(2, 3, 32, 32, dtype=torch.double, requires_grad=True)
    wanted = model.head(model.norm(written_out(model, images), Context(grid=(4, 4)))[:, 0])
    leaves = (
        images,
        *(getattr(model.blocks[0].steps[0].branch, name).weight for name in ("qkv", "up", "down", "gate")),
    )
    got = model.train()(images)
    seed = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((each * seed).sum(), leaves) for each in (got, wanted))
    for mine, other in ((got, wanted), *zip(ours, theirs, strict=True)):
        assert relative(mine, other) < 1e-10
    with torch.inference_mode():
        assert relative(model.eval()(images), wanted) < 1e-10


def test_a_new_one_is_softmax_with_rotary_positions():
    model, plain = vit("tape"), vit("softmax")
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    assert relative(model(images), plain(images)) > 1e-3
    for block in model.blocks[:-1]:
        torch.nn.init.zeros_(block.steps[0].branch.share)
        torch.nn.init.zeros_(block.steps[0].branch.down.weight)
    assert relative(model(images), plain(images)) < 1e-12
    fresh = create_model("vit_micro", **SIZES, mixer="tape", position="rope")
    layers = [block.steps[0].branch for block in fresh.blocks[:-1]]
    assert not any(bool(each.any()) for layer in layers for each in (layer.share, layer.down.weight))


def test_an_orthogonal_matrix_behind_all_states_changes_nothing(monkeypatch):
    model = vit("tape")
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    before = model(images)
    angle = torch.tensor(0.7, dtype=torch.double)
    turn = torch.stack([angle.cos(), angle.sin(), angle.sin(), -angle.cos()]).view(2, 2)  # with a reflection
    start = Tape.start
    monkeypatch.setattr(Tape, "start", lambda *given: start(*given).double() @ turn)
    assert relative(model(images), before) < 1e-12
    monkeypatch.setattr(Tape, "start", lambda *given: turn @ start(*given).double())
    assert relative(model(images), before) > 1e-3


def test_without_positions_states_are_identities_at_first():
    model, plain = vit("tape", "none"), vit("softmax", "none")
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    assert relative(model.blocks[0](*model.embed(images, None)), plain.blocks[0](*plain.embed(images, None))) < 1e-12
    assert relative(model(images), plain(images)) > 1e-3


def test_all_blocks_but_the_last_change_the_states():
    model = vit(("tape", "softmax"), depth=5)
    layers = [block.steps[0].branch for block in model.blocks]
    assert [isinstance(layer, Tape) and layer.share is not None for layer in layers] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_a_block_alone_needs_those_before_it():
    layer = Tape(32, 2, Place(order=1))
    with pytest.raises(ValueError, match=r"^tape: no positions to read; run the blocks before this one first"):
        layer(torch.randn(1, 12, 32), Context(grid=(3, 4)))


def test_heads_of_an_odd_width_are_refused():
    with pytest.raises(ValueError, match="must be even, got 5"):
        create_model("vit_micro", **(SIZES | {"dim": 10}), mixer="tape", position="none")


@pytest.mark.parametrize(
    ("mixer", "layout"),
    [
        ("tape", ("mixer", "ffn", "mixer", "ffn")),
        ("blend(of=('tape', 'tape(rank=4)'))", ("mixer", "ffn")),
        (("tape", "blend(of=('tape', 'softmax'))"), ("mixer", "ffn")),
    ],
    ids=["twice", "blend", "turns"],
)
def test_every_change_of_the_states_counts(mixer, layout):
    model = vit(mixer, layout=layout, depth=4)
    model(torch.randn(2, 3, 32, 32, dtype=torch.double)).square().sum().backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None]


def test_an_image_gives_the_same_beside_a_larger_one():
    model = vit("tape", class_token=True, pool="token").eval()
    image = torch.randn(1, 3, 16, 24, dtype=torch.double)
    both, mask = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.zeros(2, 32, 32, dtype=torch.bool)
    both[0, :, :16, :24], mask[0, :16, :24], mask[1] = image[0], True, True
    with torch.no_grad():
        assert relative(model(both, mask)[:1], model(image)) < 1e-12


def test_mixed_precision_is_near_single_precision():
    model, images = vit("tape").float(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    assert relative(mixed.float(), model(images)) < 0.05
