"""The modules that are allowed at each place of a timm model."""

import re
from importlib import import_module
from typing import Any

from torch import nn

from zoo.convert.timm.parts import SUPPORTED

Places = dict[str, tuple[type, ...]]

_NONE, _DROP, _LINEAR, _CONV = (nn.Identity,), (nn.Dropout,), (nn.Linear,), (nn.Conv2d,)


def check_parts(model: nn.Module) -> None:
    """Checks that every module of the model is one that is known at its place."""
    name = type(model).__name__
    file, places = _FAMILIES.get(name, ("", None))
    if places is None or type(model) is not getattr(import_module(f"timm.models.{file}"), name):
        raise ValueError(f"{SUPPORTED}, not {name}")
    known = places(import_module("timm.layers"))
    for name, module in model.named_modules():
        allowed = known.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), ())
        if name and type(module) not in allowed:
            words = ", ".join(sorted({kind.__name__ for kind in allowed})) or "nothing"
            raise ValueError(f"from_timm cannot take '{name}' being {type(module).__name__}; it takes {words} there")


def _under(prefix: str, places: Places) -> Places:
    return {f"{prefix}.{name}": kinds for name, kinds in places.items()}


def _vit(layers: Any) -> Places:
    vit: Any = import_module("timm.models.vision_transformer")
    norms = (nn.LayerNorm, layers.LayerNorm, layers.RmsNorm)
    attention = {"qkv": _LINEAR, "q_norm": (*_NONE, *norms), "k_norm": (*_NONE, *norms), "attn_drop": _DROP}
    attention |= {"norm": (*_NONE, *norms), "proj": _LINEAR, "proj_drop": _DROP}
    mlp = _mlp(layers) | {"fc1_g": _LINEAR, "fc1_x": _LINEAR, "norm": (*_NONE, *norms)}
    block = {"norm1": norms, "norm2": norms, "attn": (vit.Attention,)}
    block |= {"mlp": (layers.Mlp, layers.GluMlp, layers.SwiGLU)}
    block |= dict.fromkeys(("ls1", "ls2"), (*_NONE, layers.LayerScale))
    block |= dict.fromkeys(("drop_path1", "drop_path2"), (*_NONE, layers.DropPath))
    block |= _under("attn", attention) | _under("mlp", mlp)
    places = {"patch_embed": (layers.PatchEmbed,), "patch_embed.proj": _CONV, "patch_embed.norm": _NONE}
    places |= {"pos_drop": _DROP, "patch_drop": (*_NONE, layers.PatchDropout), "norm_pre": (*_NONE, *norms)}
    places |= _attention_pool(layers, norms)
    places |= {"blocks": (nn.Sequential,), "blocks.*": (vit.Block,)} | _under("blocks.*", block)
    places |= {"norm": (*_NONE, *norms), "fc_norm": (*_NONE, *norms), "head_drop": _DROP}
    return places | dict.fromkeys(("head", "head_dist"), (*_NONE, *_LINEAR))


def _eva(layers: Any) -> Places:
    eva: Any = import_module("timm.models.eva")
    norms = (nn.LayerNorm, layers.LayerNorm, layers.RmsNorm)
    attention = dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj", "proj"), _LINEAR)
    attention |= dict.fromkeys(("q_norm", "k_norm", "norm"), (*_NONE, *norms))
    attention |= {"attn_drop": _DROP, "proj_drop": _DROP}
    mlp = _mlp(layers) | {"fc1_g": _LINEAR, "fc1_x": _LINEAR, "norm": (*_NONE, *norms)}
    block = {"norm1": norms, "norm2": norms, "attn": (eva.EvaAttention, layers.AttentionRope)}
    block |= {"mlp": (layers.Mlp, layers.GluMlp, layers.SwiGLU)}
    block |= dict.fromkeys(("drop_path1", "drop_path2"), (*_NONE, layers.DropPath))
    block |= _under("attn", attention) | _under("mlp", mlp)
    places = {"patch_embed": (layers.PatchEmbed,), "patch_embed.proj": _CONV, "patch_embed.norm": _NONE}
    places |= {"pos_drop": _DROP, "patch_drop": (eva.PatchDropoutWithIndices,), "norm_pre": (*_NONE, *norms)}
    places |= {"rope": (layers.RotaryEmbeddingCat, layers.RotaryEmbeddingDinoV3)}
    places |= {"blocks": (nn.ModuleList,), "blocks.*": (eva.EvaBlock, eva.EvaBlockPostNorm)}
    places |= {"norm": (*_NONE, *norms), "fc_norm": (*_NONE, *norms), "head_drop": _DROP, "head": (*_NONE, *_LINEAR)}
    return places | _under("blocks.*", block) | _attention_pool(layers, norms)


def _attention_pool(layers: Any, norms: tuple[type, ...]) -> Places:
    pool = {"q": _LINEAR, "kv": _LINEAR, "q_norm": _NONE, "k_norm": _NONE, "proj": _LINEAR, "proj_drop": _DROP}
    pool |= {"norm": norms, "mlp": (layers.Mlp,)} | _under("mlp", _mlp(layers))
    return {"attn_pool": (layers.AttentionPoolLatent,)} | _under("attn_pool", pool)


def _mlp(layers: Any) -> Places:
    activations = (nn.GELU, layers.GELU, layers.GELUTanh, layers.QuickGELU, nn.SiLU, layers.Swish, nn.ReLU)
    return {"fc1": _LINEAR, "act": activations, "drop1": _DROP, "norm": _NONE, "fc2": _LINEAR, "drop2": _DROP}


def _metaformer(layers: Any) -> Places:
    timm: Any = import_module("timm.models.metaformer")
    rows = (nn.LayerNorm, layers.LayerNorm, timm.LayerNormNoBias)  # of tokens as rows
    maps = (layers.LayerNorm2d, layers.GroupNorm1, timm.LayerNorm2dNoBias)
    mixer = {"pool": (nn.AvgPool2d,), "qkv": _LINEAR, "attn_drop": _DROP, "proj": _LINEAR, "proj_drop": _DROP}
    mixer |= {"pwconv1": _CONV, "act1": (timm.StarReLU,), "act1.relu": (nn.ReLU,), "dwconv": _CONV, "act2": _NONE}
    mixer |= {"pwconv2": _CONV}
    mlp = _mlp(layers)
    mlp |= {"fc1": (*_LINEAR, *_CONV), "act": (*mlp["act"], timm.StarReLU), "act.relu": (nn.ReLU,)}
    mlp |= {"fc2": (*_LINEAR, *_CONV)}
    block = {"token_mixer": (*_NONE, timm.Pooling, timm.SepConv, timm.Attention), "mlp": (layers.Mlp,)}
    block |= dict.fromkeys(("norm1", "norm2"), (*rows, *maps))
    block |= dict.fromkeys(("drop_path1", "drop_path2"), (*_NONE, layers.DropPath))
    block |= dict.fromkeys(("layer_scale1", "layer_scale2", "res_scale1", "res_scale2"), (*_NONE, timm.Scale))
    block |= _under("token_mixer", mixer) | _under("mlp", mlp)
    head = {"fc": (*_NONE, *_LINEAR, timm.MlpHead), "fc.fc1": _LINEAR, "fc.act": (timm.SquaredReLU,)}
    head |= {"fc.act.relu": (nn.ReLU,), "fc.norm": rows, "fc.fc2": _LINEAR, "fc.head_drop": _DROP}
    places = {"stem": (timm.Stem,), "stem.norm": (*_NONE, *maps), "stages.*": (timm.MetaFormerStage,)}
    places |= {"stages.*.downsample": (*_NONE, timm.Downsampling), "stages.*.downsample.norm": (*_NONE, *maps)}
    places |= {"stages.*.blocks.*": (timm.MetaFormerBlock,)} | _under("stages.*.blocks.*", block)
    return places | {"head": (nn.Sequential,)} | _pyramid(layers) | _under("head", head) | {"head.norm": maps}


def _davit(layers: Any) -> Places:
    timm: Any = import_module("timm.models.davit")
    rows, maps = (nn.LayerNorm, layers.LayerNorm), (layers.LayerNorm2d,)
    block = {"norm1": rows, "norm2": rows, "attn": (timm.WindowAttention, timm.ChannelAttention), "mlp": (layers.Mlp,)}
    block |= {"attn.qkv": _LINEAR, "attn.proj": _LINEAR, "attn.softmax": (nn.Softmax,)}
    for name in ("cpe1", "cpe2"):
        block |= {name: (timm.ConvPosEnc,), f"{name}.proj": _CONV, f"{name}.act": _NONE}
    block |= dict.fromkeys(("drop_path1", "drop_path2"), (*_NONE, layers.DropPath)) | _under("mlp", _mlp(layers))
    places = {"stem": (timm.Stem,), "stem.norm": maps, "norm_pre": (*_NONE, *maps), "stages.*": (timm.DaVitStage,)}
    places |= {"stages.*.downsample": (*_NONE, timm.Downsample), "stages.*.downsample.norm": maps}
    places |= {"stages.*.blocks.*": (nn.Sequential,), "stages.*.blocks.*.*": (timm.SpatialBlock, timm.ChannelBlock)}
    places |= {"head": (layers.ClassifierHead, layers.NormMlpClassifierHead), "head.pre_logits": _NONE}
    places |= {"head.fc": (*_NONE, *_LINEAR), "head.norm": maps}
    return places | _under("stages.*.blocks.*.*", block) | _pyramid(layers)


def _pyramid(layers: Any) -> Places:
    """The parts that MetaFormer and DaVit share around their blocks."""
    places = {"stem.conv": _CONV, "stages": (nn.Sequential,), "stages.*.downsample.conv": _CONV}
    places |= {"stages.*.blocks": (nn.Sequential,), "head.global_pool": (layers.SelectAdaptivePool2d,)}
    places |= {"head.global_pool.pool": (nn.AdaptiveAvgPool2d,), "head.drop": _DROP}
    return places | dict.fromkeys(("head.flatten", "head.global_pool.flatten"), (*_NONE, nn.Flatten))


_FAMILIES = {
    "VisionTransformer": ("vision_transformer", _vit),
    "VisionTransformerDistilled": ("deit", _vit),
    "Eva": ("eva", _eva),
    "MetaFormer": ("metaformer", _metaformer),
    "DaVit": ("davit", _davit),
}
