"""What the conversions of detectors share: transformers' names of our tensors, and the filling of our models.

Files in other layouts are first renamed to those of transformers, as its models have them in memory from version 5 on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.convert.source import Source
from zoo.convert.timm.parts import with_width
from zoo.ffns import FFNS
from zoo.inputs.boxes import BoxPreprocess
from zoo.models.detection import DetectorConfig
from zoo.models.detr import DETR, DETRConfig
from zoo.models.rtdetr import RTDETR
from zoo.outputs.label_map import LabelMap
from zoo.tensors import shapes_alone
from zoo.text import one_line

Table = Sequence[tuple[str, Callable[..., str | list[str]]]]
Named = Callable[[str], str]
"""From a part of timm's net to the name of that part in a file."""

# The resnets that are supported: whether their blocks are basic, and how many each stage has.
RESNETS = {
    "resnet18": (True, [2, 2, 2, 2]),
    "resnet34": (True, [3, 4, 6, 3]),
    "resnet50": (False, [3, 4, 6, 3]),
    "resnet101": (False, [3, 4, 23, 3]),
}


# Those of HGNetV2, with channels behind the stages, their numbers of blocks, and layers of a block.
HGNETS = {
    ((64, 256, 512, 1024), (1, 1, 2, 1), (3, 3, 3, 3)): "hgnetv2_b0",
    ((96, 384, 768, 1536), (1, 1, 3, 1), (4, 4, 4, 4)): "hgnetv2_b2",
    ((128, 512, 1024, 2048), (1, 1, 3, 1), (6, 6, 6, 6)): "hgnetv2_b4",
    ((128, 512, 1024, 2048), (1, 2, 5, 2), (6, 6, 6, 6)): "hgnetv2_b5",
}


class ConvertedDetector(NamedTuple):
    """A detector of another library: the model in eval mode, its preprocessing, and its categories. The last two are
    None if the files do not hold them."""

    model: DETR | RTDETR
    preprocess: BoxPreprocess | None
    labels: LabelMap | None


_SELF = {
    "steps.0.branch.qkv": [f"self_attn.{each}_proj" for each in "qkv"],
    "steps.0.branch.out": ["self_attn.o_proj"],
    "steps.0.total": ["self_attn_layer_norm"],
}
_FFN = {"branch.expand": ["mlp.fc1"], "branch.out": ["mlp.fc2"], "total": ["final_layer_norm"]}
_ENCODER = _SELF | {f"steps.1.{key}": names for key, names in _FFN.items()}
_DECODER = _SELF | {f"steps.2.{key}": names for key, names in _FFN.items()}
_DECODER["steps.1.total"] = ["encoder_attn_layer_norm"]
_ATTENTION = dict(zip(("queries", "keys", "values", "out"), "qkvo", strict=True))
_CROSS = {f"steps.1.branch.{ours}": [f"encoder_attn.{each}_proj"] for ours, each in _ATTENTION.items()}
_SAMPLED = {"values": "value_proj", "offsets": "sampling_offsets", "scores": "attention_weights", "out": "output_proj"}
_DEFORMABLE = {f"steps.1.branch.{ours}": [f"encoder_attn.{each}"] for ours, each in _SAMPLED.items()}


def _within(path: str, n: str, names: Sequence[str]) -> list[str]:
    return [f"model.{path}.layers.{n}.{each}" for each in names]


DETR_NAMES: Table = (
    (r"input", lambda: "model.input_projection"),
    (r"query", lambda: "model.query_position_embeddings"),
    (r"encoder\.(\d+)\.(.*)", lambda n, rest: _within("encoder", n, _ENCODER[rest])),
    (r"decoder\.(\d+)\.(.*)", lambda n, rest: _within("decoder", n, (_DECODER | _CROSS)[rest])),
    (r"norm", lambda: "model.decoder.layernorm"),
    (r"score", lambda: "class_labels_classifier"),
    (r"box\.layers\.(\d)", lambda n: f"bbox_predictor.layers.{n}"),
)
_PAIR = {"conv": "0", "norm": "1"}
_WAY = {"down": "fpn", "up": "pan"}
_CSP = {"first": "conv1", "second": "conv2", "out": "conv3", "wide": "conv1", "narrow": "conv2"}


def _csp(rest: str) -> str:
    return re.sub(r"\w+(?=\.\w+$)", lambda found: _CSP[found[0]], rest).replace("blocks.", "bottlenecks.")


RTDETR_NAMES: Table = (
    (r"inputs\.(\d)\.(conv|norm)", lambda n, part: f"model.encoder_input_proj.{n}.{_PAIR[part]}"),
    (r"levels\.(\d)\.(conv|norm)", lambda n, part: f"model.decoder_input_proj.{n}.{_PAIR[part]}"),
    (r"neck\.laterals\.(\d)\.(\w+)", lambda n, part: f"model.encoder.lateral_convs.{n}.{part}"),
    (r"neck\.reductions\.(\d)\.conv", lambda n: f"model.encoder.downsample_convs.{n}.conv"),
    (r"neck\.reductions\.(\d)\.after", lambda n: f"model.encoder.downsample_convs.{n}.norm"),
    (r"neck\.(down|up)\.(\d)\.(.*)", lambda way, n, rest: f"model.encoder.{_WAY[way]}_blocks.{n}.{_csp(rest)}"),
    (r"encoder\.(\d+)\.(.*)", lambda n, rest: _within("encoder.aifi.0", n, _ENCODER[rest])),
    (r"decoder\.(\d+)\.(.*)", lambda n, rest: _within("decoder", n, (_DECODER | _DEFORMABLE)[rest])),
    (r"select", lambda: "model.enc_output.0"),
    (r"select_norm", lambda: "model.enc_output.1"),
    (r"score", lambda: "model.enc_score_head"),
    (r"box\.layers\.(\d)", lambda n: f"model.enc_bbox_head.layers.{n}"),
    (r"query_code\.layers\.(\d)", lambda n: f"model.decoder.query_pos_head.layers.{n}"),
    (r"scores\.(\d+)", lambda n: f"class_embed.{n}"),
    (r"boxes\.(\d+)\.layers\.(\d)", lambda n, layer: f"bbox_embed.{n}.layers.{layer}"),
    (r"noise", lambda: "model.denoising_class_embed"),
)

_ELAN = {"first": "conv1", "convs.0": "conv2", "convs.1": "conv3", "out": "conv4"}
DFINE_NAMES: Table = (
    (r"neck\.points\.(\d)\.(conv|norm)", lambda n, part: f"model.encoder.downsample_convs.{n}.conv1.{part}"),
    (r"neck\.reductions\.(\d)\.conv", lambda n: f"model.encoder.downsample_convs.{n}.conv2.conv"),
    (r"neck\.reductions\.(\d)\.after", lambda n: f"model.encoder.downsample_convs.{n}.conv2.norm"),
    (
        r"neck\.(down|up)\.(\d)\.(first|out|convs\.\d)\.(conv|norm)",
        lambda way, n, layer, part: f"model.encoder.{_WAY[way]}_blocks.{n}.{_ELAN[layer]}.{part}",
    ),
    (
        r"neck\.(down|up)\.(\d)\.parts\.(\d)\.(.*)",
        lambda way, n, part, rest: f"model.encoder.{_WAY[way]}_blocks.{n}.csp_rep{int(part) + 1}.{_csp(rest)}",
    ),
    (r"decoder\.(\d+)\.steps\.1\.branch\.gate", lambda n: f"model.decoder.layers.{n}.gateway.gate"),
    (r"decoder\.(\d+)\.steps\.1\.total", lambda n: f"model.decoder.layers.{n}.gateway.norm"),
    (r"boxes\.heads\.(\d+)\.layers\.(\d)", lambda n, layer: f"bbox_embed.{n}.layers.{layer}"),
    (r"boxes\.first\.layers\.(\d)", lambda layer: f"model.decoder.pre_bbox_head.layers.{layer}"),
    (
        r"boxes\.quality\.(\d+)\.layers\.(\d)",
        lambda n, layer: f"model.decoder.lqe_layers.{n}.reg_conf.layers.{layer}",
    ),
    *RTDETR_NAMES,
)

# A resnet of timm in transformers' spelling, without (first) and with (second) a stem of three convolutions.
_STEM = {"conv1": "0.convolution", "bn1": "0.normalization"}
_DEEP_STEM = {"conv1.0": "0.convolution", "conv1.1": "0.normalization", "conv1.3": "1.convolution"}
_DEEP_STEM |= {"conv1.4": "1.normalization", "conv1.6": "2.convolution", "bn1": "2.normalization"}
_KIND = {"conv": "convolution", "bn": "normalization"}
_SHORTCUTS = {"0": "shortcut.convolution", "1": "shortcut.normalization"}
_DEEP_SHORTCUTS = {"1": "shortcut.1.convolution", "2": "shortcut.1.normalization"}


def resnet_name(owner: str, deep: bool, basic: bool) -> str:
    """transformers' name of a part of timm's resnet; deep for the variant d, basic for blocks of two convolutions."""
    if (stem := (_DEEP_STEM if deep else _STEM).get(owner)) is not None:
        return f"embedder.embedder.{stem}" if deep else f"embedder.embedder.{stem.removeprefix('0.')}"
    found = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.(\d))", owner)
    assert found is not None, owner
    stage, block, kind, number, shortcut = found.groups()
    layer = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if kind:
        return f"{layer}.layer.{int(number) - 1}.{_KIND[kind]}"
    if deep and stage == "1" and not basic:  # timm has an identity where the others have a pool, and no pool there
        return f"{layer}.shortcut.{_KIND['conv' if shortcut == '1' else 'bn']}"
    return f"{layer}.{(_DEEP_SHORTCUTS if deep and stage != '1' else _SHORTCUTS)[shortcut]}"


def hgnet_name(owner: str) -> str:
    """transformers' name of a part of timm's HGNetV2."""
    owner = re.sub(r"^stem", "embedder", re.sub(r"^stages_(\d)", r"encoder.stages.\1", owner))
    return re.sub(r"\bconv$", "convolution", re.sub(r"\bbn$", "normalization", owner))


def table_of(config: DetectorConfig) -> Table:
    """The names of the parts of a model."""
    if isinstance(config, DETRConfig):
        return DETR_NAMES
    return DFINE_NAMES if getattr(config, "box", "delta") != "delta" else RTDETR_NAMES


def resnet_of(basic: bool, depths: Sequence[int]) -> str | None:
    """The name of the resnet with these blocks; None if it is not supported."""
    return next((name for name, known in RESNETS.items() if known == (basic, [*depths])), None)


def hgnet_of(*sizes: Sequence[int]) -> str | None:
    """The name of the HGNetV2 with these channels, blocks and layers; None if it is not supported."""
    return next(
        (name for known, name in HGNETS.items() if [[*each] for each in known] == [[*each] for each in sizes]), None
    )


def ffn_of(hidden: int, activation: str, dim: int) -> str:
    """The feed-forward layer of a block."""
    return with_width(FFNS, "mlp", 4.0, hidden, [] if activation == "gelu" else [f"activation='{activation}'"], dim)


def names_of(key: str, table: Table, trunk: Named = str) -> list[str]:
    """transformers' names of what one of our tensors is made of, in the order in which they are joined."""
    owner, _, last = key.rpartition(".")
    if owner.startswith("trunk.model.net."):
        return [f"model.backbone.model.{trunk(owner.removeprefix('trunk.model.net.'))}.{last}"]
    for pattern, theirs in table:
        if (found := re.fullmatch(pattern, owner)) is not None:
            names = theirs(*found.groups())
            return [f"{name}.{last}" for name in ([names] if isinstance(names, str) else names)]
    raise ValueError(f"no tensor of transformers is '{key}'")


def build(
    config: DetectorConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    trunk: Named = str,
    rows: Sequence[int] | None = None,
    theirs: int | None = None,
) -> Any:
    """The model of a config, in eval mode, with tensors in transformers' names, each used once.

    Args:
        config: of our model.
        tensors: of the file.
        where: its name in errors.
        trunk: from a part of timm's net to the file's name of it.
        rows: the rows of class heads that our classes are; None for all.
        theirs: the number of rows of those heads in the file; None for ours.

    Raises:
        ValueError: in one line, a tensor is missing, unused or of a wrong shape.
    """
    try:
        with shapes_alone():
            model = config.build()
    except ValueError as error:
        raise ValueError(one_line(f"{where}: {error}")) from error
    table = table_of(config)
    source, state = Source(tensors, where), {}
    for key, slot in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
            continue
        names, shape = names_of(key, table, trunk), slot.shape
        if key.startswith(("score.", "scores.")):
            value = source.take(names, torch.Size((theirs or shape[0], *shape[1:])))
            state[key] = value if rows is None else value[[*rows]]
        elif key == "noise.weight":  # theirs has a last row for no class
            value = source.take(names, torch.Size(((theirs or shape[0]) + 1, *shape[1:])))
            state[key] = value[[*rows]] if rows is not None else value[:-1]
        else:
            state[key] = source.take(names, shape)
    source.finish()
    filled: Any = config.build().to(source.dtype)
    filled.load_state_dict(state)
    return filled.eval()
