"""The conversion of LightningDiT: equal to its published wiring, and back."""

import itertools

import pytest
import torch
from torch import Tensor

import dit_wiring
from helpers import relative
from zoo.convert import from_lightningdit, to_lightningdit
from zoo.models.dit import DiTConfig

DIM, DEPTH, HEADS, SIDE, CHANNELS, CLASSES = 32, 2, 2, 4, 3, 5
FORMS = list(itertools.product([False, True], repeat=3))  # norms of queries and keys; SwiGLU and RMSNorm; rotary


def published(qk_norm: bool = False, modern: bool = True, rotary: bool = True, patch: int = 1) -> dict[str, Tensor]:
    """Random tensors in the names of LightningDiT."""
    outputs = CHANNELS * patch**2
    state = dit_wiring.weights(DIM, DEPTH, outputs, CLASSES, norms=modern, heads=HEADS if qk_norm else 0)
    hidden = int(2 / 3 * 4 * DIM)
    for index in range(DEPTH):
        wide = (
            {"w12": (2 * hidden, DIM), "w3": (DIM, hidden)}
            if modern
            else {"fc1": (4 * DIM, DIM), "fc2": (DIM, 4 * DIM)}
        )
        state |= dit_wiring.linears({f"blocks.{index}.mlp.{name}": shape for name, shape in wide.items()})
    state |= dit_wiring.linears({"x_embedder.proj": (DIM, CHANNELS, patch, patch)})
    state["pos_embed"] = dit_wiring.positions(SIDE // patch, DIM)[None]
    if rotary:
        angles = dit_wiring.angles(SIDE // patch, DIM // HEADS).repeat_interleave(2, 1)
        state |= {"feat_rope.freqs_cos": angles.cos().float(), "feat_rope.freqs_sin": angles.sin().float()}
    return state


@pytest.mark.parametrize(("qk_norm", "modern", "rotary"), FORMS)
@torch.no_grad()
def test_equal_to_the_published_wiring_and_back(qk_norm, modern, rotary):
    state = published(qk_norm, modern, rotary, patch := 1 + rotary)
    ours = from_lightningdit(state, heads=HEADS)
    x, labels = torch.randn(3, CHANNELS, SIDE, SIDE).double(), torch.tensor([0, 3, CLASSES])
    time = torch.tensor([0.25, 0.5, 1.0]).double()  # from noise to data
    wanted = dit_wiring.lightningdit(state, x, time, labels, HEADS, DEPTH, patch)
    assert relative(ours(x, 1 - time, labels), -wanted) < 1e-10
    again = to_lightningdit(ours)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name].to(tensor.dtype), tensor) or relative(again[name], tensor) < 1e-6, name
    assert all(
        torch.equal(again[name], state[name]) for name in state if "pos_embed" not in name and "freqs" not in name
    )


def test_a_file(tmp_path):
    """Averaged weights are preferred, a prefix of data-parallel training is dropped, and so is a variance."""
    state = published()
    wide = {f"module.{name}": tensor for name, tensor in state.items()}
    for leaf in ("weight", "bias"):
        tensor = state[f"final_layer.linear.{leaf}"]
        wide[f"module.final_layer.linear.{leaf}"] = torch.cat([tensor, torch.randn_like(tensor)])
    plain = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"model": plain, "ema": wide, "config": {"data": {"image_size": 256}}}, tmp_path / "file.pt")
    model = from_lightningdit(tmp_path / "file.pt", heads=HEADS)
    assert model.preprocess is None
    again = to_lightningdit(model)
    assert torch.equal(again["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert torch.equal(again["final_layer.linear.weight"], state["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks.1.mlp.w3.bias": None}, "the tensor 'blocks.1.mlp.w3.bias' is missing"),
        ({"pos_embed": None}, "the tensor 'pos_embed' is missing, or does not have 3 axes"),
        ({"extra": torch.ones(1)}, "the tensor 'extra' is not used by this model"),
        ({"blocks.0.attn.q_norm.bias": torch.ones(16)}, "the tensor 'blocks.0.attn.q_norm.bias' is not used"),
        ({"blocks.1.attn.qkv.weight": torch.ones(95, 32)}, r"'blocks.1.attn.qkv.weight' has shape \[95, 32\], but"),
        ({"blocks.0.mlp.w12.weight": torch.ones(168, 32)}, r"'blocks.0.mlp.w12.weight' has shape \[168, 32\], but"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.ones(128, 32)}, r"without shifts \(wo_shift\) is not supported"),
        ({"pos_embed": torch.ones(1, 16, 32)}, "'pos_embed' is not the fixed table of sines and cosines"),
        ({"feat_rope.freqs_sin": torch.ones(16, 16)}, "'feat_rope.freqs_sin' is not the fixed table"),
    ],
)
def test_refused(changed, message):
    state = {name: each for name, each in (published() | changed).items() if each is not None}
    with pytest.raises(ValueError, match=f"^the state dict: .*{message}[^\n]*$"):
        from_lightningdit(state, heads=HEADS)


def test_refused_models():
    with pytest.raises(ValueError, match="the width 32 is not a published one; give heads"):
        from_lightningdit(published())
    for changed in ({"mixer": "sla"}, {"prediction": "data"}, {"until": True}, {"classes": 0}, {"time": "sincos"}):
        config = {"time": "sincos(scale=1.0, reverse=True)"} | changed
        with pytest.raises(ValueError, match="only a model with the blocks of LightningDiT"):
            to_lightningdit(DiTConfig(dim=32, depth=1, heads=2, image=8, **config).build())
