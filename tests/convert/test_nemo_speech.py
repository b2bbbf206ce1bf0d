"""Speech models of NeMo become ours with the same output, and what has no counterpart is refused."""

import io
import os
import pickle
import tarfile
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers import relative
from published_speech import LENGTHS, TEXTS, Nemo, clips, differ, pack, real_frames, refused
from zoo.convert import from_nemo
from zoo.inputs.audio import RECIPES
from zoo.layer import Chunks
from zoo.models import PRESETS
from zoo.outputs.tokens import Characters, train_pieces

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
