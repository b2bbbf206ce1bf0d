"""The names of D-FINE's parts in transformers (as its models have them in memory, from version 5 on)."""

import re

from rtdetr_names import names_of as names_of_rtdetr

# Ours and theirs where they differ from those of RT-DETRv2, in the order in which they are tried.
_NAMES = (
    (r"trunk\.model\.net\.(.*)", lambda rest: f"model.backbone.model.{_trunk(rest)}"),
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
    (r"encoder\.(\d+)\.steps\.1\.branch\.(\w+)", lambda n, part: f"model.encoder.aifi.0.layers.{n}.mlp.{_MLP[part]}"),
    (r"decoder\.(\d+)\.steps\.2\.branch\.(\w+)", lambda n, part: f"model.decoder.layers.{n}.mlp.{_MLP[part]}"),
    (r"decoder\.(\d+)\.steps\.1\.branch\.gate", lambda n: f"model.decoder.layers.{n}.gateway.gate"),
    (r"decoder\.(\d+)\.steps\.1\.total", lambda n: f"model.decoder.layers.{n}.gateway.norm"),
    (r"boxes\.heads\.(\d+)\.layers\.(\d)", lambda n, layer: f"bbox_embed.{n}.layers.{layer}"),
    (r"boxes\.first\.layers\.(\d)", lambda layer: f"model.decoder.pre_bbox_head.layers.{layer}"),
    (
        r"boxes\.quality\.(\d+)\.layers\.(\d)",
        lambda n, layer: f"model.decoder.lqe_layers.{n}.reg_conf.layers.{layer}",
    ),
)
_WAY = {"down": "fpn", "up": "pan"}
_ELAN = {"first": "conv1", "convs.0": "conv2", "convs.1": "conv3", "out": "conv4"}
_CSP = {"first": "conv1", "second": "conv2", "out": "conv3", "wide": "conv1", "narrow": "conv2"}
_MLP = {"expand": "layers.0", "out": "layers.1"}


def _trunk(rest: str) -> str:
    """timm's HGNetV2."""
    rest = re.sub(r"^stem", "embedder", re.sub(r"^stages_(\d)", r"encoder.stages.\1", rest))
    return re.sub(r"\bconv$", "convolution", re.sub(r"\bbn$", "normalization", rest))


def _csp(rest: str) -> str:
    return re.sub(r"\w+(?=\.\w+$)", lambda found: _CSP[found[0]], rest).replace("blocks.", "bottlenecks.")


def names_of(key: str) -> list[str]:
    """The names in transformers of what one of our tensors is made of, in the order in which they are joined."""
    owner, _, last = key.rpartition(".")
    for pattern, theirs in _NAMES:
        if (found := re.fullmatch(pattern, owner)) is not None:
            return [f"{theirs(*found.groups())}.{last}"]
    return names_of_rtdetr(key)
