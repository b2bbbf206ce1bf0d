"""The Parakeet of Hugging Face's transformers as our FastConformer, read from its files without that library."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.convert.source import Section
from zoo.convert.speech import SUBSAMPLING, Converted, Facts, build, checked_mels
from zoo.convert.transformers.files import HARMLESS, read_folder, read_json
from zoo.inputs.audio import RECIPES, AudioPreprocess
from zoo.outputs.tokens import Tokenizer, WordPieces

# NeMo's names and those of transformers, in the order in which they are replaced.
_NAMES = (
    ("encoder.pre_encode.conv.", "encoder.subsampling.layers."),
    ("encoder.pre_encode.out.", "encoder.subsampling.linear."),
    (".linear_q.", ".q_proj."),
    (".linear_k.", ".k_proj."),
    (".linear_v.", ".v_proj."),
    (".linear_out.", ".o_proj."),
    (".linear_pos.", ".relative_k_proj."),
    (".pos_bias_", ".bias_"),
    (".batch_norm.", ".norm."),
    ("decoder.decoder_layers.0.", "ctc_head."),
)
_HARMLESS = (
    *HARMLESS,
    "dropout",
    "dropout_positions",
    "layerdrop",
    "activation_dropout",
    "attention_dropout",
    "max_position_embeddings",
    "initializer_range",
    "ctc_loss_reduction",
    "ctc_zero_infinity",
)
"""Keys that change nothing at inference."""
_FEATURES = ("feature_extractor_type", "padding_side", "padding_value", "return_attention_mask", "processor_class")


def convert_parakeet(folder: Path) -> Converted:
    """Converts a ParakeetForCTC or a ParakeetEncoder; see `from_transformers`."""
    where = str(folder / "config.json")
    facts, blank = _facts(read_json(folder / "config.json"), where)
    tensors = read_folder(folder)

    def rename(key: str) -> str:
        for theirs, other in _NAMES:
            key = key.replace(theirs, other)
        return key if facts.outputs else key.removeprefix("encoder.")

    model = build(facts, tensors, str(folder), rename, blank)
    tokenizer, path = None, folder / "tokenizer.json"
    if blank is not None and path.is_file():
        tokenizer = _tokenizer(read_json(path), blank, facts.outputs, path)
    return Converted(model, _features(folder, facts.mels), tokenizer)


def _facts(config: Mapping[str, Any], where: str) -> tuple[Facts, int | None]:
    """The facts of the network, and which output is the blank."""
    whole = Section(config, "", where)
    ctc = whole.fixed("model_type", "parakeet_ctc", "parakeet_encoder") == "parakeet_ctc"
    outputs, blank = 0, None
    encoder = whole
    if ctc:
        outputs, blank = whole.whole("vocab_size", 1025), whole.left.pop("pad_token_id", 1024)
        if type(blank) is not int or not 0 <= blank < outputs:
            raise whole.refused("pad_token_id", f"it must be from 0 to {outputs - 1}, got {blank}")
        encoder = Section(whole.left.pop("encoder_config", {}), "encoder_config", where)
        whole.finish(*_HARMLESS)
    dim, heads = encoder.whole("hidden_size", 1024), encoder.whole("num_attention_heads", 8)
    encoder.fixed("num_key_value_heads", heads)
    encoder.fixed("subsampling_conv_kernel_size", 3)
    encoder.fixed("subsampling_conv_stride", 2)
    encoder.fixed("hidden_act", "silu", "swish")
    facts = Facts(
        dim=dim,
        depth=encoder.whole("num_hidden_layers", 24),
        heads=heads,
        hidden=encoder.whole("intermediate_size", 4096),
        kernel=encoder.whole("conv_kernel_size", 9),
        mels=encoder.whole("num_mel_bins", 80),
        outputs=outputs,
        depthwise=True,
        factor=encoder.fixed("subsampling_factor", *(factor for deep, factor in sorted(SUBSAMPLING)[::-1] if deep)),
        channels=encoder.whole("subsampling_conv_channels", 256),
        scale=encoder.take("scale_input", bool, True, null=False),
        bias=encoder.take("attention_bias", bool, True),
        conv_bias=encoder.take("convolution_bias", bool, True),
    )
    encoder.finish(*_HARMLESS)
    return facts, blank


def _features(folder: Path, mels: int) -> AudioPreprocess:
    """The features that ParakeetFeatureExtractor makes."""
    path = folder / "preprocessor_config.json"
    usual, name = RECIPES["nemo"], ""
    if path.is_file():
        values = read_json(path)
    else:
        path, name = folder / "processor_config.json", "feature_extractor"
        whole = read_json(path) if path.is_file() else {}
        if name not in whole:
            return replace(usual, mels=mels)
        values = whole[name]
    given = Section(values, name, str(path))
    fields = {"mels": "feature_size", "rate": "sampling_rate", "window": "win_length", "hop": "hop_length"}
    fields["fft"] = "n_fft"
    sizes = {ours: given.whole(theirs, getattr(usual, ours)) for ours, theirs in fields.items()}
    preemphasis = given.take("preemphasis", float, usual.preemphasis, null=0.0)
    given.finish(*_FEATURES)
    try:
        preprocess = replace(usual, preemphasis=preemphasis, **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return checked_mels(preprocess, mels, str(path))


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """The single steps of a normalizer or a pre-tokenizer."""
    if isinstance(part, Mapping):
        if part.get("type") != "Sequence":
            yield part
        for inner in (*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())):
            yield from _parts(inner)


def _tokenizer(values: Mapping[str, Any], blank: int, outputs: int, where: Path) -> Tokenizer | None:
    """The sentencepiece model that tokenizer.json was made from, without the blank; None for another kind."""
    from sentencepiece import sentencepiece_model_pb2

    model = values.get("model")
    normalizers = list(_parts(values.get("normalizer")))
    spaces = [part for part in _parts(values.get("pre_tokenizer")) if part.get("type") == "Metaspace"]
    plain = {part.get("type") for part in normalizers} <= {"Precompiled", "Replace", "Strip"}
    if not isinstance(model, Mapping) or not spaces or not plain:
        return None
    try:
        scores, unknown = _scores(model)
        added = {int(each["id"]): (str(each["content"]), bool(each["special"])) for each in values["added_tokens"]}
        maps = [base64.b64decode(part["precompiled_charsmap"]) for part in normalizers if part["type"] == "Precompiled"]
    except (KeyError, TypeError, ValueError, IndexError, binascii.Error):
        return None
    numbers = sorted({*scores, *added, blank})
    if numbers != list(range(outputs)):
        found = f"{len(numbers)} numbers up to {numbers[-1]}, including the blank"
        raise ValueError(f"{where}: the pieces have {found}, but the model has {outputs} outputs")
    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kinds, trainer, normalizer = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    for id in numbers:
        if id == blank:
            continue
        piece, score = scores[id] if id in scores else (added[id][0], 0.0)
        kind = kinds.CONTROL if id in added and added[id][1] else kinds.NORMAL
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind, trainer.byte_fallback = kinds.BYTE, True
        proto.pieces.add(piece=piece, score=score, type=kinds.UNKNOWN if piece == unknown else kind)
    trainer.model_type = trainer.BPE if model["type"] == "BPE" else trainer.UNIGRAM
    trainer.unk_piece = unknown
    normalizer.add_dummy_prefix = spaces[0].get("prepend_scheme", "always") != "never"
    normalizer.remove_extra_whitespaces = any(part["type"] != "Precompiled" for part in normalizers)
    normalizer.precompiled_charsmap = b"".join(maps)
    try:
        return WordPieces(proto.SerializeToString())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _scores(model: Mapping[str, Any]) -> tuple[dict[int, tuple[str, float]], str]:
    """Pieces and their scores by number, and the unknown piece."""
    if model["type"] == "Unigram":
        pieces = {id: (str(piece), float(score)) for id, (piece, score) in enumerate(model["vocab"])}
        return pieces, pieces[model["unk_id"]][0]
    if model["type"] != "BPE":
        raise ValueError("neither unigrams nor byte pairs")
    # sentencepiece merges the pair whose sum has the highest score; here the order of the merges gives the same.
    ranks: dict[str, float] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, -float(len(ranks)))
    vocabulary: dict[str, int] = model["vocab"]
    scores = {id: (piece, ranks.get(piece, -float(len(ranks) + id))) for piece, id in vocabulary.items()}
    return scores, str(model["unk_token"])
