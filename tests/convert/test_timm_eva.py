"""timm's Eva (EVA, EVA-02, DINOv3) becomes a ViT with the same output at every size."""

import functools
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.eva import Eva
from torch import nn

from zoo.convert import from_timm
from zoo.convert.timm.eva import read
from zoo.models.base import count_parameters

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
SMALL |= {"dynamic_img_size": True}
ROPE = {"use_rot_pos_emb": True}
DINOV3 = ROPE | {"rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100, "use_abs_pos_emb": False}
DINOV3 |= {"num_reg_tokens": 3, "use_fc_norm": False, "init_values": 0.1, "qkv_bias": False}
DINOV3 |= {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)}
EVA02 = ROPE | {"ref_feat_shape": 4, "swiglu_mlp": True, "mlp_ratio": 8 / 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "eva": {},
    "eva, no bias": {"qkv_bias": False},
    "eva02": EVA02,
    "eva02, another reference": EVA02 | {"ref_feat_shape": (6, 6), "rope_temperature": 50.0},
    "eva02, base": EVA02 | {"qkv_fused": False, "scale_mlp": True},
    "eva02, clip": EVA02 | {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
    "eva02, aligned": EVA02 | {"swiglu_align_to": 8, "mlp_ratio": 2.1},
    "behind the branches": {"use_post_norm": True},
    "rope alone": ROPE | {"use_abs_pos_emb": False, "num_reg_tokens": 1, "class_token": False, "init_values": 0.1},
    "rope, another attention": ROPE | {"attn_type": "rope", "no_embed_class": True, "num_reg_tokens": 2},
    "rope, norms of queries and keys": ROPE
    | {"qk_norm": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)},
    "dinov3": DINOV3,
    "dinov3, token": DINOV3 | {"global_pool": "token", "num_classes": 0},
    "dinov3, plus": DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": True},
    "dinov3, neighbouring channels": DINOV3 | {"rope_rotate_half": False},
    "norm before the blocks": {"use_pre_transformer_norm": True, "norm_layer": RmsNorm},
    "attention pooling": {"global_pool": "map", "class_token": False},
}
SIZES = [(16, 16), (8, 8), (28, 28), (12, 24)]


def build(**choices: Any) -> Any:
    """A model of timm in fp64 whose every parameter is random."""
    model = Eva(**(SMALL | choices)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
def test_it_gives_the_same_output_at_any_size(name: str):
    model = build(**VARIANTS[name])
    ours = from_timm(model)
    for sides in SIZES:
        images = torch.randn(2, 3, *sides, dtype=torch.float64)
        assert relative(ours(images), model(images)) < 1e-6, sides  # timm's positions are in single precision
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model(images).square().sum().backward()
    idle = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.abs().max() > 0]
    assert not idle, "these would not be noticed"
    again = ours.config.build().double().eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(images), ours(images))


PUBLISHED = {
    "eva_giant_patch14_224": "learned(antialias=True)",
    "eva02_tiny_patch14_224": "learned_rope(antialias=True, reference=16)",
    "eva02_large_patch14_448": "learned_rope(antialias=True, reference=16)",
    "eva02_base_patch16_clip_224": "learned_rope(antialias=True, reference=16)",
    "vit_base_patch16_rope_reg1_gap_256": "rope(reference=16)",
    "vit_small_patch16_dinov3": "rope(base=100.0, centred=True)",
    "vit_huge_plus_patch16_dinov3": "rope(base=100.0, centred=True)",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_taken(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = from_timm(model)
    assert ours.config.position == PUBLISHED[name]
    assert count_parameters(ours) >= count_parameters(model)


def two_heads(model: Any) -> None:
    model.blocks[1].attn.num_heads = 2


def one_scale(model: Any) -> None:
    model.blocks[0].gamma_1 = None


REFUSED: dict[str, tuple[dict[str, Any], Any]] = {
    "'rope' being RotaryEmbeddingMixed": (ROPE | {"rope_type": "mixed"}, None),
    "count the rows and columns of tokens from 0": (ROPE | {"rope_grid_indexing": "xy"}, None),
    "rows and columns": (ROPE | {"rope_grid_offset": 1.0}, None),
    "one side of the grid of rotary positions": (ROPE | {"ref_feat_shape": (4, 6)}, None),
    "each axis by itself": (DINOV3 | {"rope_grid_indexing": "xy"}, None),
    "DINOv3 with a temperature": (DINOV3 | {"use_abs_pos_emb": True}, None),
    "heads that share keys": ({"num_kv_heads": 2, "attn_type": "rope", "qkv_fused": False}, None),
    "attention pooling over a class token": ({"global_pool": "map"}, None),
    "one final norm": ({"use_fc_norm": True, "use_post_transformer_norm": True}, None),
    "inside attention without one inside mlp": ({"scale_attn_inner": True}, None),
    "with norms behind them": (EVA02 | {"use_post_norm": True, "scale_mlp": True}, None),
    "got 'max'": ({"global_pool": "max"}, None),
    "queries and keys, got": ({"qk_norm": True, "norm_layer": functools.partial(nn.LayerNorm, eps=0.1)}, None),
    "got 16 x 24": ({"img_size": (16, 24)}, None),
    "one number of heads": ({}, two_heads),
    "one use of layer scale": ({"init_values": 0.1, "attn_only_layer_scale": True}, None),
    "use of layer scale": ({"init_values": 0.1}, one_scale),
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_without_counterpart_are_refused(words: str):
    choices, change = REFUSED[words]
    model = build(**choices)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=words) as found:
        from_timm(model)
    assert "\n" not in str(found.value)


def test_a_state_dict_alone_is_refused():
    with pytest.raises(ValueError, match="has no counterpart|is missing|give the model itself"):
        from_timm(build(**EVA02).state_dict(), heads=4)


def test_tensors_are_not_shared_with_the_model():
    model = build(**DINOV3)
    _, tensors = read(model)
    ours = from_timm(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and tensors
