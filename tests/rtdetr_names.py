"""The names of RT-DETRv2's parts in transformers (as its models have them in memory, from version 5 on)."""

import re

# Ours and theirs, in the order in which they are tried; several of theirs are joined.
_NAMES = (
    (r"inputs\.(\d)\.(conv|norm)", lambda n, part: f"model.encoder_input_proj.{n}.{_PAIR[part]}"),
    (r"levels\.(\d)\.(conv|norm)", lambda n, part: f"model.decoder_input_proj.{n}.{_PAIR[part]}"),
    (r"neck\.laterals\.(\d)\.(\w+)", lambda n, part: f"model.encoder.lateral_convs.{n}.{part}"),
    (r"neck\.reductions\.(\d)\.conv", lambda n: f"model.encoder.downsample_convs.{n}.conv"),
    (r"neck\.reductions\.(\d)\.after", lambda n: f"model.encoder.downsample_convs.{n}.norm"),
    (r"neck\.(down|up)\.(\d)\.(.*)", lambda way, n, rest: f"model.encoder.{_WAY[way]}_blocks.{n}.{_csp(rest)}"),
    (r"encoder\.(\d+)\.(.*)", lambda n, rest: [f"model.encoder.aifi.0.layers.{n}.{each}" for each in _ENCODER[rest]]),
    (r"decoder\.(\d+)\.(.*)", lambda n, rest: [f"model.decoder.layers.{n}.{each}" for each in _DECODER[rest]]),
    (r"select", lambda: "model.enc_output.0"),
    (r"select_norm", lambda: "model.enc_output.1"),
    (r"score", lambda: "model.enc_score_head"),
    (r"box\.layers\.(\d)", lambda n: f"model.enc_bbox_head.layers.{n}"),
    (r"query_code\.layers\.(\d)", lambda n: f"model.decoder.query_pos_head.layers.{n}"),
    (r"scores\.(\d+)", lambda n: f"class_embed.{n}"),
    (r"boxes\.(\d+)\.layers\.(\d)", lambda n, layer: f"bbox_embed.{n}.layers.{layer}"),
    (r"noise", lambda: "model.denoising_class_embed"),
)
_PAIR = {"conv": "0", "norm": "1"}
_WAY = {"down": "fpn", "up": "pan"}
_CSP = {"first": "conv1", "second": "conv2", "out": "conv3", "wide": "conv1", "narrow": "conv2"}
_SELF = [f"self_attn.{each}_proj" for each in "qkv"]
_ENCODER = {
    "steps.0.branch.qkv": _SELF,
    "steps.0.branch.out": ["self_attn.o_proj"],
    "steps.0.total": ["self_attn_layer_norm"],
    "steps.1.branch.expand": ["mlp.fc1"],
    "steps.1.branch.out": ["mlp.fc2"],
    "steps.1.total": ["final_layer_norm"],
}
_DECODER = {key.replace("steps.1", "steps.2"): value for key, value in _ENCODER.items()} | {
    "steps.1.branch.values": ["encoder_attn.value_proj"],
    "steps.1.branch.offsets": ["encoder_attn.sampling_offsets"],
    "steps.1.branch.scores": ["encoder_attn.attention_weights"],
    "steps.1.branch.out": ["encoder_attn.output_proj"],
    "steps.1.total": ["encoder_attn_layer_norm"],
}


def _csp(rest: str) -> str:
    return re.sub(r"\w+(?=\.\w+$)", lambda found: _CSP[found[0]], rest).replace("blocks.", "bottlenecks.")


def names_of(key: str) -> list[str]:
    """The names in transformers of what one of our tensors is made of, in the order in which they are joined."""
    owner, _, last = key.rpartition(".")
    for pattern, theirs in _NAMES:
        if (found := re.fullmatch(pattern, owner)) is not None:
            names = theirs(*found.groups())
            return [f"{name}.{last}" for name in ([names] if isinstance(names, str) else names)]
    raise ValueError(f"no tensor of transformers is '{key}'")
