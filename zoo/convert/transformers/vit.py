"""ViT, DeiT and DINOv2 of Hugging Face's transformers, read from their files without that library."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.convert.images import ConvertedClassifier
from zoo.convert.source import Section, Source
from zoo.convert.timm.parts import spelled, with_width
from zoo.convert.transformers.files import HARMLESS, id_names, read_folder, read_json
from zoo.convert.transformers.images import read_preprocess
from zoo.ffns import FFNS
from zoo.models.vit import ViT, ViTConfig
from zoo.tensors import shapes_alone
from zoo.text import one_line

VISION = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}
"""The kinds of models, and their usual image processors."""
_HARMLESS = (
    *HARMLESS,
    "apply_layernorm",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "encoder_stride",
    "hidden_dropout_prob",
    "initializer_range",
    "num_labels",
    "out_features",
    "out_indices",
    "pooler_act",
    "pooler_output_size",
    "reshape_hidden_states",
    "stage_names",
    "use_mask_token",
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
_ACTIVATIONS |= {"quick_gelu": "quick_gelu"}
# The names of version 4 and those used here, which are mostly those of version 5, in the order of their replacement.
_RENAMED = (
    (r"^(?:vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_UNUSED = r"pooler\.dense\.(weight|bias)|embeddings\.mask_token"
_TOKENS = ("cls_token", "distillation_token", "register_tokens")
# Our names within a block and theirs.
_PARTS = {
    "steps.0.before": ["norm1"],
    "steps.0.branch.qkv": [f"attention.{each}_proj" for each in "qkv"],
    "steps.0.branch.out": ["attention.o_proj"],
    "steps.1.before": ["norm2"],
    "steps.1.branch.expand": ["mlp.fc1"],
    "steps.1.branch.out": ["mlp.fc2"],
}
_SWIGLU = {"steps.1.branch.expand": ["mlp.gate_proj", "mlp.up_proj"], "steps.1.branch.out": ["mlp.down_proj"]}


def convert_vit(folder: Path) -> ConvertedClassifier:
    """Converts a ViT, a DeiT or a DINOv2, with or without a head; see `from_transformers`."""
    values = read_json(folder / "config.json")
    whole = Section(values, "", str(folder / "config.json"))
    kind = whole.fixed("model_type", *VISION)
    tensors = _renamed(read_folder(folder))
    names = id_names(values, whole)
    architectures = values.get("architectures")
    named = isinstance(architectures, list) and any("ForImageClassification" in str(each) for each in architectures)
    headed = named or any(re.match(r"(cls_)?classifier\.", name) for name in tensors)
    bias = whole.take("qkv_bias", bool, True)
    config = _config(whole, kind, len(names) if headed else 0, "distillation_classifier.weight" in tensors)
    whole.finish(*_HARMLESS)
    model = _filled(config, kind, Source(tensors, str(folder)), bias)
    labels = tuple(names) if headed and values.get("id2label") else None
    return ConvertedClassifier(model, read_preprocess(folder, VISION[kind], config.channels), labels)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under one set of names, without those that only pretraining or other uses have."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, other in _RENAMED:
            name = re.sub(theirs, other, name)
        if not re.fullmatch(_UNUSED, name):
            found[name] = tensor
    return found


def _config(whole: Section, kind: str, classes: int, distilled: bool) -> ViTConfig:
    """Our config; ValueError in one line if a field has no counterpart."""
    dim, heads = whole.whole("hidden_size", 768), whole.whole("num_attention_heads", 12)
    image, patch = _side(whole, "image_size", 224), _side(whole, "patch_size", 14 if kind == "dinov2" else 16)
    if image % patch:
        raise whole.refused("image_size", f"it must be a multiple of the patch_size {patch}, got {image}")
    width = whole.whole("head_dim", max(1, dim // heads))
    activation, dino = whole.fixed("hidden_act", *_ACTIVATIONS), kind.startswith("dinov2")
    eps = whole.take("layer_norm_eps", float, 1e-6 if dino else 1e-12)
    given: dict[str, Any] = {"position": "learned", "pool": "token", "registers": 0}
    gated = False
    if dino:
        if not 0 < (ratio := whole.take("mlp_ratio", float, 4)) <= 1000:
            raise whole.refused("mlp_ratio", f"it must be > 0 and <= 1000, got {ratio}")
        hidden, gated = int(dim * ratio), whole.take("use_swiglu_ffn", bool, False)
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
        given |= {"layer_scale": float(whole.take("layerscale_value", float, 1.0))}
        given |= {"pool": "token_and_mean" if classes else "token"}
    else:
        hidden = whole.whole("intermediate_size", 3072)
    if kind == "deit":  # the distillation token, which only a head of its own reads
        given |= {"pool": "distilled"} if distilled else {"registers": 1}
    if kind == "dinov2_with_registers":
        given |= {"position": "learned(antialias=True)", "registers": whole.take("num_register_tokens", int, 4)}
    chosen = [] if gated or activation == "gelu" else [f"activation={_ACTIVATIONS[activation]!r}"]
    try:
        return ViTConfig(
            dim=dim,
            depth=whole.whole("num_hidden_layers", 12),
            heads=heads,
            mixer=spelled("softmax", [f"head_dim={width}"] if width * heads != dim else []),
            ffn=with_width(FFNS, *(("swiglu", 8 / 3) if gated else ("mlp", 4.0)), hidden, chosen, dim),
            norm="layernorm" if eps == 1e-6 else f"layernorm(eps={float(eps)!r})",
            image=image,
            patch=patch,
            channels=whole.whole("num_channels", 3),
            classes=classes,
            class_token=True,
            **given,
        )
    except ValueError as error:
        raise ValueError(one_line(f"{whole.where}: {str(error).removeprefix(f'{whole.where}: ')}")) from error


def _side(whole: Section, key: str, usual: int) -> int:
    """One side in pixels, given as an integer or as two equal ones."""
    value = whole.left.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        whole.left[key] = value[0]
    elif isinstance(value, list):
        raise whole.refused(key, f"the zoo supports squares, not {str(value)[:80]}")
    return whole.whole(key, usual)


def _filled(config: ViTConfig, kind: str, source: Source, bias: bool) -> ViT:
    """The model with the tensors, each used once; without `bias` those of queries, keys and values are zeros."""
    with shapes_alone():
        model = config.build()
    parts, heads = dict(_PARTS), {"head": "classifier"}
    if str(config.ffn).startswith("swiglu"):
        parts |= _SWIGLU
        if "layers.0.mlp.weights_in.weight" in source.left:  # version 4 has both halves in one
            parts["steps.1.branch.expand"] = ["mlp.weights_in"]
    if config.pool == "distilled":
        heads = {"head": "cls_classifier", "head_distilled": "distillation_classifier"}
    counts = (1, int(kind == "deit"), config.registers if kind == "dinov2_with_registers" else 0)
    state: dict[str, Tensor] = {}
    for key, slot in model.state_dict().items():
        if key == "tokens":
            rows = [(f"embeddings.{name}", count) for name, count in zip(_TOKENS, counts, strict=True) if count]
            state[key] = torch.cat([source.take([name], torch.Size((1, n, config.dim))) for name, n in rows], 1)
        elif key == "position.table":  # registers have no rows there
            first, rest = counts[0] + counts[1], counts[2]
            table = source.take(["embeddings.position_embeddings"], torch.Size((1, slot.shape[1] - rest, config.dim)))
            state[key] = torch.cat([F.pad(table[:, :first], (0, 0, 0, rest)), table[:, first:]], 1)
        elif not bias and key.endswith(".qkv.bias"):
            state[key] = torch.zeros(slot.shape, dtype=source.dtype)
        else:
            state[key] = source.take(_names(key, parts, heads), slot.shape)
    source.finish()
    model.load_state_dict(state, assign=True)
    return model.eval()


def _names(key: str, parts: Mapping[str, list[str]], heads: dict[str, str]) -> list[str]:
    """Their names of what one of our tensors is made of, in the order in which they are joined."""
    owner, _, last = key.rpartition(".")
    if (found := re.fullmatch(r"blocks\.(\d+)\.(steps\.(\d).*)", owner)) is None:
        outer = {"stem.conv": "embeddings.patch_embeddings.projection", "norm": "layernorm"} | heads
        return [f"{outer[owner]}.{last}"]
    number, part, step = found.groups()
    if last == "layer_scale":
        return [f"layers.{number}.layer_scale{int(step) + 1}.lambda1"]
    return [f"layers.{number}.{each}.{last}" for each in parts[part]]
