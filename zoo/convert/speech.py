"""What the conversions of speech models share: the names of NVIDIA's layout, and the filling of our Conformer.

NeMo and the Parakeet of transformers store the same network with some names spelt differently.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.convert.source import Source
from zoo.convert.timm.parts import spelled, with_width
from zoo.ffns import FFNS
from zoo.inputs.audio import AudioPreprocess
from zoo.models.conformer import Conformer
from zoo.models.conformer_config import CONFORMER, SQUEEZEFORMER, ConformerConfig
from zoo.outputs.tokens import Tokenizer
from zoo.spec import options_of
from zoo.stems import SUBSAMPLINGS
from zoo.tensors import shapes_alone
from zoo.text import one_line

SUBSAMPLING = {(False, 4): "conv4", (True, 4): "depthwise4", (True, 8): "depthwise8"}
"""Ours, by whether the later convolutions are depthwise, and the factor."""

_BRANCHES = {
    "mixer": ("self_attn", "norm_self_att", {"qkv": "linear_q linear_k linear_v", "out": "linear_out"}),
    "conv": ("conv", "norm_conv", {"expand": "pointwise_conv1", "out": "pointwise_conv2", "conv": "depthwise_conv"}),
    "ffn": ("feed_forward", "norm_feed_forward", {"expand": "linear1", "out": "linear2"}),
}
_BRANCHES["mixer"][2].update({"relative": "linear_pos", "content": "pos_bias_u", "offset": "pos_bias_v"})
_BRANCHES["conv"][2]["norm"] = "batch_norm"
_WHOLE = {
    "stem.out": "encoder.pre_encode.out",
    "first": "encoder.pre_ln",
    "reduce.conv": "encoder.time_reduce_layer.dw_conv",
    "reduce.point": "encoder.time_reduce_layer.pw_conv",
    "recover": "encoder.time_recovery_layer",
    "head": "decoder.decoder_layers.0",
}


class Converted(NamedTuple):
    """A speech model of another library: the model in eval mode, its preprocessing and its tokenizer. The last two are
    None if the files do not hold them in a form that the zoo supports."""

    model: Conformer
    preprocess: AudioPreprocess | None
    tokenizer: Tokenizer | None


class Facts(NamedTuple):
    """The settings of a network in a file, in the terms of that network."""

    dim: int
    depth: int
    heads: int
    hidden: int  # of the feed-forward layers
    kernel: int  # of the convolution branch
    mels: int
    outputs: int  # of the CTC head, including the blank; 0 for none
    depthwise: bool  # the subsampling's later convolutions
    factor: int  # of the subsampling
    channels: int  # of the subsampling
    causal: bool = False  # the subsampling
    scale: bool = True
    bias: bool = True  # of attention and feed-forward layers
    conv_bias: bool = True
    conv_norm: str = "batchnorm"
    window: int = 0
    chunk: int | None = None
    left: int = 70
    squeeze: bool = False
    reduce: int | None = None  # the block before which Squeezeformer halves the frame rate; None for none


def configure(facts: Facts) -> ConformerConfig:
    """The config of the model that the facts describe; ValueError if the zoo does not support it."""
    stem = SUBSAMPLING[facts.depthwise, facts.factor]
    options = [] if facts.channels == (SUBSAMPLINGS[stem].usual or facts.dim) else [f"channels={facts.channels}"]
    options += ["padding='causal'"] if facts.causal else []
    mixer = [f"window={facts.window}"] if facts.window else []
    conv = "swish" if facts.squeeze else "glu"
    ffn = ["activation='silu'"] + ([] if facts.bias else ["bias=False"])
    reduce = None if facts.reduce in (None, facts.depth // 2 - 1) else facts.reduce
    return ConformerConfig(
        dim=facts.dim,
        depth=facts.depth,
        heads=facts.heads,
        layout=SQUEEZEFORMER if facts.squeeze else CONFORMER,
        placement="scaled" if facts.squeeze else "pre",
        mixer=spelled("relative", mixer + ([] if facts.bias else ["bias=False"])),
        conv=spelled(conv, [f"kernel={facts.kernel}"]),
        conv_norm=facts.conv_norm,
        ffn=with_width(FFNS, "mlp", options_of(FFNS["mlp"])["ratio"], facts.hidden, ffn, facts.dim),
        mels=facts.mels,
        vocabulary=facts.outputs,
        subsampling=spelled(stem, options),
        scale_input=facts.scale,
        first_norm=facts.squeeze,
        unet=facts.reduce is not None,
        reduce=reduce,
        chunk=facts.chunk,
        left=facts.left,
    )


def build(
    facts: Facts,
    tensors: Mapping[str, Tensor],
    where: str,
    rename: Callable[[str], str] = str,
    blank: int | None = None,
) -> Conformer:
    """The model of these facts with the tensors of a file: each is used once, and each of ours is filled.

    rename makes the file's name of NeMo's. blank is the row of the head that is the blank; None for the last one. The
    model has the widest dtype in the file. ValueError, in one line, where the facts do not fit each
    other, or a tensor is missing, unused, of a wrong shape or of integers.
    """
    _check_sizes(facts, tensors, where, rename)
    try:
        config = configure(facts)
        with shapes_alone():
            model = config.build()
    except ValueError as error:
        raise ValueError(one_line(f"{where}: {error}")) from error
    source = Source(tensors, where)
    no_bias = r"blocks\.\d+\.steps\.\d+\.branch\.(expand|out|conv)\.bias"
    convolutions = {f".{index}." for index, word in enumerate(config.layout) if word == "conv"}
    state = {}
    for key, slot in model.state_dict().items():
        branch = key.partition(".steps")[2][:3]
        if not facts.conv_bias and branch in convolutions and re.fullmatch(no_bias, key):
            state[key] = torch.zeros(slot.shape, dtype=source.dtype, device=source.device)
            continue
        value = source.take([rename(name) for name in names_of(key, config)], slot.shape)
        if blank is not None and key.startswith("head."):
            value = torch.cat([value[:blank], value[blank + 1 :], value[blank : blank + 1]])
        state[key] = value
    source.finish()
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_sizes(facts: Facts, tensors: Mapping[str, Tensor], where: str, rename: Callable[[str], str]) -> None:
    """ValueError if the numbers of blocks and channels are not those of the tensors. Nothing has been built yet, so
    that a config cannot ask for a model that its file does not hold."""
    blocks, linear = rename("encoder.layers."), rename("encoder.pre_encode.out.weight")
    found = len({name[len(blocks) :].partition(".")[0] for name in tensors if name.startswith(blocks)})
    if found != facts.depth:
        raise ValueError(f"{where}: the config asks for {facts.depth} blocks, but the tensors are those of {found}")
    if linear not in tensors:
        raise ValueError(f"{where}: the tensor '{linear}' is missing")
    if (width := len(tensors[linear]) if tensors[linear].ndim else 0) != facts.dim:
        raise ValueError(f"{where}: the config asks for {facts.dim} channels, but '{linear}' has {width}")


def names_of(key: str, config: ConformerConfig) -> list[str]:
    """NeMo's names of what one of our tensors is made of, in the order in which they are joined."""
    owner, _, last = key.rpartition(".")
    if owner in _WHOLE:
        return [f"{_WHOLE[owner]}.{last}"]
    parts = key.split(".")
    if parts[0] == "stem":
        stage, point = int(parts[2]), parts[3] == "point"
        depthwise = not config.subsampling.startswith("conv")
        place = (3 * stage - 1 + point if stage else 0) if depthwise else 2 * stage
        return [f"encoder.pre_encode.conv.{place}.{last}"]
    block, step = f"encoder.layers.{parts[1]}", int(parts[3])
    word = config.layout[step].replace("half", "ffn")
    if word == "norm":
        return [f"{block}.norm_out.{last}"]
    branch, norm, inner = _BRANCHES[word]
    if word == "ffn":
        number = 1 + sum(each in ("half", "ffn") for each in config.layout[:step])
        branch, norm = f"{branch}{number}", f"{norm}{number}"
    if parts[4] == "branch":
        names = inner[parts[5]].split()
        return [f"{block}.{branch}.{name}" + ("" if len(parts) == 6 else f".{last}") for name in names]
    if parts[4] == "before" and config.placement == "scaled":
        return [f"{block}.{branch}_scale.{'scale' if last == 'weight' else last}"]
    return [f"{block}.{norm}.{last}"]


def checked_mels(preprocess: AudioPreprocess, mels: int, where: str) -> AudioPreprocess:
    """Returns its argument; ValueError if it makes another number of mel bands than the model takes."""
    if preprocess.mels != mels:
        raise ValueError(f"{where}: the features have {preprocess.mels} mel bands, but the model takes {mels}")
    return preprocess
