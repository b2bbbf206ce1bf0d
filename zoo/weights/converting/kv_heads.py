"""Keys and values that heads share, from a trained model with more of them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.choices import TABLES
from zoo.config import ModelConfig
from zoo.layer import copied
from zoo.mixers.projected import Projected
from zoo.models.base import Model
from zoo.spec import each_name, options_of, parse, respelled
from zoo.weights.origin import inherit


def share_kv_heads(model: nn.Module, kv_heads: int) -> Model:
    """A copy of a model, in eval mode, whose heads share `kv_heads` keys and values: each is the mean of those that it
    replaces (GQA, Ainslie et al. 2023, arXiv:2305.13245). Outputs change, so train it further.

    Raises:
        ValueError: a mixer has no option kv_heads, or kv_heads does not divide its present number; or the model is
            fused.
    """
    twin = copied(model).eval()
    if not isinstance(twin, Model) or not isinstance(config := twin.config, ModelConfig):
        raise ValueError("kv_heads needs a model of the zoo with blocks")
    if twin.fusion is not None:
        raise ValueError("kv_heads: the model is fused; start from the unfused one")

    def shared(spec: str) -> str:
        if "kv_heads" not in options_of(TABLES["mixer"][parse(spec)[0]]):
            raise ValueError(f"kv_heads: mixer '{spec}' has no such option")
        return respelled(spec, kv_heads=kv_heads)

    made = replace(config, mixer=each_name(config.mixer, shared)).build().eval()
    assert isinstance(made, Model)
    if made.config == config:
        raise ValueError(f"the model has kv_heads={kv_heads} already")
    with torch.no_grad():
        for path, mixer in twin.named_modules():
            new = made.get_submodule(path)
            if not isinstance(mixer, Projected) or not isinstance(new, Projected) or new.kv_heads == mixer.kv_heads:
                continue  # such as a decoder's mixer, which is not that of the config
            if mixer.kv_heads % kv_heads:
                raise ValueError(f"kv_heads must divide the {mixer.kv_heads} that the model has, got {kv_heads}")
            if new.qkv.weight.shape == mixer.qkv.weight.shape:
                continue  # a mixer that makes the means itself
            mixer.qkv.weight = nn.Parameter(_means(mixer, mixer.qkv.weight, kv_heads))
            if mixer.qkv.bias is not None:
                mixer.qkv.bias = nn.Parameter(_means(mixer, mixer.qkv.bias, kv_heads))
    made.to(next(twin.parameters()))
    made.load_state_dict(twin.state_dict())
    inherit(made, twin)
    return made


def _means(mixer: Projected, rows: Tensor, kv_heads: int) -> Tensor:
    """The rows of the projection with those of keys and values averaged in groups of neighbouring heads."""
    query, *others = rows.split(mixer.widths)
    grouped = [each.unflatten(0, (kv_heads, -1, mixer.head_dim)).mean(1).flatten(0, 1) for each in others]
    return torch.cat([query, *grouped])
