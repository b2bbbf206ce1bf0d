"""Speech models of transformers become ours with the same output, and what has no counterpart is refused."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ParakeetFeatureExtractor,
)
from transformers.convert_slow_tokenizer import ParakeetConverter

from helpers import relative
from published_speech import LENGTHS, TEXTS, clips, differ, parakeet, real_frames, refused, waves
from zoo.convert import from_transformers
from zoo.inputs.audio import RECIPES
from zoo.models import PRESETS
from zoo.outputs.tokens import WordPieces, train_pieces


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
