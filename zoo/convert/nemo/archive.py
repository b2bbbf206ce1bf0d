"""NVIDIA NeMo's speech models as ours: Conformer, FastConformer and Squeezeformer with a CTC head."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert import yaml_config
from zoo.convert.nemo import files
from zoo.convert.nemo.files import named, opened, tensors_of
from zoo.convert.source import LARGEST, Section
from zoo.convert.speech import (
    SUBSAMPLING,
    Converted,
    Facts,
    build,
    checked_mels,
)
from zoo.convert.yaml_config import config_of
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.tokens import Characters, Tokenizer, WordPieces
from zoo.text import one_line, reason
from zoo.weights.files import read_tensors

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"

# Keys that change nothing at inference, or only the memory used.
_TRAINING = (
    "dropout",
    "dropout_pre_encoder",
    "dropout_emb",
    "dropout_att",
    "stochastic_depth_drop_prob",
    "stochastic_depth_mode",
    "stochastic_depth_start_layer",
    "att_context_probs",
    "untie_biases",
    "adaptive_scale",
    "pos_emb_max_len",
    "global_tokens_spacing",
    "global_attn_separate",
    "reduction_position",
    "subsampling_conv_chunking_factor",
    "use_pytorch_sdpa",
    "use_pytorch_sdpa_backends",
    "sync_max_audio_length",
)
_FEATURES = ("dither", "pad_to", "pad_value", "rng", "nb_augmentation_prob", "nb_max_freq", "use_torchaudio")


def from_nemo(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Converted:
    """Converts a NeMo model: for features [B, T, mels] and lengths the logits equal NeMo's in eval mode.

    ConformerEncoder (Conformer-CTC, FastConformer-CTC, with full, local or chunked attention) and SqueezeformerEncoder
    with ConvASRDecoder are supported. NeMo gives log-probabilities, this model logits. What acts only in training
    is not copied; biases that NeMo ties between blocks are no longer tied. Of several att_context_size, the
    first is the model's default, and others are given to the model as `visible`.

    Nothing of the archive is written to disk, and none of its code is run: weights are read as plain tensors.

    Args:
        source: a `.nemo` archive; or, with `config`, a safetensors file or a state dict with NeMo's names.
        config: the content of `model_config.yaml` of an archive, or the path of such a file.

    Returns:
        The model in eval mode; its preprocessing, if it is in the config; and its tokenizer, if the archive has
        a sentencepiece model or the config lists single characters.

    Raises:
        ValueError: in one line with the file: it cannot be read, a key of the config is not supported or
            unknown, or a tensor is missing, unused or of a wrong shape.
    """
    if config is None:
        if isinstance(source, Mapping):
            raise ValueError("a state dict does not describe its model fully; give config=")
        return _from_archive(Path(source).expanduser())
    where = "the config"
    if not isinstance(config, Mapping):
        where = str(config)
        try:
            config = config_of(Path(config).expanduser().read_bytes(), where)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {reason(error)}") from error
    if isinstance(source, Mapping):
        return _convert(config, named(source, "the state dict"), where, "the state dict", None)
    return _convert(config, read_tensors(Path(source).expanduser()), where, str(source), None)


def _from_archive(path: Path) -> Converted:
    where = f"{path}: {WEIGHTS}"
    with opened(path) as archive:
        config = config_of(archive.content(CONFIG, yaml_config.BYTES), f"{path}: {CONFIG}")
        weights = archive.content(WEIGHTS)
        model = _model_file(config, archive.members)
        pieces = None if model is None else archive.content(model, files.PIECES)
    return _convert(config, tensors_of(weights, where), f"{path}: {CONFIG}", where, pieces)


def _convert(
    config: Mapping[str, Any], tensors: dict[str, Tensor], where: str, source: str, pieces: bytes | None
) -> Converted:
    tensors = {name: value for name, value in tensors.items() if not name.startswith("preprocessor.featurizer.")}
    facts = _facts(config, where)
    model = build(facts, tensors, source)
    preprocess = None
    if config.get("preprocessor") is not None:
        preprocess = checked_mels(_features(config["preprocessor"], where), facts.mels, where)
    return Converted(model, preprocess, _tokenizer(config, pieces, facts.outputs, where))


def _tokenizer(config: Mapping[str, Any], pieces: bytes | None, outputs: int, where: str) -> Tokenizer | None:
    tokenizer: Tokenizer | None = None
    listed = config["decoder"].get("vocabulary")
    single = isinstance(listed, list) and all(isinstance(piece, str) and len(piece) == 1 for piece in listed)
    try:
        if pieces is not None:
            tokenizer = WordPieces(pieces)
        elif listed and single and config.get("tokenizer") is None:
            tokenizer = Characters(listed)
    except ValueError as error:
        raise ValueError(f"{where}: the tokenizer: {error}") from error
    if tokenizer is not None and tokenizer.vocabulary != outputs:
        found = f"{len(tokenizer.pieces)} pieces, but the model has {outputs} outputs, including the blank"
        raise ValueError(f"{where}: the tokenizer has {found}")
    return tokenizer


def _class_of(section: Section, *allowed: str) -> str:
    name = section.take("_target_", str).rpartition(".")[2]
    if name not in allowed:
        raise section.refused("_target_", f"the zoo supports {' or '.join(allowed)}, not {name}")
    return name


def _facts(config: Mapping[str, Any], where: str) -> Facts:
    encoder = Section(config.get("encoder"), "encoder", where)
    squeeze = _class_of(encoder, "ConformerEncoder", "SqueezeformerEncoder") == "SqueezeformerEncoder"
    outputs = _outputs(Section(config.get("decoder"), "decoder", where))
    dim, depth = encoder.whole("d_model"), encoder.whole("n_layers")
    encoder.fixed("feat_out", -1, None, dim)
    if encoder.left.pop("reduction_factor", 1) != 1:
        encoder.fixed("reduction", None)
    encoder.left.pop("reduction", None)
    depthwise = encoder.fixed("subsampling", *(("dw_striding", "striding") if squeeze else ("striding", "dw_striding")))
    factors = [factor for each, factor in SUBSAMPLING if each == (depthwise == "dw_striding")]
    factor = encoder.fixed("subsampling_factor", *factors)
    channels = encoder.take("subsampling_conv_channels", int, -1)
    norm = encoder.fixed("conv_norm_type", "batch_norm", "layer_norm")
    bias = encoder.take("use_bias", bool, True)
    kernel = encoder.whole("conv_kernel_size", 31)
    facts = Facts(
        dim=dim,
        depth=depth,
        heads=encoder.whole("n_heads", 4),
        hidden=dim * encoder.whole("ff_expansion_factor", 4),
        kernel=kernel,
        mels=encoder.whole("feat_in"),
        outputs=outputs,
        depthwise=depthwise == "dw_striding",
        factor=factor,
        channels=dim if channels == -1 else channels,
        causal=encoder.take("causal_downsampling", bool, False),
        scale=encoder.take("xscaling", bool, True, null=False),
        bias=bias,
        conv_bias=bias,
        conv_norm={"batch_norm": "batchnorm", "layer_norm": "layernorm(eps=1e-5)"}[norm],
        squeeze=squeeze,
        reduce=_reduced(encoder, depth) if squeeze else None,
        **_seen(encoder, kernel),
    )
    if facts.chunk is not None and not facts.causal:
        raise encoder.refused("causal_downsampling", "for models with chunks the zoo supports only true")
    encoder.finish(*_TRAINING)
    return facts


def _outputs(decoder: Section) -> int:
    _class_of(decoder, "ConvASRDecoder")
    decoder.fixed("add_blank", True)
    classes = decoder.take("num_classes", int, -1)
    listed = decoder.left.pop("vocabulary", None)
    if classes < 1:
        if not isinstance(listed, list) or not listed:
            raise decoder.refused("num_classes", "neither it nor the vocabulary gives the number of tokens")
        classes = len(listed)
    decoder.finish("feat_in", "init_mode")
    return classes + 1


def _reduced(encoder: Section, depth: int) -> int | None:
    """The block before which the frame rate is halved."""
    if encoder.left.get("time_reduce_idx") is None:
        encoder.left.pop("time_reduce_idx", None)
        encoder.left.pop("time_recovery_idx", None)
        return None
    encoder.fixed("time_recovery_idx", None, depth - 1)
    return encoder.take("time_reduce_idx", int)


def _seen(encoder: Section, kernel: int) -> dict[str, Any]:
    """The tokens that a token attends to: window, chunk and left."""
    model = encoder.fixed("self_attention_model", "rel_pos", "rel_pos_local_attn")
    if (number := encoder.take("global_tokens", int, 0)) != 0:
        raise encoder.refused(
            "global_tokens", f"models with global tokens are not supported; it must be 0, got {number}"
        )
    style = encoder.fixed("att_context_style", "regular", "chunked_limited")
    size = encoder.left.pop("att_context_size", None) or [-1, -1]  # null means unlimited
    sides = size[0] if isinstance(size, list) and isinstance(size[0], list) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(s) is int and -1 <= s <= LARGEST for s in sides):
        raise encoder.refused("att_context_size", f"it must be two integers >= -1, got {size!r}")
    context, half = encoder.left.pop("conv_context_size", None), (kernel - 1) // 2
    causal = context in ("causal", [kernel - 1, 0]) and context != [half, half]
    if not causal and context not in (None, [half, half], half):
        raise encoder.refused("conv_context_size", f"the zoo supports 'causal' or null, not {context!r}")
    found: dict[str, Any] = {}
    if model == "rel_pos_local_attn":
        if sides[0] != sides[1] or sides[0] < 1 or style != "regular":
            raise encoder.refused("att_context_size", f"local attention must be as wide on either side, got {size!r}")
        found = {"window": sides[0]}
    elif style == "chunked_limited" and sides != [-1, -1]:
        if min(sides) < 0:
            raise encoder.refused("att_context_size", f"only chunks with a limited context are supported, got {size!r}")
        found = {"chunk": sides[1] + 1, "left": sides[0]}
    elif sides != [-1, -1]:
        raise encoder.refused("att_context_size", f"{size!r} needs att_context_style 'chunked_limited'")
    if causal != ("chunk" in found):
        raise encoder.refused("conv_context_size", "the zoo supports 'causal' with chunks, and only with chunks")
    return found


def _features(values: Any, where: str) -> AudioPreprocess:
    """NeMo's preprocessing; ValueError if ours cannot express it."""
    given = Section(values, "preprocessor", where)
    _class_of(given, "AudioToMelSpectrogramPreprocessor")
    rate = given.whole("sample_rate", 16000)
    window = given.seconds("window_size", 0.02, rate)
    hop = given.seconds("window_stride", 0.01, rate)
    normalize = given.fixed("normalize", "per_feature", "NA", None)
    fixed = {"window": ("hann",), "log": (True,), "log_zero_guard_type": ("add",), "frame_splicing": (1,)}
    fixed |= {"mag_power": (2.0,), "mel_norm": ("slaney",)} | dict.fromkeys(
        ("n_window_size", "n_window_stride"), (None,)
    )
    fixed |= dict.fromkeys(("exact_pad", "stft_exact_pad", "stft_conv"), (False,))
    for key, allowed in fixed.items():
        given.fixed(key, *allowed)
    highest = given.take("highfreq", float, None, null=None)
    floor = given.take("log_zero_guard_value", float, 2.0**-24)
    mels, lowest = given.whole("features", 64), given.take("lowfreq", float, 0.0)
    usual = 1 << (window - 1).bit_length()
    fft = given.whole("n_fft", usual, null=usual)
    preemphasis = given.take("preemph", float, 0.97, null=0.0)
    given.finish(*_FEATURES)
    try:
        return AudioPreprocess(
            rate=rate,
            mels=mels,
            window=window,
            hop=hop,
            fft=fft,
            preemphasis=preemphasis,
            lowest=lowest,
            highest=highest,
            floor=floor,
            normalize="bin" if normalize == "per_feature" else "none",
        )
    except ValueError as error:
        raise ValueError(one_line(f"{where}: preprocessor: {error}")) from error


def _model_file(config: Mapping[str, Any], members: Mapping[str, Any]) -> str | None:
    """The member that holds the sentencepiece model, if any."""
    tokenizer = config.get("tokenizer")
    if not isinstance(tokenizer, Mapping) or tokenizer.get("type") != "bpe":
        return None
    wanted = str(tokenizer.get("model_path") or "").removeprefix("nemo:")
    found = [name for name in members if name == wanted] or [name for name in members if name.endswith(".model")]
    return found[0] if len(found) == 1 else None
