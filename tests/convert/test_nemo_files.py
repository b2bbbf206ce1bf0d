"""Archives and configs of NeMo that ask for more than they hold, and what null means in a config from elsewhere."""

import gzip
import io
import json
import tarfile
import time
import zipfile
from dataclasses import replace

import pytest
import torch
import yaml

from zoo.convert import from_nemo, yaml_config
from zoo.convert.nemo import files
from zoo.convert.nemo.archive import _features, _seen
from zoo.convert.source import Section
from zoo.convert.speech import Facts, build
from zoo.convert.transformers import parakeet
from zoo.inputs.audio import RECIPES

FEATURES = {"_target_": "nemo.AudioToMelSpectrogramPreprocessor", "normalize": "per_feature", "window_size": 0.025}
FEATURES |= {"window": "hann", "features": 80, "n_fft": 512}


def test_null_means_in_nemo_what_it_means_there():
    assert _features(FEATURES, "a").preemphasis == 0.97
    assert _features(FEATURES | {"preemph": None}, "a") == replace(RECIPES["nemo"], preemphasis=0.0)
    assert _features(FEATURES | {"n_fft": None, "highfreq": None}, "a") == RECIPES["nemo"]
    assert _features(FEATURES | {"normalize": None}, "a").normalize == "none"
    encoder = Section({"xscaling": None}, "encoder", "a")
    assert encoder.take("xscaling", bool, True, null=False) is False
    assert _seen(Section({"att_context_size": None, "conv_context_size": None}, "encoder", "a"), 9) == {}


@pytest.mark.parametrize("key", ["sample_rate", "window_size", "window_stride", "features", "lowfreq", "window", "log"])
def test_null_without_a_meaning_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"^a: preprocessor.{key}: .*(got|not) null$"):
        _features(FEATURES | {key: None}, "a")


def test_seconds_become_samples_as_nemo_counts_them():
    made = _features(FEATURES | {"sample_rate": 22050, "window_size": 0.035, "n_fft": 1024}, "a")
    assert (made.window, made.hop) == (771, 220)
    for seconds in (0.0, -1.0, 1e9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="preprocessor.window_size: it must be from 1 to"):
            _features(FEATURES | {"window_size": seconds}, "a")


def test_null_in_the_features_of_transformers(tmp_path):
    given = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "win_length": 400, "n_fft": 512}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(given | {"preemphasis": None}))
    assert parakeet._features(tmp_path, 80) == replace(RECIPES["nemo"], preemphasis=0.0)
    for key in given:
        path.write_text(json.dumps(given | {key: None}))
        with pytest.raises(ValueError, match=f"{key}: it must be an integer, got null"):
            parakeet._features(tmp_path, 80)
    path.unlink()
    assert parakeet._features(tmp_path, 80) == RECIPES["nemo"]
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": null}')
    with pytest.raises(ValueError, match="has no section 'feature_extractor'"):
        parakeet._features(tmp_path, 80)


def facts(**choices) -> Facts:
    usual = {"dim": 16, "depth": 2, "heads": 2, "hidden": 64, "kernel": 9, "mels": 16, "outputs": 12}
    return Facts(**(usual | {"depthwise": False, "factor": 4, "channels": 16} | choices))


@pytest.mark.parametrize("rename", [str, lambda name: name.replace("pre_encode.out", "subsampling.linear")])
def test_a_config_is_compared_with_the_tensors_before_anything_is_built(monkeypatch, rename):
    tensors = {rename("encoder.pre_encode.out.weight"): torch.zeros(16, 4)}
    tensors |= {f"encoder.layers.{block}.norm_out.weight": torch.zeros(16) for block in range(2)}
    monkeypatch.setattr("zoo.convert.speech.configure", lambda facts: pytest.fail("a model was made"))
    for wrong, words in (
        ({"depth": 10**6}, "asks for 1000000 blocks, but the tensors are those of 2"),
        ({"depth": 1}, "asks for 1 blocks"),
        ({"dim": 10**6}, "asks for 1000000 channels, but .* has 16"),
    ):
        with pytest.raises(ValueError, match=words):
            build(facts(**wrong), tensors, "file", rename)
    with pytest.raises(ValueError, match="is missing"):
        build(facts(depth=0), {}, "file", rename)


@pytest.mark.parametrize("key", ["d_model", "n_layers", "conv_kernel_size", "feat_in", "ff_expansion_factor"])
def test_absurd_numbers_of_a_config_are_refused_by_name(key):
    encoder = {"_target_": "nemo.ConformerEncoder", "d_model": 16, "n_layers": 2, "feat_in": 16}
    config = {"encoder": encoder | {key: 10**30}, "decoder": {"_target_": "nemo.ConvASRDecoder", "num_classes": 5}}
    with pytest.raises(ValueError, match=f"encoder.{key}: it must be from 1 to 1,000,000") as caught:
        from_nemo({"a": torch.zeros(1)}, config)
    assert "\n" not in str(caught.value)


# Archives


def pack(path, members: dict[str, bytes], **sizes: int):
    with tarfile.open(path, "w") as file:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    return path


def refusal(path) -> str:
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        from_nemo(path)
    assert "\n" not in str(caught.value) and time.process_time() - started < 2
    return str(caught.value)


def test_an_archive_that_expands_without_end_is_refused(tmp_path):
    path = tmp_path / "model.nemo"
    entry = tarfile.TarInfo("model_weights.ckpt")
    entry.size = 2**40
    with gzip.open(path, "wb", 1) as file:
        file.write(entry.tobuf() + bytes(2**20))
    assert "expands to far more than its own size" in refusal(path)


def test_a_header_that_asks_for_memory_is_refused(tmp_path):
    path = tmp_path / "model.nemo"
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 2**32
    with gzip.open(path, "wb", 1) as file:
        file.write(entry.tobuf() + bytes(2**20))
    assert "a part of more than" in refusal(path)


def test_too_many_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "model.nemo", "w") as file:
        for number in range(files.MEMBERS + 1):
            file.addfile(tarfile.TarInfo(str(number)))
    assert "too many files" in refusal(tmp_path / "model.nemo")


ALIASES = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
CONFIGS = {
    ALIASES: "more than 200,000 values; repeated aliases",
    "a: &a [*a]": "contains itself",
    "a: 1\na: 2": "the key 'a' appears twice",
    f"a: {'1' * 70_000}": "more than 65,536 characters",
    f"a: {'1' * 5_000}": "cannot be read as YAML",
    " " * (yaml_config.BYTES + 1): "at most 1,048,576 are read",
    "[" * 5_000: "cannot be read as YAML",
    "- 1": "is not the config of a model",
    "": "is not the config of a model",
}


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_grows_or_repeats_itself_is_refused(tmp_path, text):
    path = pack(tmp_path / "model.nemo", {"model_config.yaml": text.encode(), "model_weights.ckpt": b""})
    assert CONFIGS[text] in refusal(path)


def test_aliases_are_read_where_they_stay_small():
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}"
    assert yaml_config.config_of(text.encode(), "a") == yaml.safe_load(text)


def test_tensors_that_claim_more_than_is_stored_are_refused():
    def stored(tensors) -> bytes:
        stream = io.BytesIO()
        torch.save(tensors, stream)
        return stream.getvalue()

    content = stored({"a": torch.arange(600.0)})
    assert files.tensors_of(content, "file")["a"].tolist() == list(range(600))
    with pytest.raises(ValueError, match="claim far more values than it stores"):
        files.tensors_of(stored({"a": torch.zeros(1).expand(10**6, 10**6)}), "file")
    with pytest.raises(ValueError, match="claim far more values than it stores"):
        files.tensors_of(
            stored(
                {str(n): torch.zeros(4000).expand(4000) for n in range(2)}
                | dict.fromkeys("abcdefg", torch.ones(90_000))
            ),
            "file",
        )
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    with pytest.raises(ValueError, match="compressed or overlap"):
        files.tensors_of(packed.getvalue(), "file")
