"""Speech models of transformers and NeMo become ours with the same output, and what has no counterpart is refused."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ParakeetCTCConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
)
from transformers.convert_slow_tokenizer import ParakeetConverter

from helpers import randomise, relative
from zoo.convert import from_nemo, from_transformers
from zoo.inputs.audio import RECIPES
from zoo.layer import Chunks
from zoo.models import PRESETS
from zoo.outputs.tokens import Characters, WordPieces, train_pieces

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SMALL |= {"subsampling_conv_channels": 8, "num_mel_bins": 16}
LENGTHS = torch.tensor([67, 50, 93])
TEXTS = ["the cat sat on the mat", "a model of speech reads sound", "nothing is lost in translation"] * 4


def clips(mels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A padded batch, zero behind each clip's length as the features are."""
    features = torch.randn(len(LENGTHS), int(LENGTHS.max()), mels, dtype=dtype)
    return features.masked_fill(~real_frames(LENGTHS)[..., None], 0.0)


def real_frames(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]


@torch.no_grad()
def differ(model, features: torch.Tensor, wanted: torch.Tensor, lengths: torch.Tensor) -> float:
    """How far the model's real frames are from the wanted ones; their numbers have to be equal."""
    got, found = model(features, LENGTHS)
    assert found.tolist() == lengths.tolist() and not model.training
    real = real_frames(lengths)
    return relative(got[real], wanted[real])


# transformers


def parakeet(blank: int | None = None, outputs: int = 12, encoder: bool = False, **choices) -> nn.Module:
    """Parakeet of transformers whose every parameter and running statistic is random."""
    config = ParakeetEncoderConfig(**(SMALL | choices))
    if encoder:
        return randomise(ParakeetEncoder(config)).eval()
    blank = outputs - 1 if blank is None else blank
    config = ParakeetCTCConfig(vocab_size=outputs, pad_token_id=blank, encoder_config=config)
    return randomise(ParakeetForCTC(config)).eval()


@torch.no_grad()
def theirs(model, features: torch.Tensor, **choices):
    encoder = getattr(model, "encoder", model)
    mask = real_frames(LENGTHS)
    found = encoder(input_features=features, attention_mask=mask, **choices)
    tokens = found.last_hidden_state
    output = model(input_features=features, attention_mask=mask).logits if encoder is not model else tokens
    return output, found.attention_mask.sum(1), found


VARIANTS = {
    "as it is": {},
    "no biases in attention": {"attention_bias": False},
    "no biases in convolutions": {"convolution_bias": False},
    "unscaled": {"scale_input": False},
    "factor 4": {"subsampling_factor": 4},
    "other widths": {"intermediate_size": 75, "conv_kernel_size": 5, "subsampling_conv_channels": 12},
    "one head, one block": {"num_attention_heads": 1, "num_hidden_layers": 1, "hidden_act": "swish"},
    "usual channels": {"subsampling_conv_channels": 256},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("encoder", [False, True])
def test_parakeet_gives_the_same(tmp_path, name, encoder):
    model = parakeet(encoder=encoder, **VARIANTS[name])
    model.save_pretrained(tmp_path)
    features = clips(16)
    wanted, lengths, _ = theirs(model, features)
    ours = from_transformers(tmp_path)
    assert differ(ours.model, features, wanted, lengths) < 1e-5
    assert ours.model.config.vocabulary == (0 if encoder else 12)
    assert ours.preprocess == replace(RECIPES["nemo"], mels=16) and ours.tokenizer is None


def test_every_hidden_state_is_the_same(tmp_path):
    model = parakeet(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    features = clips(16)
    _, lengths, found = theirs(model, features, output_hidden_states=True)
    real = real_frames(lengths)
    with torch.no_grad():
        made = from_transformers(tmp_path).model.encode(features, LENGTHS, layers=range(3))
    for ours, wanted in zip(made, found.hidden_states[1:], strict=True):
        assert relative(ours.tokens[real], wanted[real]) < 1e-5


def waves(number: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of the offsets number - 1, ..., 1 - number, exact to the last digit of fp32."""
    offsets = torch.arange(number - 1, -number, -1, dtype=torch.float64)
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    table = torch.zeros(len(offsets), dim, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = torch.sin(offsets[:, None] * rates), torch.cos(offsets[:, None] * rates)
    return table.float().to(dtype)


def test_parakeet_in_double_precision(tmp_path):
    """Given the same table of sines, which transformers computes in single precision."""
    model = parakeet().double()
    model.save_pretrained(tmp_path)
    model.encoder.encode_positions.forward = lambda x: waves(x.shape[1], 32, x.dtype).expand(len(x), -1, -1)
    features = clips(16, torch.float64)
    wanted, lengths, _ = theirs(model, features)
    ours = from_transformers(tmp_path).model
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float64}
    assert differ(ours, features, wanted, lengths) < 1e-10


def test_the_size_of_fast_conformer_m(tmp_path):
    shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_mel_bins": 80}
    model = parakeet(outputs=1025, **shape, subsampling_conv_channels=256)
    model.save_pretrained(tmp_path)
    features = clips(80)
    wanted, lengths, _ = theirs(model, features)
    ours = from_transformers(tmp_path).model
    assert ours.config == replace(PRESETS["fastconformer_m"], depth=2, vocabulary=1025)
    assert differ(ours, features, wanted, lengths) < 1e-5


@pytest.mark.parametrize("blank", [0, 5])
def test_the_blank_becomes_the_last_output(tmp_path, blank):
    model = parakeet(blank=blank)
    model.save_pretrained(tmp_path)
    features = clips(16)
    wanted, lengths, _ = theirs(model, features)
    order = [*range(blank), *range(blank + 1, 12), blank]
    assert differ(from_transformers(tmp_path).model, features, wanted[..., order], lengths) < 1e-5


def test_shards_and_half_precision(tmp_path):
    model = parakeet().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = from_transformers(tmp_path).model
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(ours.head.bias, model.ctc_head.bias)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../x.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a file of this folder"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_tokenizer_of_transformers(tmp_path, kind):
    if kind == "bpe":
        stored = io.BytesIO()
        options = {"model_type": "bpe", "vocab_size": 50, "bos_id": -1, "eos_id": -1, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=stored, **options)
        original = WordPieces(stored.getvalue())
        (tmp_path / "spm.model").write_bytes(original.model)
        tokenizer = ParakeetConverter(str(tmp_path / "spm.model")).converted()
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers

        original = train_pieces(TEXTS, 28)
        scores = sentencepiece.SentencePieceProcessor(model_proto=original.model)
        listed = [(piece, scores.get_score(id)) for id, piece in enumerate(original.pieces)]
        tokenizer = Tokenizer(models.Unigram(listed, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>"])
    parakeet(outputs=len(original.pieces) + 1).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = from_transformers(tmp_path).tokenizer
    assert found.pieces == original.pieces and found.blank == tokenizer.token_to_id("<pad>")
    for text in (*TEXTS[:3], "sata nola", "Ｔhe".lower()):
        if kind == "bpe" or text.isascii():
            ids = found.encode(text)
            assert ids == tokenizer.encode(text).ids == original.encode(text)
            assert found.decode(ids) == original.decode(ids)
    parakeet(outputs=len(original.pieces) + 3).save_pretrained(tmp_path)
    refused(tmp_path, "tokenizer.json: the pieces have .* numbers up to .*, but the model has", from_transformers)


def test_another_kind_of_tokenizer_is_left_out(tmp_path):
    parakeet().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel"}, "pre_tokenizer": None}))
    assert from_transformers(tmp_path).tokenizer is None


def test_the_features_of_transformers(tmp_path):
    parakeet().save_pretrained(tmp_path)
    extractor = ParakeetFeatureExtractor(feature_size=16, hop_length=200)
    extractor.save_pretrained(tmp_path)
    made = from_transformers(tmp_path).preprocess
    assert made == replace(RECIPES["nemo"], mels=16, hop=200)
    waveform = torch.randn(8000)
    wanted = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    features = made(waveform)
    assert relative(features, wanted["input_features"][0, : len(features)]) < 1e-4
    inside = {"feature_extractor": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(inside))
    assert from_transformers(tmp_path).preprocess == made


def refused(path, words: str, convert, *more) -> None:
    """The conversion fails with one line that has the words."""
    with pytest.raises(ValueError, match=words) as caught:
        convert(path, *more)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 450


CHANGES = {
    "hidden_act": ("gelu", "encoder_config.hidden_act: the zoo supports 'silu' or 'swish', not 'gelu'"),
    "hidden_size": ("wide", "encoder_config.hidden_size: it must be an integer, got 'wide'"),
    "num_attention_heads": (8, "encoder_config.num_key_value_heads: the zoo supports 8, not 4"),
    "num_hidden_layers": (3, "the config asks for 3 blocks, but the tensors are those of 2"),
    "num_key_value_heads": (2, "num_key_value_heads: the zoo supports 4, not 2"),
    "conv_kernel_size": (8, "kernel must be odd"),
    "subsampling_factor": (16, "subsampling_factor: the zoo supports 8 or 4, not 16"),
    "subsampling_conv_kernel_size": (5, "subsampling_conv_kernel_size: the zoo supports 3"),
    "subsampling_conv_stride": (4, "subsampling_conv_stride: the zoo supports 2"),
    "num_mel_bins": (24, r"'encoder.subsampling.linear.weight' has shape \[32, 16\], but this model needs \[32, 24\]"),
    "scale_input": ("yes", "scale_input: it must be true or false, got 'yes'"),
    "conv_norm_type": ("layer_norm", "conv_norm_type: the zoo does not know this key"),
    "attention_bias": (False, "'encoder.layers.0.feed_forward1.linear1.bias' is not used"),
    "convolution_bias": (False, "bias' is not used"),
    "intermediate_size": (0, "intermediate_size: it must be from 1 to 1,000,000, got 0"),
    "pad_token_id": (12, "pad_token_id: it must be from 0 to 11, got 12"),
    "pad_token_id ": (None, "pad_token_id: it must be from 0 to 11, got None"),
    "chunks": (2, r"config.json: chunks: the zoo does not know this key \(its value is 2\)"),
    "vocab_size": (13, r"'ctc_head.weight' has shape \[12, 32, 1\], but this model needs \[13, 32\]"),
    "model_type": ("parakeet_tdt", "model_type: the zoo supports parakeet_ctc, parakeet_encoder"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parakeet")
    torch.manual_seed(0)
    parakeet().save_pretrained(place)
    return place


def twin(folder, target):
    """A copy that may be changed."""
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_cannot_be_honoured_is_refused(tmp_path, folder, field):
    value, words = CHANGES[field]
    config, key = json.loads((folder / "config.json").read_text()), field.strip()
    (config if key in config or key == "chunks" else config["encoder_config"])[key] = value
    twin(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, words, from_transformers)


def test_broken_folders_are_refused(tmp_path, folder):
    refused(tmp_path / "none", "is neither a folder with config.json", from_transformers)
    refused(tmp_path, "config.json cannot be read as JSON: No such file", from_transformers)
    twin(folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "the tensor 'extra' is not used", from_transformers)
    save_file(tensors | {"ctc_head.bias": torch.ones(12, dtype=torch.int64)}, tmp_path / "model.safetensors")
    refused(tmp_path, "'ctc_head.bias' must be a floating-point tensor", from_transformers)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    refused(tmp_path, "is not a complete safetensors file", from_transformers)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "only safetensors are read, never a pickle", from_transformers)
    unread = "config.json cannot be read as JSON"
    for text, words in (("[1]", "config.json must hold a JSON object"), ("{", unread), ("[" * 100000, unread)):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, words, from_transformers)
    twin(folder, tmp_path)
    ParakeetFeatureExtractor(feature_size=20).save_pretrained(tmp_path)
    refused(tmp_path, "the features have 20 mel bands, but the model takes 16", from_transformers)


def test_a_model_of_the_hub(monkeypatch, folder):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name != "owner/name":
            raise OSError("not found\nat all")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert from_transformers("owner/name@v1").model.config.dim == 32 and asked == [("owner/name", "v1")]
    refused(
        "owner/other",
        "folder owner/other not found, and it cannot be downloaded from the Hub: not found at all",
        from_transformers,
    )


@pytest.mark.slow
def test_transformers_itself_is_not_imported(folder):
    code = f"import sys; from zoo.convert import from_transformers; from_transformers({str(folder)!r}); "
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "torch" in done.stdout.split() and "transformers" not in done.stdout.split()


# NeMo: its encoders, written anew from their formulas, straight on tensors with NeMo's names.


class Nemo:
    """A network of NeMo: its config, random tensors with its names, and what it makes of features."""

    def __init__(self, squeeze: bool = False, outputs: int = 12, **choices) -> None:
        defaults = {"subsampling": "dw_striding" if squeeze else "striding", "subsampling_factor": 4}
        defaults |= {"feat_in": 16, "n_layers": 4 if squeeze else 2, "d_model": 24, "n_heads": 2}
        defaults |= {"subsampling_conv_channels": -1, "ff_expansion_factor": 4, "conv_kernel_size": 7}
        defaults |= {"conv_norm_type": "batch_norm", "xscaling": True, "self_attention_model": "rel_pos"}
        defaults |= {"time_reduce_idx": 1, "time_recovery_idx": None, "adaptive_scale": True} if squeeze else {}
        self.cfg = defaults | {"dropout": 0.1, "pos_emb_max_len": 5000, "att_context_size": [-1, -1]} | choices
        kind = "SqueezeformerEncoder" if squeeze else "ConformerEncoder"
        self.squeeze, self.outputs = squeeze, outputs
        self.config = {
            "sample_rate": 16000,
            "encoder": {"_target_": f"nemo.collections.asr.modules.{kind}"} | self.cfg,
            "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": self.cfg["d_model"]}
            | {"num_classes": outputs - 1, "vocabulary": [f"piece{id}" for id in range(outputs - 1)]},
        }
        self.bias = self.cfg.get("use_bias", True)
        self.causal = self.cfg.get("causal_downsampling", False)
        self.tensors = {name: self.random(name, shape) for name, shape in self.shapes().items()}

    @staticmethod
    def random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("running_var"):
            return 0.5 + torch.rand(shape)
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        gain = len(shape) == 1 and name.endswith(("weight", "scale"))
        spread = 0.3 if len(shape) == 1 or "pos_bias" in name else math.prod(shape[1:]) ** -0.5
        return gain + spread * torch.randn(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        cfg, found = self.cfg, {}
        dim, kernel, heads = cfg["d_model"], cfg["conv_kernel_size"], cfg["n_heads"]
        hidden = dim * cfg["ff_expansion_factor"]
        width = dim if cfg["subsampling_conv_channels"] == -1 else cfg["subsampling_conv_channels"]

        def put(name: str, *shape: int, bias: bool = True) -> None:
            found[f"{name}.weight"] = shape
            if bias:
                found[f"{name}.bias"] = shape[:1]

        rows, stages = cfg["feat_in"], int(math.log2(cfg["subsampling_factor"]))
        put("encoder.pre_encode.conv.0", width, 1, 3, 3)
        for stage in range(1, stages):
            if cfg["subsampling"] == "striding":
                put(f"encoder.pre_encode.conv.{2 * stage}", width, width, 3, 3)
            else:
                put(f"encoder.pre_encode.conv.{3 * stage - 1}", width, 1, 3, 3)
                put(f"encoder.pre_encode.conv.{3 * stage}", width, width, 1, 1)
        for _ in range(stages):
            rows = (rows + (3 if self.causal else 2) - 3) // 2 + 1
        put("encoder.pre_encode.out", dim, width * rows)
        inner = 2 * dim if self.squeeze else dim
        for block in range(cfg["n_layers"]):
            start = f"encoder.layers.{block}."
            for branch in ("feed_forward1", "self_att", "conv", "feed_forward2"):
                put(f"{start}norm_{branch}", dim)
                if self.squeeze:
                    scale = start + branch.replace("self_att", "self_attn") + "_scale"
                    found[f"{scale}.scale"] = found[f"{scale}.bias"] = (dim,)
            if not self.squeeze:
                put(f"{start}norm_out", dim)
            for number in (1, 2):
                put(f"{start}feed_forward{number}.linear1", hidden, dim, bias=self.bias)
                put(f"{start}feed_forward{number}.linear2", dim, hidden, bias=self.bias)
            for letter in ("q", "k", "v", "out"):
                put(f"{start}self_attn.linear_{letter}", dim, dim, bias=self.bias)
            put(f"{start}self_attn.linear_pos", dim, dim, bias=False)
            for letter in "uv":
                found[f"{start}self_attn.pos_bias_{letter}"] = (heads, dim // heads)
            put(f"{start}conv.pointwise_conv1", 2 * dim, dim, 1, bias=self.bias)
            put(f"{start}conv.depthwise_conv", inner, 1, kernel, bias=self.bias)
            put(f"{start}conv.pointwise_conv2", dim, inner, 1, bias=self.bias)
            put(f"{start}conv.batch_norm", inner)
            if cfg["conv_norm_type"] == "batch_norm":
                norm = f"{start}conv.batch_norm."
                found |= {f"{norm}running_mean": (inner,), f"{norm}running_var": (inner,)}
                found[f"{norm}num_batches_tracked"] = ()
        if self.squeeze:
            put("encoder.pre_ln", dim)
            if cfg["time_reduce_idx"] is not None:
                put("encoder.time_reduce_layer.dw_conv", dim, 1, 5)
                put("encoder.time_reduce_layer.pw_conv", dim, dim, 1)
                put("encoder.time_recovery_layer", dim, dim)
        put("decoder.decoder_layers.0", self.outputs, dim, 1)
        return found | {"preprocessor.featurizer.window": (400,), "preprocessor.featurizer.fb": (1, 16, 257)}

    def get(self, name: str) -> torch.Tensor | None:
        value = self.tensors.get(name)
        return None if value is None else value.to(self.dtype)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.get(f"{name}.weight")
        return F.linear(x, weight.reshape(weight.shape[:2]), self.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def subsample(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, sides = x[:, None], ((2, 1) if self.causal else (1, 1))
        deep = self.cfg["subsampling"] == "dw_striding"
        for stage in range(int(math.log2(self.cfg["subsampling_factor"]))):
            x = x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None, :, None]
            name = "encoder.pre_encode.conv." + str((3 * stage - 1 if stage else 0) if deep else 2 * stage)
            weight = self.get(f"{name}.weight")
            groups = x.shape[1] if deep and stage else 1
            x = F.conv2d(F.pad(x, (*sides, *sides)), weight, self.get(f"{name}.bias"), stride=2, groups=groups)
            if deep and stage:
                name = f"encoder.pre_encode.conv.{3 * stage}"
                x = F.conv2d(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))
            x = x.clamp(min=0)
            lengths = (lengths + sum(sides) - 3) // 2 + 1
        x = x.permute(0, 2, 1, 3)
        return self.linear(x.reshape(*x.shape[:2], -1), "encoder.pre_encode.out"), lengths

    def attend(self, x: torch.Tensor, name: str, allowed: torch.Tensor) -> torch.Tensor:
        """allowed [B, T, T]; the score of a pair is read from the row of its offset."""
        heads, time = self.cfg["n_heads"], x.shape[1]

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(*y.shape[:-1], heads, -1).transpose(-3, -2)

        query, key, value = (split(self.linear(x, f"{name}.linear_{letter}")) for letter in "qkv")
        rows = split(self.linear(waves(time, x.shape[2], x.dtype), f"{name}.linear_pos"))
        u, v = (self.get(f"{name}.pos_bias_{letter}")[:, None] for letter in "uv")
        places = torch.arange(time)
        row = (time - 1) - (places[:, None] - places)
        by_row = (query + v) @ rows.transpose(-2, -1)
        far = by_row.gather(-1, row.expand(len(x), heads, -1, -1))
        scores = ((query + u) @ key.transpose(-2, -1) + far) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~allowed[:, None], -1e9).softmax(-1)
        return self.linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.linear_out")

    def convolve(self, x: torch.Tensor, name: str, real: torch.Tensor) -> torch.Tensor:
        x = self.linear(x, f"{name}.pointwise_conv1")
        if self.squeeze:
            x = x * torch.sigmoid(x)
        else:
            value, gate = x.chunk(2, -1)
            x = value * torch.sigmoid(gate)
        x = (x * real[..., None]).transpose(1, 2)
        weight = self.get(f"{name}.depthwise_conv.weight")
        kernel = weight.shape[2]
        chunks = self.cfg.get("conv_context_size") == "causal"
        x = F.pad(x, (kernel - 1, 0) if chunks else (kernel // 2, kernel // 2))
        x = F.conv1d(x, weight, self.get(f"{name}.depthwise_conv.bias"), groups=x.shape[1]).transpose(1, 2)
        norm = f"{name}.batch_norm"
        if self.cfg["conv_norm_type"] == "layer_norm":
            x = self.norm(x, norm)
        else:
            x = (x - self.get(f"{norm}.running_mean")) / (self.get(f"{norm}.running_var") + 1e-5).sqrt()
            x = x * self.get(f"{norm}.weight") + self.get(f"{norm}.bias")
        return self.linear(x * torch.sigmoid(x), f"{name}.pointwise_conv2")

    def forward_ff(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = self.linear(x, f"{name}.linear1")
        return self.linear(x * torch.sigmoid(x), f"{name}.linear2")

    def conformer(self, x: torch.Tensor, name: str, real: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.forward_ff(self.norm(x, f"{name}.norm_feed_forward1"), f"{name}.feed_forward1")
        x = x + self.attend(self.norm(x, f"{name}.norm_self_att"), f"{name}.self_attn", allowed)
        x = x + self.convolve(self.norm(x, f"{name}.norm_conv"), f"{name}.conv", real)
        x = x + 0.5 * self.forward_ff(self.norm(x, f"{name}.norm_feed_forward2"), f"{name}.feed_forward2")
        return self.norm(x, f"{name}.norm_out")

    def squeezeformer(self, x: torch.Tensor, name: str, real: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        def scaled(x: torch.Tensor, branch: str) -> torch.Tensor:
            return x * self.get(f"{name}.{branch}_scale.scale") + self.get(f"{name}.{branch}_scale.bias")

        y = self.attend(scaled(x, "self_attn"), f"{name}.self_attn", allowed)
        x = self.norm(x + y, f"{name}.norm_self_att")
        y = self.forward_ff(scaled(x, "feed_forward1"), f"{name}.feed_forward1")
        x = self.norm(x + y, f"{name}.norm_feed_forward1")
        y = self.convolve(scaled(x, "conv"), f"{name}.conv", real)
        x = self.norm(x + y, f"{name}.norm_conv")
        y = self.forward_ff(scaled(x, "feed_forward2"), f"{name}.feed_forward2")
        return self.norm(x + y, f"{name}.norm_feed_forward2")

    def allowed(self, time: int) -> torch.Tensor:
        places, size = torch.arange(time), self.cfg["att_context_size"]
        if self.cfg["self_attention_model"] == "rel_pos_local_attn":
            return (places[:, None] - places).abs() <= size[0]
        if self.cfg.get("att_context_style", "regular") == "regular" or size == [-1, -1]:
            return torch.ones(time, time, dtype=torch.bool)
        left, right = size[0] if isinstance(size[0], list) else size
        behind = places[:, None] // (right + 1) - places // (right + 1)
        return (behind >= 0) & (behind <= left // (right + 1))

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of features [B, T, mels], and their lengths."""
        self.dtype = features.dtype
        x, lengths = self.subsample(features, lengths)
        x = x * (math.sqrt(self.cfg["d_model"]) if self.cfg["xscaling"] else 1.0)
        real = torch.arange(x.shape[1]) < lengths[:, None]
        allowed = self.allowed(x.shape[1]) & real[:, None]
        reduced, saved = self.cfg.get("time_reduce_idx"), None
        if self.squeeze:
            x = self.norm(x, "encoder.pre_ln")
        for block in range(self.cfg["n_layers"]):
            if self.squeeze and block == reduced:
                saved = x, real, allowed
                name = "encoder.time_reduce_layer.dw_conv"
                x = (x * real[..., None]).transpose(1, 2)
                weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
                x = F.conv1d(x, weight, bias, stride=2, padding=3, groups=x.shape[1]).transpose(1, 2)
                x = self.linear(x, "encoder.time_reduce_layer.pw_conv")
                real, allowed = real[:, ::2], allowed[:, ::2, ::2]
                x = x[:, : real.shape[1]]
            if saved is not None and block == self.cfg["n_layers"] - 1:
                before, real, allowed = saved
                x = torch.stack([x, x], 2).flatten(1, 2)[:, : before.shape[1]]
                x = before + self.linear(x, "encoder.time_recovery_layer")
            step = self.squeezeformer if self.squeeze else self.conformer
            x = step(x, f"encoder.layers.{block}", real, allowed)
        return self.linear(x, "decoder.decoder_layers.0"), lengths

    def archive(self, path, mode: str = "w", start: str = "", **more):
        """A .nemo file; more are members by name, with a dot for "__"."""
        weights = io.BytesIO()
        torch.save(self.tensors, weights)
        members = {"model_config.yaml": yaml.safe_dump(self.config).encode(), "model_weights.ckpt": weights.getvalue()}
        return pack(path, members | {name.replace("__", "."): text for name, text in more.items()}, mode, start)


def pack(path, members: dict[str, bytes], mode: str = "w", start: str = ""):
    with tarfile.open(path, mode) as file:
        for name, text in members.items():
            entry = tarfile.TarInfo(start + name)
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    return path


CHUNKED = {"att_context_style": "chunked_limited", "causal_downsampling": True, "conv_context_size": "causal"}
CHUNKED |= {"att_context_size": [6, 2], "conv_norm_type": "layer_norm"}
FAST = {"subsampling": "dw_striding", "subsampling_factor": 8, "conv_kernel_size": 9}
NETWORKS = {
    "conformer": {},
    "conformer, unscaled, no biases": {"xscaling": False, "use_bias": False, "ff_expansion_factor": 2},
    "conformer, other channels": {"subsampling_conv_channels": 10, "conv_norm_type": "layer_norm"},
    "conformer, depthwise": {"subsampling": "dw_striding"},
    "conformer, chunks": CHUNKED,
    "conformer, local attention": {"self_attention_model": "rel_pos_local_attn", "att_context_size": [4, 4]},
    "fast conformer": FAST | {"subsampling_conv_channels": 12},
    "fast conformer, usual channels": FAST | {"subsampling_conv_channels": 256, "untie_biases": False},
    "fast conformer, causal subsampling": FAST | {"causal_downsampling": True},
    "fast conformer, chunks": FAST | CHUNKED | {"att_context_size": [[4, 1], [4, 0]], "att_context_probs": [0.5, 0.5]},
    "fast conformer, no look-ahead": FAST | CHUNKED | {"att_context_size": [5, 0], "conv_norm_type": "batch_norm"},
    "squeezeformer": {"squeeze": True},
    "squeezeformer, named recovery": {"squeeze": True, "n_layers": 3, "time_reduce_idx": 1, "time_recovery_idx": 2},
    "squeezeformer, no reduction": {"squeeze": True, "time_reduce_idx": None, "adaptive_scale": False},
    "squeezeformer, reduction at once": {"squeeze": True, "time_reduce_idx": 0, "subsampling": "striding"},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nemo_gives_the_same(tmp_path, name, dtype):
    network = Nemo(**NETWORKS[name])
    features = clips(16, dtype)
    wanted, lengths = network(features, LENGTHS)
    model = from_nemo(network.archive(tmp_path / "model.nemo")).model.to(dtype)
    assert differ(model, features, wanted, lengths) < (1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", ["conformer", "fast conformer, chunks", "squeezeformer"])
def test_each_number_of_the_file_is_taken_once(tmp_path, name):
    network = Nemo(**NETWORKS[name])
    model = from_nemo(network.archive(tmp_path / "model.nemo")).model
    left_out = ("num_batches_tracked", "preprocessor.featurizer")
    used = {key: value for key, value in network.tensors.items() if not any(word in key for word in left_out)}
    found = torch.cat([value.flatten() for value in model.state_dict().values()])
    wanted = torch.cat([value.flatten() for value in used.values()])
    assert torch.equal(found.sort().values, wanted.sort().values)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for key in list(used)[::23]:
        less = {other: value for other, value in network.tensors.items() if other != key}
        with pytest.raises(ValueError, match=f"'{key}' is missing"):
            from_nemo(less, network.config)


def test_presets_are_recognised(tmp_path):
    large = {"feat_in": 80, "n_layers": 16, "n_heads": 4, "outputs": 129}
    shapes = {
        "squeezeformer_xs": large | {"squeeze": True, "d_model": 144, "time_reduce_idx": 7, "conv_kernel_size": 31},
        "conformer_ctc_s": large | {"d_model": 144, "conv_kernel_size": 31},
        "fastconformer_s": large | FAST | {"d_model": 176, "subsampling_conv_channels": 256},
    }
    for name, choices in shapes.items():
        network = Nemo(**choices)
        assert from_nemo(network.tensors, network.config).model.config == PRESETS[name]


def test_other_chunks_of_a_model_of_several(tmp_path):
    choices = FAST | CHUNKED | {"att_context_size": [[4, 1], [4, 0]]}
    network = Nemo(**choices)
    model = from_nemo(network.tensors, network.config).model
    network.cfg["att_context_size"] = [4, 0]
    features = clips(16)
    wanted, lengths = network(features, LENGTHS)
    with torch.no_grad():
        got, _ = model(features, LENGTHS, Chunks(1, 4))
    assert relative(got[real_frames(lengths)], wanted[real_frames(lengths)]) < 1e-5


@pytest.mark.parametrize("mode, start", [("w", "./"), ("w:gz", ""), ("w:gz", "./")])
def test_archives_of_any_kind(tmp_path, mode, start):
    network = Nemo()
    model = from_nemo(network.archive(tmp_path / "model.nemo", mode, start)).model
    assert torch.equal(model.head.bias, network.tensors["decoder.decoder_layers.0.bias"])


def test_plain_tensors_with_a_config(tmp_path):
    network = Nemo(squeeze=True)
    tensors = {name: value.contiguous() for name, value in network.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(network.config))
    wanted = from_nemo(tensors, network.config).model.state_dict()
    found = from_nemo(tmp_path / "model.safetensors", tmp_path / "config.yaml").model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    given = {value.untyped_storage().data_ptr() for value in tensors.values()}
    assert not given & {value.untyped_storage().data_ptr() for value in wanted.values()}
    refused(tensors, "a state dict does not describe its model", from_nemo)
    sparse = tensors | {"encoder.pre_encode.conv.0.bias": torch.ones(24).to_sparse()}
    refused(sparse, "'encoder.pre_encode.conv.0.bias' must be a floating-point tensor", from_nemo, network.config)
    refused(tmp_path / "none", "is not a complete safetensors file", from_nemo, network.config)
    refused(tensors, "cannot be read: No such file", from_nemo, tmp_path / "none.yaml")


FEATURES = {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "sample_rate": 16000}
FEATURES |= {"normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01, "window": "hann", "features": 16}
FEATURES |= {"n_fft": 512, "frame_splicing": 1, "dither": 1e-5, "pad_to": 0, "log": True, "pad_value": 0.0}


def test_features_and_tokenizers_of_nemo(tmp_path):
    network = Nemo()
    network.config["preprocessor"] = FEATURES
    found = from_nemo(network.tensors, network.config)
    assert found.preprocess == replace(RECIPES["nemo"], mels=16) and found.tokenizer is None
    network.config["preprocessor"] = FEATURES | {"normalize": "NA", "window_stride": 0.02, "mag_power": 2}
    assert from_nemo(network.tensors, network.config).preprocess == replace(RECIPES["streaming"], mels=16, hop=320)
    network.config["decoder"]["vocabulary"] = list("abcdefghij ")
    assert from_nemo(network.tensors, network.config).tokenizer == Characters("abcdefghij ")
    pieces = train_pieces(TEXTS, 28)
    network = Nemo(outputs=29)
    network.config["tokenizer"] = {"type": "bpe", "dir": "somewhere", "model_path": "nemo:0a_tokenizer.model"}
    path = network.archive(tmp_path / "a.nemo", start="./", **{"0a_tokenizer__model": pieces.model, "vocab__txt": b""})
    assert from_nemo(path).tokenizer == pieces
    network.archive(path, **{"0a_tokenizer__model": train_pieces(TEXTS, 26).model})
    refused(path, "the tokenizer has 26 pieces, but the model has 29 outputs", from_nemo)
    network.archive(path, **{"0a_tokenizer__model": b"no model"})
    refused(path, "the tokenizer: not a sentencepiece model", from_nemo)


UNSAID = {
    "encoder.self_attention_model": ("abs_pos", "self_attention_model: the zoo supports 'rel_pos'"),
    "encoder.subsampling": (
        "vggnet",
        "encoder.subsampling: the zoo supports 'striding' or 'dw_striding', not 'vggnet'",
    ),
    "encoder.subsampling_factor": (8, "encoder.subsampling_factor: the zoo supports 4, not 8"),
    "encoder.conv_norm_type": ("group_norm8", "encoder.conv_norm_type: the zoo supports 'batch_norm' or 'layer_norm'"),
    "encoder.conv_context_size": ("causal", "conv_context_size: the zoo supports 'causal' with chunks"),
    "encoder.att_context_size": ([4, 4], "att_context_size: .* needs att_context_style 'chunked_limited'"),
    "encoder.att_context_style": ("dreamt", "att_context_style: the zoo supports 'regular' or 'chunked_limited'"),
    "encoder.feat_out": (100, "encoder.feat_out: the zoo supports -1 or null or 24, not 100"),
    "encoder.feat_in": ("${model.preprocessor.features}", "encoder.feat_in: it must be an integer, got '"),
    "encoder.reduction_factor": (2, "encoder.reduction: the zoo supports null, not 'pooling'"),
    "encoder.global_tokens": (1, "encoder.global_tokens: models with global tokens are not supported"),
    "encoder.n_heads": (5, "heads must divide dim 24, got 5"),
    "encoder.d_model": (None, "encoder.d_model: it must be an integer, got null"),
    "encoder.n_layers": (True, "encoder.n_layers: it must be an integer, got true"),
    "encoder.conv_kernel_size": (6, "kernel must be odd"),
    "encoder.causal_downsampling": (True, r"'encoder.pre_encode.out.weight' has shape \[24, 96\], .* \[24, 120\]"),
    "encoder.gates": (2, r"encoder.gates: the zoo does not know this key \(its value is 2\)"),
    "encoder._target_": ("nemo.ConvASREncoder", "_target_: the zoo supports ConformerEncoder or SqueezeformerEncoder"),
    "decoder._target_": ("nemo.RNNTDecoder", "decoder._target_: the zoo supports ConvASRDecoder, not RNNTDecoder"),
    "decoder.num_classes": (-1, "decoder.num_classes: neither it nor the vocabulary"),
    "decoder.add_blank": (False, "decoder.add_blank: the zoo supports true"),
    "preprocessor.normalize": ("all_features", "preprocessor.normalize: the zoo supports 'per_feature'"),
    "preprocessor.features": (20, "the features have 20 mel bands, but the model takes 16"),
    "preprocessor.window": ("hamming", "preprocessor.window: the zoo supports 'hann'"),
    "preprocessor.window_size": (0.05, "preprocessor: .* window <= fft"),
    "preprocessor.new": (1, "preprocessor.new: the zoo does not know this key"),
    "preprocessor.log_zero_guard_value": ("eps", "log_zero_guard_value: it must be a number"),
}


@pytest.mark.parametrize("key", UNSAID)
def test_a_key_that_cannot_be_honoured_is_refused(key):
    network = Nemo()
    config = network.config | {"preprocessor": FEATURES}
    section, _, name = key.partition(".")
    config[section] = config[section] | {"vocabulary": []} | {name: UNSAID[key][0]}
    if section != "decoder":
        del config[section]["vocabulary"]
    if name == "reduction_factor":
        config[section]["reduction"] = "pooling"
    refused(network.tensors, UNSAID[key][1], from_nemo, config)


MISFITS = {
    "causal_downsampling": (
        False,
        "encoder.causal_downsampling: for models with chunks the zoo supports only true",
    ),
    "conv_context_size": (None, "encoder.conv_context_size: the zoo supports 'causal' with chunks"),
    "att_context_size": ([-1, 2], "only chunks with a limited context"),
    "att_context_size ": ([7, 2], "chunk must be >= 1 and divide left"),
    "att_context_size  ": ("all", "att_context_size: it must be two integers"),
    "self_attention_model": ("rel_pos_local_attn", "local attention must be as wide on either side"),
    "conv_context_size ": ([1, 5], "the zoo supports 'causal' or null"),
}


@pytest.mark.parametrize("key", MISFITS)
def test_chunks_that_do_not_fit_are_refused(key):
    network = Nemo(**CHUNKED)
    config = network.config | {"encoder": network.config["encoder"] | {key.strip(): MISFITS[key][0]}}
    refused(network.tensors, MISFITS[key][1], from_nemo, config)


def test_a_recovery_elsewhere_is_refused():
    network = Nemo(squeeze=True, time_recovery_idx=2)
    refused(network.tensors, "time_recovery_idx: the zoo supports null or 3, not 2", from_nemo, network.config)
    network = Nemo(squeeze=True, time_reduce_idx=3)
    refused(network.tensors, "the rate is halved before block 3", from_nemo, network.config)


class Evil:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_an_archive_is_run(tmp_path):
    network, trap, path = Nemo(), tmp_path / "trap", tmp_path / "model.nemo"
    pickles = [pickle.dumps({"a": Evil(trap)})]
    stored = io.BytesIO()
    torch.save({"a": Evil(trap)}, stored)
    pickles += [stored.getvalue(), pickle.dumps(Evil(trap), protocol=0)]
    for content in pickles:
        network.archive(path, model_weights__ckpt=content)
        refused(path, "model_weights.ckpt is not a complete file of plain tensors", from_nemo)
    text = f"encoder: !!python/object/apply:os.mkdir ['{trap}']".encode()
    network.archive(path, model_config__yaml=text)
    refused(path, "model_config.yaml cannot be read as YAML", from_nemo)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "link"])
def test_members_outside_the_archive_are_refused(tmp_path, name):
    path = tmp_path / "model.nemo"
    Nemo().archive(path)
    with tarfile.open(path, "a") as file:
        entry = tarfile.TarInfo(name)
        if name == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(entry)
    refused(path, "is not a plain file", from_nemo)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.nemo"]


def test_broken_archives_are_refused(tmp_path):
    network, path = Nemo(), tmp_path / "model.nemo"
    refused(path, "cannot be read as a .nemo archive: .*No such file", from_nemo)
    refused(tmp_path, "cannot be read as a .nemo archive", from_nemo)
    for mode in ("w", "w:gz"):
        whole = network.archive(path, mode).read_bytes()
        for share in (0.0, 0.01, 0.5, 0.9):
            path.write_bytes(whole[: int(share * len(whole))])
            refused(path, "cannot be read as a .nemo archive|is not a NeMo model", from_nemo)
    pack(path, {"model_config.yaml": b"a: 1"})
    refused(path, "it has no model_weights.ckpt", from_nemo)
    for text, words in {
        b"encoder: [": "cannot be read as YAML",
        b"\xff\xfe\x00": "cannot be read as YAML",
        b"[" * 5000: "cannot be read as YAML",
        b"- 1": "is not the config of a model",
        b"a: 1": "has no section 'encoder'",
    }.items():
        network.archive(path, model_config__yaml=text)
        refused(path, words, from_nemo)
    for content, words in {
        b"": "is not a complete file of plain tensors",
        pickle.dumps([1, 2]): "is not a complete file|holds no tensors by name",
    }.items():
        network.archive(path, model_weights__ckpt=content)
        refused(path, words, from_nemo)
    for tensors, words in (
        ({}, "holds no tensors by name"),
        ({"a": 1}, "holds 'a', which is not a tensor"),
        (network.tensors | {"a": torch.ones(1)}, "the tensor 'a' is not used"),
        (
            network.tensors | {"decoder.decoder_layers.0.bias": torch.ones(13)},
            r"has shape \[13\], but this model needs \[12\]",
        ),
        (
            network.tensors | {"decoder.decoder_layers.0.bias": torch.ones(())},
            r"has shape \[\], but this model needs \[12\]",
        ),
    ):
        stored = io.BytesIO()
        torch.save(tensors, stored)
        network.archive(path, model_weights__ckpt=stored.getvalue())
        refused(path, words, from_nemo)
    stored = io.BytesIO()
    torch.save(network.tensors, stored)
    network.archive(path, model_weights__ckpt=stored.getvalue()[:-200])
    refused(path, "is not a complete file of plain tensors", from_nemo)
