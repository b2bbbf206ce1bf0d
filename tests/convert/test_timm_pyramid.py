"""MetaFormer and DaVit of timm become pyramids with the same output, and what has no counterpart is refused."""

import functools

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import GroupNorm1, LayerNorm2d
from timm.models.davit import DaVit
from timm.models.metaformer import (
    Attention,
    GroupNorm1NoBias,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    MetaFormerBlock,
    Pooling,
    SepConv,
    SquaredReLU,
)
from torch import nn

from helpers import randomise, relative
from zoo.convert import from_timm
from zoo.models import PRESETS, create_model
from zoo.models.base import count_parameters

TOLD, UNTOLD = True, False  # whether a state dict tells all that differs from timm's presets
META = {"depths": (2, 1), "dims": (16, 32), "res_scale_init_values": (None, 1.0), "num_classes": 7}
POOL = {"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "norm_layers": GroupNorm1}
POOL |= {"layer_scale_init_values": 1e-5, "res_scale_init_values": None, "use_mlp_head": False}
CONV = {"token_mixers": SepConv}
CA = {"token_mixers": [SepConv, Attention], "norm_layers": [LayerNorm2dNoBias, LayerNormNoBias]}
DAVIT = {"depths": (1, 2), "embed_dims": (32, 64), "num_heads": (1, 2), "num_classes": 7, "window_size": 2}
SEVEN = {"window_size": 7}
WIDE_EPS = functools.partial(LayerNorm2dNoBias, eps=1e-3)


def both(norm):
    return {"downsample_norm": norm, "norm_layers": norm}


# The class of timm's model, its arguments, and what its state dict tells.
VARIANTS = {
    "poolformer": (MetaFormer, POOL, TOLD),
    "poolformer, bare": (MetaFormer, POOL | {"num_classes": 0}, TOLD),
    "poolformer, no layer scale": (MetaFormer, POOL | {"layer_scale_init_values": None}, TOLD),
    "poolformer, scaled shortcuts": (MetaFormer, POOL | {"res_scale_init_values": 1.0}, TOLD),
    "poolformer, mlp head": (MetaFormer, POOL | {"use_mlp_head": True}, TOLD),
    "poolformer, no mlp bias": (MetaFormer, POOL | {"mlp_bias": False}, TOLD),
    "poolformer, no last mlp bias": (MetaFormer, POOL | {"mlp_bias": (True, False)}, TOLD),
    "poolformer, star_relu": (MetaFormer, POOL | {"mlp_act": timm.models.metaformer.StarReLU}, TOLD),
    "poolformer, relu": (MetaFormer, POOL | {"mlp_act": nn.ReLU}, UNTOLD),
    "poolformer, gelu_tanh": (MetaFormer, POOL | {"mlp_act": functools.partial(nn.GELU, approximate="tanh")}, UNTOLD),
    "poolformer, silu": (MetaFormer, POOL | {"mlp_act": nn.SiLU}, UNTOLD),
    "poolformer, pooling over 5": (MetaFormer, POOL | {"pool_size": 5}, UNTOLD),
    "poolformer, group norm in stem and head": (
        MetaFormer,
        POOL | both(GroupNorm1) | {"output_norm": GroupNorm1},
        UNTOLD,
    ),
    "poolformer, eps": (MetaFormer, POOL | {"norm_layers": functools.partial(GroupNorm1, eps=1e-3)}, UNTOLD),
    "pooling and layer norm": (MetaFormer, {}, UNTOLD),
    "identityformer": (MetaFormer, {"token_mixers": nn.Identity}, UNTOLD),
    "convformer": (MetaFormer, CONV, TOLD),
    "convformer, bare": (MetaFormer, CONV | {"num_classes": 0}, TOLD),
    "convformer, linear head": (MetaFormer, CONV | {"use_mlp_head": False}, TOLD),
    "convformer, layer scale": (MetaFormer, CONV | {"layer_scale_init_values": 1e-5}, TOLD),
    "convformer, wider": (MetaFormer, CONV | {"expansion_ratio": 3, "kernel_size": 5, "padding": 2}, TOLD),
    "convformer, odd width": (MetaFormer, CONV | {"expansion_ratio": 1.3, "dims": (12, 23)}, TOLD),
    "convformer, biased norms": (MetaFormer, CONV | both(LayerNorm2d), TOLD),
    "convformer, another last norm": (
        MetaFormer,
        CONV | {"output_norm": LayerNorm2dNoBias, "use_mlp_head": False},
        TOLD,
    ),
    "convformer, no norm in front": (MetaFormer, CONV | {"downsample_norm": None}, TOLD),
    "convformer, eps": (MetaFormer, CONV | both(WIDE_EPS), UNTOLD),
    "caformer": (MetaFormer, CA, TOLD),
    "caformer, biased queries": (MetaFormer, CA | {"qkv_bias": True}, TOLD),
    "caformer, biased output": (MetaFormer, CA | {"proj_bias": True}, TOLD),
    "caformer, biases": (MetaFormer, CA | {"proj_bias": True, "qkv_bias": True, "mlp_bias": True}, TOLD),
    "caformer, narrow heads": (MetaFormer, CA | {"head_dim": 16}, UNTOLD),
    "pooling, attention": (
        MetaFormer,
        POOL | {"token_mixers": [Pooling, Attention], "norm_layers": [GroupNorm1, nn.LayerNorm]},
        UNTOLD,
    ),
    "one channel, one stage": (MetaFormer, CONV | {"in_chans": 1, "dims": (8,), "depths": (1,)}, TOLD),
    "three stages, eleven blocks": (
        MetaFormer,
        CONV | {"dims": (8, 12, 16), "depths": (1, 11, 1)} | {"res_scale_init_values": None},
        TOLD,
    ),
    "dropped in training": (
        MetaFormer,
        CA | {"drop_rate": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop": 0.5},
        TOLD,
    ),
    "davit": (DaVit, SEVEN, TOLD),
    "davit, bare": (DaVit, SEVEN | {"num_classes": 0}, TOLD),
    "davit, norm first": (DaVit, SEVEN | {"head_norm_first": True}, TOLD),
    "davit, norm first, bare": (DaVit, SEVEN | {"head_norm_first": True, "num_classes": 0}, TOLD),
    "davit, no qkv bias": (DaVit, SEVEN | {"qkv_bias": False}, TOLD),
    "davit, odd width": (DaVit, SEVEN | {"mlp_ratio": 2.3}, TOLD),
    "davit, kernel 3": (DaVit, SEVEN | {"down_kernel_size": 3}, TOLD),
    "davit, one channel": (DaVit, SEVEN | {"in_chans": 1}, TOLD),
    "davit, dropped in training": (DaVit, SEVEN | {"drop_rate": 0.5, "drop_path_rate": 0.5}, TOLD),
    "davit, windows of 2": (DaVit, {}, UNTOLD),
    "davit, windows alone": (DaVit, {"attn_types": ("spatial",)}, UNTOLD),
    "davit, channels first": (DaVit, {"attn_types": ("channel", "spatial")}, UNTOLD),
    "davit, three in turns": (DaVit, {"attn_types": ("spatial", "spatial", "channel")}, UNTOLD),
    "davit, other heads": (DaVit, {"num_heads": (4, 2)}, UNTOLD),
    "davit, eps": (DaVit, {"norm_eps": 1e-3}, UNTOLD),
    "davit, one stage": (DaVit, {"depths": (1,), "embed_dims": (8,), "num_heads": (2,)}, UNTOLD),
}


def build(kind=MetaFormer, change=None, **choices) -> nn.Module:
    """A model of timm in fp64, none of whose parameters is as it starts."""
    model = kind(**((META if kind is MetaFormer else DAVIT) | choices))
    if change is not None:
        change(model)
    return randomise(model.double()).eval()


def pictures(model: nn.Module) -> torch.Tensor:
    size = (56, 56) if isinstance(model, DaVit) and window(model) == 7 else (32, 64)
    return torch.randn(2, model.stem.conv.in_channels, *size, dtype=torch.float64)


def unheard(model: nn.Module) -> set[str]:
    """The biases in front of pooling, which takes them away again."""
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, MetaFormerBlock)}
    return {f"{name}.norm1.bias" for name, block in blocks.items() if isinstance(block.token_mixer, Pooling)}


def window(model: nn.Module) -> int:
    return next(getattr(module, "window_size", (0,))[0] for module in model.modules() if hasattr(module, "window_size"))


@pytest.mark.parametrize("name", VARIANTS)
def test_model_gives_the_same_output(name):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices)
    images = pictures(model)
    wanted = model(images)
    wanted.square().sum().backward()
    idle = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.abs().max() > 1e-12]
    assert set(idle) <= unheard(model), "these would not be noticed"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = from_timm(model.train())
    assert model.training and not any(module.training for module in ours.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert relative(ours(images), wanted) < 1e-10


@pytest.mark.parametrize("name", [name for name, (_, _, told) in VARIANTS.items() if told])
def test_state_dict_gives_the_same_output(name):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices)
    images = pictures(model)
    ours = from_timm(model.state_dict())
    assert relative(ours(images), model(images)) < 1e-10
    assert ours.config == from_timm(model).config


@pytest.mark.parametrize("name", ["poolformer", "caformer, biases", "convformer, bare", "davit", "davit, norm first"])
def test_features_are_the_maps_of_the_stages(name):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices)
    images = pictures(model)
    wanted = model.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(from_timm(model).features(images), wanted, strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-10


def test_features_are_those_of_features_only():
    model = build(DaVit)
    choices = {name: value for name, value in DAVIT.items() if name != "num_classes"}
    maps = timm.create_model("davit_tiny", features_only=True, **choices).double()
    state = {key.replace("stages.", "stages_"): value for key, value in model.state_dict().items()}
    maps.load_state_dict({key: value for key, value in state.items() if not key.startswith("head")})
    images = pictures(model)
    for ours, theirs in zip(from_timm(model).features(images), maps.eval()(images), strict=True):
        assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize(
    ("name", "size"),
    [("poolformer", (44, 36)), ("convformer", (36, 68)), ("caformer", (44, 100)), ("davit, windows of 2", (30, 46))],
)
def test_odd_grids_give_the_same_output(name, size):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    assert relative(from_timm(model)(images), model(images)) < 1e-10


@pytest.mark.parametrize("name", ["poolformer", "caformer", "davit"])
def test_file_gives_the_same_output(name, tmp_path):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices).float()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = from_timm(load_file(tmp_path / "model.safetensors"))
    images = pictures(model).float()
    assert relative(ours(images), model(images)) < 1e-5


@pytest.mark.parametrize("name", ["poolformer", "caformer, biased output", "davit, no qkv bias"])
def test_result_is_a_model_of_its_config(name):
    kind, choices, _ = VARIANTS[name]
    model = build(kind, **choices)
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
    assert torch.equal(model(images), wanted), "memory is shared"


def test_biases_in_front_of_pooling_are_taken():
    model = build(**POOL)
    ours = from_timm(model).state_dict()
    for stage, block in ((0, 0), (0, 1), (1, 0)):
        bias = model.get_parameter(f"stages.{stage}.blocks.{block}.norm1.bias")
        assert torch.equal(ours[f"stages.{stage}.blocks.{block}.steps.0.before.bias"], bias)


@pytest.mark.parametrize("kind", [MetaFormer, DaVit])
def test_dtype_is_kept(kind):
    ours = from_timm(build(kind).bfloat16())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


@pytest.mark.all
@pytest.mark.parametrize(
    ("name", "side"), [("poolformer_s12", 64), ("convformer_s18", 64), ("caformer_s18", 64), ("davit_tiny", 224)]
)
def test_full_size_gives_the_same_output(name, side):
    model = randomise(timm.create_model(name)).eval()
    images = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        assert relative(from_timm(model)(images), model(images)) < 1e-5


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformer_s24", "convformer_s18", "caformer_s18", "davit_tiny"])
def test_presets_are_timm_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = create_model(name)
    assert count_parameters(ours) == count_parameters(model)
    assert from_timm(model).config == PRESETS[name]
    assert from_timm(model.state_dict()).config == PRESETS[name]


LARGER = {  # dim, depth, heads
    "poolformer_m48": ((96, 192, 384, 768), (8, 8, 24, 8), None),
    "convformer_b36": ((128, 256, 512, 768), (3, 12, 18, 3), None),
    "caformer_m36": ((96, 192, 384, 576), (3, 12, 18, 3), (3, 6, 12, 18)),
    "davit_base": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
}


@pytest.mark.all
@pytest.mark.parametrize("name", LARGER)
def test_larger_models_are_taken(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    ours = from_timm(model)
    dim, depth, heads = LARGER[name]
    assert (ours.config.dim, ours.config.depth) == (dim, depth) and heads in (None, ours.config.heads)
    assert count_parameters(ours) == count_parameters(model)


class OwnMetaFormer(MetaFormer):
    pass


def one_eps(model):
    model.stages[0].blocks[1].norm2.eps = 1e-3


def mixed(model):
    model.stages[0].blocks[1].token_mixer = Pooling(5)


def extra(model):
    model.stem.extra = nn.Parameter(torch.ones(2))


def no_last_norm(model):
    model.norm_pre = nn.Identity()


def two_acts(model):
    model.stages[1].blocks[0].mlp.act = nn.ReLU()


V2 = {"norm_layers": GroupNorm1NoBias, "use_mlp_head": False}
REFUSED_MODELS = {
    "'stages.0.blocks.0.norm1' being GroupNorm1NoBias": lambda: build(**V2),
    "'stages.0.blocks.0.mlp.act' being Tanh": lambda: build(mlp_act=nn.Tanh),
    "'stages.0.blocks.0.mlp.act' being SquaredReLU": lambda: build(mlp_act=SquaredReLU),
    "'stages.0.blocks.0.token_mixer' being OwnMixer": lambda: build(token_mixers=OwnMixer),
    "'stages.0.blocks.0.token_mixer.act1' being ReLU": lambda: build(**CONV, act1_layer=nn.ReLU),
    "'stages.0.blocks.0.token_mixer.act2' being StarReLU": lambda: build(**CONV, act2_layer=StarReLU),
    "'stages.0.blocks.0.token_mixer.pwconv1.bias' has no": lambda: build(**CONV, bias=True),
    "global_pool.pool' being AdaptiveMaxPool2d": lambda: build(global_pool="max"),
    "global_pool.pool' being Identity": lambda: build(change=lambda model: model.reset_classifier(0, "")),
    "'head.norm' being Identity": lambda: build(change=lambda model: model.reset_classifier(0, "avg", True)),
    "'head.norm' being BatchNorm2d": lambda: build(output_norm=nn.BatchNorm2d),
    "one norm per stage": lambda: build(norm_layers=GroupNorm1),
    r"got \['layernorm\(bias=False\)', 'layernorm\(bias=False, eps=0.001\)'\]": lambda: build(change=one_eps),
    "one norm in the head": lambda: build(**CONV, output_norm=LayerNorm2dNoBias),
    "one token mixer per stage": lambda: build(change=mixed),
    "one activation": lambda: build(**POOL, change=two_acts),
    "whose norms have a weight": lambda: build(**both(functools.partial(LayerNorm2d, affine=False))),
    "'stages.1.downsample.conv.weight' is missing": lambda: build(dims=(16, 16)),
    "layer_scale1.scale' has no": lambda: build(layer_scale_init_values=(None, 0.1)),
    "'stages.1.blocks.0.layer_scale1.scale' is missing": lambda: build(layer_scale_init_values=(0.1, None)),
    "'stem.extra' has no": lambda: build(change=extra),
    "not OwnMetaFormer": lambda: OwnMetaFormer(**META),
    "not FeatureListNet": lambda: timm.create_model("poolformer_s12", features_only=True),
    "'stages.0.blocks.0.1.attn' being ChannelAttentionV2": lambda: build(DaVit, channel_attn_v2=True),
    "'stages.0.blocks.0.spatial_block' being": lambda: build(DaVit, named_blocks=True),
    "'stages.0.blocks.0.0.cpe1.act' being GELU": lambda: build(DaVit, cpe_act=True),
    "not one with ffn=False": lambda: build(DaVit, ffn=False, attn_types=("channel",)),
    "square windows, got 2 x 4": lambda: build(DaVit, window_size=(2, 4)),
    "'stem.norm' being RmsNorm2d": lambda: build(DaVit, norm_layer="rmsnorm2d"),
    "norm1' being RmsNorm": lambda: build(DaVit, norm_layer_cl="rmsnorm"),
    "kernel 4 and padding 0": lambda: build(DaVit, down_kernel_size=4),
    "the last norm in or before the head": lambda: build(DaVit, head_norm_first=True, change=no_last_norm),
}


class StarReLU(timm.models.metaformer.StarReLU):
    pass


class OwnMixer(nn.Conv2d):
    def __init__(self, dim: int, **more) -> None:
        super().__init__(dim, dim, 1)


@pytest.mark.parametrize("message", REFUSED_MODELS)
def test_models_without_counterpart_are_refused(message):
    model = REFUSED_MODELS[message]()
    with pytest.raises(ValueError, match=message) as error:
        from_timm(model)
    assert "\n" not in str(error.value)


def state(kind=MetaFormer, without=(), change=None, **choices):
    tensors = build(kind, **(choices or (CA if kind is MetaFormer else SEVEN))).state_dict()
    return {key: value for key, value in tensors.items() if key not in without} | (change or {})


FIRST = "stages.0.blocks.0"
REFUSED_STATES = {
    "this one has no 'stages.0.blocks.0.norm1.weight'": lambda: state(without=[f"{FIRST}.norm1.weight"]),
    "has no 'stages.0.blocks.0.norm1.weight'": lambda: state(DaVit, named_blocks=True),
    "'stages.0.blocks.0.norm1.bias' is missing: PoolFormerV2": lambda: state(**V2),
    "'stages.1.downsample.conv.weight' is missing": lambda: state(without=["stages.1.downsample.conv.weight"]),
    "'stages.1.downsample.norm.weight' is missing": lambda: state(**CONV, without=["stages.1.downsample.norm.weight"]),
    "'stages.0.blocks.1.mlp.fc1.weight' is missing": lambda: state(without=["stages.0.blocks.1.mlp.fc1.weight"]),
    "'stages.1.blocks.0.token_mixer.proj.weight' is missing": lambda: state(
        without=["stages.1.blocks.0.token_mixer.proj.weight"]
    ),
    "'stages.0.blocks.1.mlp.act.scale' is missing": lambda: state(without=["stages.0.blocks.1.mlp.act.scale"]),
    "'stages.1.blocks.0.res_scale2.scale' is missing": lambda: state(without=["stages.1.blocks.0.res_scale2.scale"]),
    "'head.norm.weight' is missing": lambda: state(without=["head.norm.weight"]),
    "'head.fc.fc1.weight' is missing": lambda: state(without=["head.fc.fc1.weight"]),
    "'head.fc.bias' is missing": lambda: state(**POOL, without=["head.fc.bias"]),
    "'stem.conv.bias' is missing": lambda: state(without=["stem.conv.bias"]),
    "'stages.0.blocks.1.norm2.bias' is missing": lambda: state(**POOL, without=["stages.0.blocks.1.norm2.bias"]),
    "'extra.weight' has no counterpart": lambda: state(change={"extra.weight": torch.ones(2)}),
    "'stages.0.blocks.0.cpe1.proj.weight' has no": lambda: state(change={f"{FIRST}.cpe1.proj.weight": torch.ones(1)}),
    "'stem.conv.weight' must have 4 axes": lambda: state(change={"stem.conv.weight": torch.ones(16, 3)}),
    r"got shape \[0, 3, 7, 7\]": lambda: state(change={"stem.conv.weight": torch.ones(0, 3, 7, 7)}),
    r"'stem.conv.weight' has shape \[16, 3, 5, 5\]": lambda: state(
        change={"stem.conv.weight": torch.ones(16, 3, 5, 5)}
    ),
    "fc2.weight' must have 2 or 4 axes": lambda: state(change={f"{FIRST}.mlp.fc2.weight": torch.ones(16)}),
    r"'stages.0.blocks.1.mlp.fc1.weight' has shape \[9, 16\]": lambda: state(
        change={"stages.0.blocks.1.mlp.fc1.weight": torch.ones(9, 16, 1, 1)}
    ),
    r"fc1.weight' has shape \[64, 16, 3, 3\]": lambda: state(
        change={f"{FIRST}.mlp.fc1.weight": torch.ones(64, 16, 3, 3)}
    ),
    "kernel must be odd, got 4": lambda: state(change={f"{FIRST}.token_mixer.dwconv.weight": torch.ones(32, 1, 4, 4)}),
    "width 40 has no usual one": lambda: state(**CA, dims=(16, 40), head_dim=20),
    "width 48 has no usual one": lambda: state(DaVit, embed_dims=(32, 48)),
    "attention in turns; give the model": lambda: state(DaVit, attn_types=("spatial",)),
    "'stages.1.blocks.1.1.cpe2.proj.bias' is missing": lambda: state(
        DaVit, without=["stages.1.blocks.1.1.cpe2.proj.bias"]
    ),
    "'stages.1.blocks.1.1.attn.qkv.bias' is missing": lambda: state(
        DaVit, without=["stages.1.blocks.1.1.attn.qkv.bias"]
    ),
    "'norm_pre.bias' is missing": lambda: state(DaVit, change={"norm_pre.weight": torch.ones(64)}),
    "'head.norm.weight' has no": lambda: state(
        DaVit, change={"norm_pre.weight": torch.ones(64), "norm_pre.bias": torch.ones(64)}
    ),
    "'stages.0.blocks.0.0.layer_scale1.scale' has no": lambda: state(
        DaVit, change={f"{FIRST}.0.layer_scale1.scale": torch.ones(32)}
    ),
}


@pytest.mark.parametrize("message", REFUSED_STATES)
def test_state_dicts_without_counterpart_are_refused(message):
    tensors = REFUSED_STATES[message]()
    with pytest.raises(ValueError, match=message) as error:
        from_timm(tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hint", [{"heads": 1}, {"pool": "avg"}, {"norm": "layernorm"}, {"activation": "gelu"}])
@pytest.mark.parametrize("kind", [MetaFormer, DaVit])
def test_hints_are_for_vision_transformers(kind, hint):
    with pytest.raises(ValueError, match="omit them where a model is given"):
        from_timm(build(kind), **hint)
    with pytest.raises(ValueError, match="are for vision transformers"):
        from_timm(state(kind), **hint)
