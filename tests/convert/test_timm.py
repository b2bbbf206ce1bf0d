"""Models of timm become ours with the same output, and what has no counterpart is refused."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

from zoo.convert import from_timm
from zoo.models import PRESETS, create_model
from zoo.models.base import count_parameters

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
HEADS = {"heads": 4}
MODEL_ONLY = None
WIDE_EPS = functools.partial(nn.LayerNorm, eps=1e-3)
CLIP = {"pre_norm": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5), "act_layer": "quick_gelu"}
SIGLIP = {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"}
NO_DIMS = {"class_token": False, "global_pool": "avg"}


def wider_heads(model):
    for block in model.blocks:
        block.attn = Attention(32, 4, attn_head_dim=12, qkv_bias=True)


def gate(model):
    model.blocks[0].attn.gate = nn.Linear(32, 32)


def one_eps(model):
    model.blocks[1].norm1.eps = 1e-3


def two_heads(model):
    model.blocks[1].attn.num_heads = 2
    model.blocks[1].attn.head_dim = 16


def averaged(model):
    model.attn_pool.pool = "avg"


def pooled_by_two(model):
    model.attn_pool.num_heads = 2


def nested_head(model):
    model.head = nn.Sequential(model.head)


def extra(model):
    model.extra = nn.Parameter(torch.ones(2))


# The arguments of timm's model, and what its state dict does not say.
VARIANTS = {
    "token": ({}, HEADS),
    "token, fc_norm": ({"fc_norm": True}, HEADS | {"pool": "token"}),
    "average": (NO_DIMS, HEADS),
    "average, class token": ({"global_pool": "avg"}, HEADS),
    "average, norm before": (NO_DIMS | {"fc_norm": False}, HEADS),
    "average, norm before, class token": ({"global_pool": "avg", "fc_norm": False}, HEADS | {"pool": "avg"}),
    "average, prefix asked for and absent": (NO_DIMS | {"pool_include_prefix": True}, HEADS),
    "distilled": ({"distilled": True}, HEADS),
    "distilled, bare": ({"distilled": True, "num_classes": 0}, HEADS),
    "bare": ({"num_classes": 0}, HEADS),
    "bare, average": (NO_DIMS | {"num_classes": 0}, HEADS),
    "registers": ({"reg_tokens": 3}, HEADS),
    "registers, average": (NO_DIMS | {"reg_tokens": 3}, HEADS),
    "registers, class token, average": ({"global_pool": "avg", "reg_tokens": 2}, HEADS),
    "no_embed_class": ({"no_embed_class": True}, HEADS),
    "no_embed_class, registers": ({"no_embed_class": True, "reg_tokens": 4}, HEADS),
    "layer scale": ({"init_values": 0.1}, HEADS),
    "qk_norm": ({"qk_norm": True}, {}),
    "no qkv bias": ({"qkv_bias": False}, HEADS),
    "no projection bias": ({"proj_bias": False}, HEADS),
    "heads of another width": ({"change": wider_heads}, HEADS),
    "norms inside": ({"scale_attn_norm": True, "scale_mlp_norm": True}, HEADS),
    "norm inside mlp": ({"scale_mlp_norm": True}, HEADS),
    "swiglu": ({"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2.5}, HEADS),
    "swiglu, no bias": ({"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "proj_bias": False, "mlp_ratio": 3}, HEADS),
    "swiglu, packed": ({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.0}, HEADS),
    "swiglu of odd width": ({"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2.1}, HEADS),
    "clip": (CLIP, HEADS | {"norm": "layernorm(eps=1e-05)", "activation": "quick_gelu"}),
    "siglip": (SIGLIP, HEADS | {"activation": "gelu_tanh"}),
    "attention pool, class token": (
        SIGLIP | {"class_token": True, "reg_tokens": 1},
        HEADS | {"activation": "gelu_tanh"},
    ),
    "attention pool, no head": ({"global_pool": "map", "class_token": False, "num_classes": 0}, HEADS),
    "mlp of odd width": ({"mlp_ratio": 2.3}, HEADS),
    "gelu by its name": ({"act_layer": "gelu"}, HEADS),
    "gelu_tanh": ({"act_layer": "gelu_tanh"}, HEADS | {"activation": "gelu_tanh"}),
    "gelu_tanh of torch": (
        {"act_layer": functools.partial(nn.GELU, approximate="tanh")},
        HEADS | {"activation": "gelu_tanh"},
    ),
    "relu": ({"act_layer": nn.ReLU}, HEADS | {"activation": "relu"}),
    "silu": ({"act_layer": "silu"}, HEADS | {"activation": "silu"}),
    "another eps": ({"norm_layer": WIDE_EPS}, HEADS | {"norm": "layernorm(eps=0.001)"}),
    "rmsnorm": ({"norm_layer": functools.partial(RmsNorm, eps=1e-3)}, HEADS | {"norm": "rmsnorm(eps=0.001)"}),
    "norms without bias": ({"norm_layer": functools.partial(nn.LayerNorm, eps=1e-6, bias=False)}, MODEL_ONLY),
    "norms without weight": (
        {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)},
        MODEL_ONLY,
    ),
    "one channel": ({"in_chans": 1}, HEADS),
    "five channels, patch 2": ({"in_chans": 5, "patch_size": 2}, HEADS),
    "one block": ({"depth": 1}, HEADS),
    "eleven blocks": ({"depth": 11}, HEADS),
    "any size": ({"dynamic_img_size": True, "dynamic_img_pad": True}, HEADS),
    "dropped in training": (
        {"drop_rate": 0.5, "pos_drop_rate": 0.5, "patch_drop_rate": 0.5, "proj_drop_rate": 0.5}
        | {"attn_drop_rate": 0.5, "drop_path_rate": 0.5},
        HEADS,
    ),
    "no positions": ({"pos_embed": "none"}, MODEL_ONLY),
    "no positions, not square": ({"pos_embed": "none", "img_size": (12, 20), "reg_tokens": 1}, MODEL_ONLY),
    "usual heads": ({"embed_dim": 128, "num_heads": 2, "depth": 1}, {}),
}


def build(distilled: bool = False, change=None, **choices) -> VisionTransformer:
    """A model of timm in fp64 whose every parameter is random."""
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**(SMALL | choices))
    if change is not None:
        change(model)
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest wanted value."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def pictures(model: VisionTransformer) -> torch.Tensor:
    return torch.randn(3, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_model_gives_the_same_output(name):
    model = build(**VARIANTS[name][0])
    images = pictures(model)
    wanted = model(images)
    wanted.square().sum().backward()
    idle = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.abs().max() > 0]
    assert not idle, "these would not be noticed"
    ours = from_timm(model.train())
    assert model.training and not any(module.training for module in ours.modules())
    assert relative(ours(images), wanted) < 1e-10


@pytest.mark.parametrize("name", ["token", "distilled", "no_embed_class, registers", "clip", "siglip", "any size"])
def test_other_sizes_give_the_same_output(name):
    model = build(**(VARIANTS[name][0] | {"dynamic_img_size": True}))
    ours = from_timm(model)
    for sides in ((8, 8), (28, 28), (12, 24), (32, 8)):
        images = torch.randn(2, 3, *sides, dtype=torch.float64)
        assert relative(ours(images), model(images)) < 1e-6  # timm resizes the table in single precision


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224"]
    + ["vit_so400m_patch14_siglip_224", "vit_so400m_patch16_siglip_gap_256", "vit_small_patch14_reg4_dinov2"],
)
def test_published_models_are_taken(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = from_timm(model)
    assert ours.num_features == model.num_features
    assert not model.num_classes or ours.config.classes == model.num_classes


@pytest.mark.parametrize("name", [name for name, (_, hints) in VARIANTS.items() if hints is not MODEL_ONLY])
def test_state_dict_gives_the_same_output(name):
    choices, hints = VARIANTS[name]
    model = build(**choices)
    images = pictures(model)
    ours = from_timm(model.state_dict(), **hints)
    assert relative(ours(images), model(images)) < 1e-10
    straight = from_timm(model).config
    if ours.config.layer_scale is not None:  # where it started, which tensors do not tell
        assert straight.layer_scale == 0.1 and ours.config.layer_scale == 1e-5
    else:
        assert ours.config == straight


@pytest.mark.parametrize("name", ["token", "distilled", "swiglu, packed", "registers, average"])
def test_file_gives_the_same_output(name, tmp_path):
    choices, hints = VARIANTS[name]
    model = build(**choices).float()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = from_timm(load_file(tmp_path / "model.safetensors"), **hints)
    images = pictures(model).float()
    assert relative(ours(images), model(images)) < 1e-5


@pytest.mark.parametrize("name", ["token", "distilled", "no_embed_class, registers", "no qkv bias"])
def test_result_is_a_model_of_its_config(name):
    model = build(**VARIANTS[name][0])
    ours = from_timm(model)
    images = pictures(model)
    again = ours.config.build().double().eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(images), ours(images))
    assert all(parameter.requires_grad for parameter in ours.parameters())
    wanted = model(images)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(model(images), wanted)


def test_dtype_is_kept():
    ours = from_timm(build().bfloat16())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("choices", [{}, {"reg_tokens": 2, "init_values": 0.1}, NO_DIMS])
def test_features_are_the_maps_between_the_blocks(choices):
    model = build(**choices)
    images = pictures(model)
    wanted = model.forward_intermediates(images, norm=False, intermediates_only=True)
    got = from_timm(model).features(images)
    assert [each.shape for each in got] == [(3, 32, 4, 4)] * 2
    for ours, theirs in zip(got, wanted, strict=True):
        assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_deit_presets_are_timm_models(size):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224")
        ours = create_model(f"deit_{size}")
    assert count_parameters(ours) == count_parameters(model)
    for source in (model, model.state_dict()):
        assert replace(from_timm(source).config, position="learned") == PRESETS[f"deit_{size}"]


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_vit_presets_lack_class_token_and_positions(size):
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch16_224")
        ours = create_model(f"vit_{size}")
    assert count_parameters(ours) == count_parameters(model) - model.cls_token.numel() - model.pos_embed.numel()
    taken = replace(from_timm(model).config, class_token=False, pool="mean", position="sincos")
    assert taken == PRESETS[f"vit_{size}"]


class OwnViT(VisionTransformer):
    pass


REFUSED_MODELS = {
    "'patch_embed.norm'": lambda: build(embed_norm_layer=functools.partial(nn.LayerNorm, elementwise_affine=False)),
    "got 'max'": lambda: build(global_pool="max"),
    "got 'avgmax'": lambda: build(global_pool="avgmax"),
    "got ''": lambda: build(change=lambda model: model.reset_classifier(0, "")),
    "pool_include_prefix": lambda: build(global_pool="avg", pool_include_prefix=True),
    "pool_include_prefix=True": lambda: build(global_pool="map", pool_include_prefix=True),
    "fc_norm behind attention pooling": lambda: build(global_pool="map", fc_norm=True),
    "one query without positions": lambda: build(global_pool="map", change=averaged),
    "one number of heads throughout": lambda: build(global_pool="map", change=pooled_by_two),
    "one final norm": lambda: build(final_norm=False),
    r"queries and keys, got 'layernorm\(eps=0.001\)'": lambda: build(qk_norm=True, norm_layer=WIDE_EPS),
    "queries and keys, got 'rmsnorm'": lambda: build(qk_norm=True, norm_layer=RmsNorm),
    "inside attention without one inside mlp": lambda: build(scale_attn_norm=True),
    "one norm throughout": lambda: build(change=one_eps),
    "one number of heads": lambda: build(change=two_heads),
    "Mish": lambda: build(act_layer="mish"),
    r"only with silu on the first half \(SwiGLU\)$": lambda: build(mlp_layer=SwiGLU),
    "first half": lambda: build(mlp_layer=functools.partial(SwiGLUPacked, gate_last=True), act_layer=nn.SiLU),
    "ResPostBlock": lambda: build(block_fn=ResPostBlock),
    "ParallelScalingBlock": lambda: build(block_fn=ParallelScalingBlock),
    "'blocks.0.attn.gate'": lambda: build(change=gate),
    "got 16 x 24": lambda: build(img_size=(16, 24)),
    "got 18 x 18 and patch 4": lambda: build(img_size=18),
    "square patches, got 4 x 2": lambda: build(patch_size=(4, 2)),
    "either registers or a distillation token": lambda: build(distilled=True, reg_tokens=2),
    "distilled models with fc_norm": lambda: build(distilled=True, fc_norm=True),
    "or no_embed_class": lambda: build(distilled=True, no_embed_class=True),
    "not OwnViT": lambda: OwnViT(**SMALL),
    "not Beit": lambda: timm.models.beit.Beit(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4),
    "not Linear": lambda: nn.Linear(2, 2),
    "'head' being Sequential": lambda: build(change=nested_head),
    "'extra' has no counterpart": lambda: build(change=extra),
}


@pytest.mark.parametrize("message", REFUSED_MODELS)
def test_models_without_counterpart_are_refused(message):
    model = REFUSED_MODELS[message]()
    with pytest.raises(ValueError, match=message) as error:
        from_timm(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hint", [{"heads": 4}, {"pool": "token"}, {"norm": "layernorm"}, {"activation": "gelu"}])
def test_a_model_takes_no_hints(hint):
    with pytest.raises(ValueError, match="omit them where a model is given"):
        from_timm(build(), **hint)


def without(*names, **choices):
    return {key: value for key, value in build(**choices).state_dict().items() if key not in names}


def huge():
    with torch.device("meta"):
        return VisionTransformer(embed_dim=1280, num_heads=16, depth=1)


def added(state, **more):
    return state | {name.replace("__", "."): value for name, value in more.items()}


REFUSED_STATES = {
    "not list": (lambda: [], {}),
    "'model' is dict": (lambda: {"model": without()}, {}),
    "'step' is torch.int64": (lambda: added(without(), step=torch.tensor(3)), {}),
    "no 'patch_embed.proj.weight'": (lambda: without("patch_embed.proj.weight"), {}),
    "'cls_token' must have 3 axes": (lambda: added(without(), cls_token=torch.zeros(32)), {}),
    "give heads=$": (lambda: without(), {}),
    "width 1280 has no usual one": (lambda: huge().state_dict(), {}),
    "heads must divide the 32 channels of the queries, got 5": (lambda: without(), {"heads": 5}),
    "got 'mean'": (lambda: without(), HEADS | {"pool": "mean"}),
    "'token' for a distilled model": (lambda: without(distilled=True), HEADS | {"pool": "avg"}),
    "needs a class token": (lambda: build(**NO_DIMS).state_dict(), HEADS | {"pool": "token"}),
    "norm must be 'layernorm' or 'rmsnorm'": (lambda: without(), HEADS | {"norm": "batchnorm"}),
    "unknown option of layernorm 'epsilon'": (lambda: without(), HEADS | {"norm": "layernorm(epsilon=1.0)"}),
    "unknown activation 'mish'": (lambda: without(), HEADS | {"activation": "mish"}),
    "a norm without a bias is ambiguous": (lambda: build(norm_layer=RmsNorm).state_dict(), HEADS),
    "'blocks.0.norm1.bias' has no counterpart": (lambda: without(), HEADS | {"norm": "rmsnorm"}),
    "queries and keys, got": (lambda: without(qk_norm=True), {"norm": "layernorm(eps=0.001)"}),
    "got 'gelu'": (lambda: build(mlp_layer=SwiGLU).state_dict(), HEADS | {"activation": "gelu"}),
    "without 'pos_embed'": (lambda: without("pos_embed"), HEADS),
    "not a square grid": (lambda: build(img_size=(16, 28)).state_dict(), HEADS),
    "one final norm": (lambda: without("norm.weight", "norm.bias"), HEADS),
    "'norm.bias' is missing": (lambda: without("norm.bias"), HEADS),
    "'blocks.1.attn.qkv.bias' is missing": (lambda: without("blocks.1.attn.qkv.bias"), HEADS),
    "'blocks.1.norm2.weight' is missing": (lambda: without("blocks.1.norm2.weight"), HEADS),
    "'head.bias' is missing": (lambda: without("head.bias"), HEADS),
    "'norm_pre.bias' is missing": (
        lambda: added(without("patch_embed.proj.bias"), norm_pre__weight=torch.ones(32)),
        HEADS | {"norm": "layernorm"},
    ),
    "does not hold eps; give norm=": (lambda: build(**CLIP).state_dict(), HEADS),
    "pool is 'map' for models with 'attn_pool.latent', and only for these, got 'avg'": (
        lambda: build(**SIGLIP).state_dict(),
        HEADS | {"pool": "avg"},
    ),
    "'blocks.0.gamma_1' has no": (lambda: added(without(), blocks__0__gamma_1=torch.ones(32)), HEADS),
    r"'blocks.1.mlp.fc1.weight' has shape \[64, 32\]": (
        lambda: added(without(), blocks__1__mlp__fc1__weight=torch.ones(64, 32)),
        HEADS,
    ),
    "'head_dist.weight' has no": (lambda: added(without(), head_dist__weight=torch.ones(7, 32)), HEADS),
    "'blocks.1.attn.proj.bias' is missing": (lambda: without("blocks.1.attn.proj.bias"), HEADS),
    "'blocks.0.mlp.fc2.bias' is missing": (lambda: without("blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias"), HEADS),
    "'blocks.2.attn.qkv.weight' is missing": (lambda: added(without(), blocks__2__norm3__bias=torch.ones(32)), HEADS),
    "tokens in front of the grid do not fit": (
        lambda: added(without(reg_tokens=2), reg_token=torch.ones(1, 2, 8)),
        HEADS,
    ),
    "halves of 'blocks.1.mlp.fc1.weight' do not fit": (
        lambda: added(without(mlp_layer=SwiGLU), blocks__1__mlp__fc1_x__weight=torch.ones(128, 8)),
        HEADS,
    ),
    "'blocks.1.ls1.gamma' is missing": (lambda: without("blocks.1.ls1.gamma", init_values=0.1), HEADS),
}


@pytest.mark.parametrize("message", REFUSED_STATES)
def test_state_dicts_without_counterpart_are_refused(message):
    state, hints = REFUSED_STATES[message]
    with pytest.raises(ValueError, match=message) as error:
        from_timm(state(), **hints)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_importing_the_converter_leaves_timm_alone():
    code = "import sys, zoo, zoo.convert; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", ["3", "900", "9" * 9])
def test_blocks_that_are_not_there_are_not_built(number):
    """A name may claim any number of blocks."""
    state = build().state_dict() | {f"blocks.{number}.norm1.weight": torch.zeros(32)}
    with pytest.raises(ValueError, match=f"'blocks.2' has no tensors, but 'blocks.{number}' has;"):
        from_timm(state, heads=4)


def test_a_block_of_an_endless_number_has_no_counterpart():
    state = build().state_dict() | {f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(32)}
    with pytest.raises(ValueError, match="has no counterpart") as caught:
        from_timm(state, heads=4)
    assert len(str(caught.value)) < 1000
