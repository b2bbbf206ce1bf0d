"""The conversion of JiT: equal to its published wiring, and back."""

import pytest
import torch
from torch import Tensor

import dit_wiring
from helpers import relative
from zoo.convert import from_jit, to_jit
from zoo.models.dit import DiTConfig

DIM, DEPTH, HEADS, CHANNELS, CLASSES, SIDE, START = 32, 3, 2, 3, 5, 3, 1


def published(tokens: int = 4) -> dict[str, Tensor]:
    """Random tensors in the names of JiT's network."""
    state = dit_wiring.weights(DIM, DEPTH, 4 * CHANNELS, CLASSES, norms=True, heads=HEADS)
    hidden = int(4 * DIM * 2 / 3)
    for index in range(DEPTH):
        wide = {"w12": (2 * hidden, DIM), "w3": (DIM, hidden)}
        state |= dit_wiring.linears({f"blocks.{index}.mlp.{name}": shape for name, shape in wide.items()})
    state |= dit_wiring.linears({"x_embedder.proj1": (8, CHANNELS, 2, 2), "x_embedder.proj2": (DIM, 8, 1, 1)})
    del state["x_embedder.proj1.bias"]
    if tokens:
        state["in_context_posemb"] = torch.randn(1, tokens, DIM).double()
    return state | {"pos_embed": dit_wiring.positions(SIDE, DIM)[None]}


@pytest.mark.parametrize("noise", [1.0, 2.0])
@torch.no_grad()
def test_equal_to_the_published_wiring_and_back(noise):
    state = published()
    ours = from_jit(state, class_block=START, noise=noise)
    x, labels = torch.randn(3, CHANNELS, 6, 6).double(), torch.tensor([0, 3, CLASSES])
    time = torch.tensor([0.25, 0.5, 1.0]).double()  # from noise to data
    wanted = dit_wiring.jit(state, x, time, labels, HEADS, DEPTH, START)
    assert relative(noise * ours(x / noise, 1 - time, labels), wanted) < 1e-10
    assert relative(noise * from_jit(state, class_block=0, noise=noise)(x / noise, 1 - time, labels), wanted) > 1e-3
    white = torch.full((4, 4, 3), 255, dtype=torch.uint8)
    assert torch.allclose(ours.preprocess(white), torch.full((3, ours.config.image, ours.config.image), 1 / noise))
    again = to_jit(ours, noise=noise)
    assert again.keys() == state.keys() and relative(again.pop("pos_embed"), state["pos_embed"]) < 1e-6
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


@torch.no_grad()
def test_without_class_tokens():
    state = published(tokens=0)
    ours = from_jit(state)
    assert ours.config.class_tokens == ours.config.class_block == 0 and "in_context_posemb" not in to_jit(ours)
    x, time, labels = torch.randn(1, 3, 6, 6).double(), torch.tensor([0.5]).double(), torch.tensor([2])
    assert relative(ours(x, 1 - time, labels), dit_wiring.jit(state, x, time, labels, HEADS, DEPTH, -1)) < 1e-10


def test_a_file(tmp_path):
    """The first average is preferred; the names of the whole denoiser begin with net."""
    state = published()
    found = {name: {f"net.{key}": each * scale for key, each in state.items()} for name, scale in SCALES.items()}
    torch.save(found | {"epoch": 3, "args": __import__("argparse").Namespace(a=1)}, tmp_path / "checkpoint-last.pth")
    again = to_jit(from_jit(tmp_path / "checkpoint-last.pth", class_block=START))
    assert torch.equal(again["blocks.2.attn.k_norm.weight"], state["blocks.2.attn.k_norm.weight"])


SCALES = {"model": 2, "model_ema1": 1, "model_ema2": 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_embedder.proj2.bias": None}, "the tensor 'x_embedder.proj2.bias' is missing"),
        ({"blocks.0.attn.q_norm.weight": None}, "the tensor 'blocks.0.attn.q_norm.weight' is missing, or does not"),
        ({"extra": torch.ones(1)}, "the tensor 'extra' is not used by this model"),
        ({"x_embedder.proj1.bias": torch.ones(8)}, "the tensor 'x_embedder.proj1.bias' is not used"),
        ({"blocks.1.attn.k_norm.weight": torch.ones(8)}, r"'blocks.1.attn.k_norm.weight' has shape \[8\], but"),
        ({"final_layer.linear.weight": torch.ones(24, 32)}, r"'final_layer.linear.weight' has shape \[24, 32\], but"),
        ({"in_context_posemb": torch.ones(4, 32)}, "the tensor 'in_context_posemb' is missing, or does not have 3"),
        ({"pos_embed": torch.ones(1, 9, 32)}, "'pos_embed' is not the fixed table of sines and cosines"),
    ],
)
def test_refused(changed, message):
    state = {name: each for name, each in (published() | changed).items() if each is not None}
    with pytest.raises(ValueError, match=f"^the state dict: .*{message}[^\n]*$"):
        from_jit(state, class_block=START)


def test_refused_models():
    with pytest.raises(ValueError, match="the width 32 is not a published one; give class_block"):
        from_jit(published())
    with pytest.raises(ValueError, match="noise must be > 0, got 0"):
        from_jit(published(), class_block=START, noise=0)
    given = from_jit(published(), class_block=START).config
    fields = {name: getattr(given, name) for name in ("time", "prediction", "mixer", "ffn", "norm", "position")}
    for changed in ({"mixer": "sla"}, {"prediction": "velocity"}, {"classes": 0}, {"bottleneck": 0}):
        with pytest.raises(ValueError, match="only a model with the blocks of JiT"):
            to_jit(DiTConfig(dim=32, depth=1, heads=2, image=8, **{"bottleneck": 8} | fields | changed).build())
