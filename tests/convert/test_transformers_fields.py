"""Every field that matters in the configs of Parakeet, DETR and RT-DETRv2 is changed once: the output is that of
transformers with the same change, or the config is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DetrForObjectDetection,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ResNetConfig,
    RTDetrV2ForObjectDetection,
)

from published_detectors import DEPTHS, WIDTHS, detr, rtdetr, timm, written
from published_speech import parakeet
from zoo.convert import from_transformers

KINDS: dict[str, Any] = {"parakeet": ParakeetForCTC, "detr": DetrForObjectDetection, "timm": DetrForObjectDetection}
KINDS["rtdetr"] = RTDetrV2ForObjectDetection
INSIDE = "backbone_config."
SPEECH = "encoder_config."

# Changes that change the output.
CHANGED: list[tuple[str, str, Any]] = [
    ("parakeet", SPEECH + "scale_input", False),
    ("detr", "activation_function", "gelu"),
    ("detr", "activation_function", "silu"),
    ("timm", INSIDE + "output_stride", 16),
    ("rtdetr", "encoder_activation_function", "relu"),
    ("rtdetr", "decoder_activation_function", "gelu"),
    ("rtdetr", "num_queries", 5),
]
# Changes that change nothing: other spellings, defaults, null where it means the default, and what acts in training.
SAME: list[tuple[str, str, Any]] = [
    ("parakeet", SPEECH + "hidden_act", "swish"),
    ("parakeet", SPEECH + "scale_input", ...),
    ("parakeet", SPEECH + "max_position_embeddings", 4),
    ("parakeet", SPEECH + "layerdrop", 0.9),
    ("parakeet", SPEECH + "dropout", 0.9),
    ("parakeet", SPEECH + "initializer_range", 1.0),
    ("parakeet", "pad_token_id", 0),
    ("parakeet", "ctc_loss_reduction", "sum"),
    ("detr", "dilation", True),
    ("detr", "scale_embedding", True),
    ("detr", "use_timm_backbone", None),
    ("detr", "backbone", "resnet34"),
    ("detr", "backbone_kwargs", {"output_stride": 16}),
    ("detr", INSIDE + "out_indices", None),
    ("detr", INSIDE + "out_features", None),
    ("timm", "dilation", True),
    ("timm", INSIDE + "output_stride", None),
    ("timm", INSIDE + "freeze_batch_norm_2d", True),
    ("timm", INSIDE + "use_pretrained_backbone", True),
    ("rtdetr", "eval_size", None),
    ("rtdetr", "anchor_image_size", [96, 160]),
    ("rtdetr", "encoder_in_channels", [1, 2, 3]),
    ("rtdetr", "freeze_backbone_batch_norms", False),
    ("rtdetr", "tie_word_embeddings", False),
    ("rtdetr", "auxiliary_loss", False),
    ("rtdetr", "layer_norm_eps", ...),
    ("rtdetr", "dropout", 0.5),
    ("rtdetr", "use_timm_backbone", True),
]
REFUSED: list[tuple[str, str, Any, str]] = [
    ("parakeet", SPEECH + "hidden_act", "gelu", "hidden_act: the zoo supports 'silu' or 'swish', not 'gelu'"),
    ("parakeet", SPEECH + "hidden_act", None, "hidden_act: .* not null"),
    ("parakeet", SPEECH + "attention_bias", None, "attention_bias: it must be true or false, got null"),
    ("parakeet", SPEECH + "attention_bias", False, "linear1.bias' is not used"),
    ("parakeet", SPEECH + "convolution_bias", False, "depthwise_conv.bias' is not used"),
    ("parakeet", SPEECH + "head_dim", 4, "head_dim: the zoo does not know this key"),
    ("parakeet", SPEECH + "layer_norm_eps", 0.1, "layer_norm_eps: the zoo does not know this key"),
    ("parakeet", SPEECH + "num_attention_heads", 2, "num_key_value_heads: the zoo supports 2, not 4"),
    ("parakeet", SPEECH + "num_hidden_layers", 1, "asks for 1 blocks, but the tensors are those of 2"),
    ("parakeet", SPEECH + "subsampling_factor", None, "subsampling_factor: the zoo supports 8 or 4, not null"),
    ("parakeet", "pad_token_id", None, "pad_token_id: it must be from 0 to 11, got None"),
    ("parakeet", "pad_token_id", ..., "pad_token_id: it must be from 0 to 11, got 1024"),
    ("parakeet", "blank_token_id", 3, "blank_token_id: the zoo does not know this key"),
    ("parakeet", "encoder_config", None, "has no section 'encoder_config'"),
    ("detr", "activation_function", "gelu_new", "activation_function: the zoo supports"),
    ("detr", "activation_function", None, "activation_function: .* not null"),
    ("detr", "auxiliary_loss", True, "auxiliary_loss: the zoo supports false, not true"),
    ("detr", "position_embedding_type", "learned", "position_embedding_type: the zoo supports 'sine'"),
    ("detr", "encoder_attention_heads", 2, "decoder_attention_heads: the zoo supports 2, not 4"),
    ("detr", "decoder_attention_heads", 2, "decoder_attention_heads: the zoo supports 4, not 2"),
    ("detr", "num_attention_heads", 2, "num_attention_heads: the zoo supports 4, not 2"),
    ("detr", "num_hidden_layers", 5, "num_hidden_layers: the zoo supports 1, not 5"),
    ("detr", "hidden_size", 64, "hidden_size: the zoo supports 32, not 64"),
    ("detr", "num_labels", 2, "num_labels: the zoo supports 4, not 2"),
    ("detr", "num_channels", 1, "num_channels: the zoo supports 3 or null, not 1"),
    ("detr", "layer_norm_eps", 0.1, "layer_norm_eps: the zoo does not know this key"),
    ("detr", "encoder_layers", 2, "'model.encoder.layers.1.self_attn.q_proj.weight' is missing"),
    ("detr", "decoder_layers", 1, "is not used by this model"),
    ("detr", "backbone_config", None, "backbone_config: it is missing"),
    ("detr", INSIDE + "hidden_act", "gelu", "hidden_act: the zoo supports 'relu', not 'gelu'"),
    ("detr", INSIDE + "hidden_act", None, "hidden_act: the zoo supports 'relu', not null"),
    ("detr", INSIDE + "out_features", ["stage3"], "out_features: it must end with 'stage4', the last map"),
    ("detr", INSIDE + "out_indices", [3], "out_indices: it must end with 4, the last map"),
    ("detr", INSIDE + "out_indices", "4", "out_indices: it must be a list"),
    ("detr", INSIDE + "downsample_in_first_stage", True, "downsample_in_first_stage: the zoo supports false"),
    ("timm", INSIDE + "output_stride", 8, "output_stride: the zoo supports null or 16 or 32, not 8"),
    ("timm", INSIDE + "backbone", "resnet34", "'model.backbone.model.layer1.2.conv1.weight' is missing"),
    ("timm", INSIDE + "backbone", None, "backbone: it must be a string, got null"),
    ("rtdetr", "layer_norm_eps", 0.1, "layer_norm_eps: the zoo supports 1e-05, not 0.1"),
    ("rtdetr", "layer_norm_eps", None, "layer_norm_eps: the zoo supports 1e-05, not null"),
    ("rtdetr", "batch_norm_eps", 0.1, "batch_norm_eps: the zoo supports 1e-05, not 0.1"),
    ("rtdetr", "activation_function", "relu", "activation_function: the zoo supports 'silu', not 'relu'"),
    ("rtdetr", "eval_size", 640, "eval_size: the zoo supports null, not 640"),
    ("rtdetr", "eval_size", [640, 640], "eval_size: the zoo supports null, not"),
    ("rtdetr", "encode_proj_layers", [1], r"encode_proj_layers: the zoo supports \[2\]"),
    ("rtdetr", "normalize_before", True, "normalize_before: the zoo supports false"),
    ("rtdetr", "decoder_offset_scale", 1.0, "decoder_offset_scale: the zoo supports 0.5"),
    ("rtdetr", "decoder_method", "discrete", "decoder_method: the zoo supports 'default'"),
    ("rtdetr", "positional_encoding_temperature", 100, "positional_encoding_temperature: the zoo supports 10000"),
    ("rtdetr", "encoder_attention_heads", 2, "encoder_attention_heads: the zoo supports 4, not 2"),
    ("rtdetr", "num_attention_heads", 2, "num_attention_heads: the zoo supports 4, not 2"),
    ("rtdetr", "hidden_size", 64, "hidden_size: the zoo supports 32, not 64"),
    ("rtdetr", "num_labels", 3, "num_labels: the zoo supports 5, not 3"),
    ("rtdetr", "decoder_in_channels", [16] * 3, r"decoder_in_channels: the zoo supports \[32, 32, 32\]"),
    ("rtdetr", "hidden_expansion", None, "hidden_expansion: it must be a number, got null"),
    ("rtdetr", "decoder_n_points", 2, "sampling_offsets.weight' has shape"),
    ("rtdetr", "feat_strides", [4, 8, 16], "strides must end with 32"),
    ("rtdetr", "num_denoising", 0, "'model.denoising_class_embed.weight' is not used"),
    ("rtdetr", "encoder_layers", 2, "layers.1.self_attn.q_proj.weight' is missing"),
    ("rtdetr", INSIDE + "hidden_act", "gelu", "hidden_act: the zoo supports 'relu', not 'gelu'"),
    ("rtdetr", INSIDE + "out_features", ["stage1", "stage2", "stage3"], "out_features: it must end with 'stage4'"),
    ("rtdetr", INSIDE + "depths", [3, 4, 6, 3], "is missing"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models of transformers in fp64 with random weights, large enough that every change shows, and their folders."""
    config = ResNetConfig(layer_type="basic", hidden_sizes=WIDTHS["basic"], depths=DEPTHS["basic"])
    config.out_features = ["stage4"]
    made = {"parakeet": parakeet().double(), "timm": detr(**timm()), "rtdetr": rtdetr()}
    made["detr"] = detr(backbone_config=config, use_timm_backbone=False, backbone=None)
    found = {}
    for name, model in made.items():
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if "backbone" not in key and name != "parakeet":
                nn.init.normal_(parameter, std=0.3, generator=generator)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = model, folder
    return found


def edited(folder: Path, target: Path, path: str, value: Any) -> Path:
    """A copy of a folder in which one field of the config is another, or is not there for `...`."""
    config = json.loads((folder / "config.json").read_text())
    *outer, key = path.split(".")
    inside = config
    for each in outer:
        inside = inside[each]
    inside.update({key: value})
    if value is ...:
        del inside[key]
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@torch.no_grad()
def output(model: Any, ours: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, ParakeetForCTC) or (ours and model.config.task == "transcribe"):
        features = torch.randn(1, 90, 16, dtype=torch.float64, generator=generator)
        if ours:
            return [model(features, torch.tensor([90]))[0]]
        logits, blank = model(input_features=features).logits, model.config.pad_token_id
        return [torch.cat([logits[..., :blank], logits[..., blank + 1 :], logits[..., blank : blank + 1]], -1)]
    found = model(torch.randn(1, 3, 96, 160, dtype=torch.float64, generator=generator))
    if ours:
        return [found["logits"], found["boxes"]]
    rows = [1, 3, 4] if isinstance(model, DetrForObjectDetection) else [*range(5)]
    return [found.logits[..., rows], found.pred_boxes]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(
        one.shape == other.shape and bool((one - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1))
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.daily(4)
@pytest.mark.parametrize(("name", "path", "value"), CHANGED + SAME, ids=str)
def test_a_changed_field_is_read_as_in_transformers(name, path, value, models, tmp_path):
    model, folder = models[name]
    edited(folder, tmp_path, path, value)
    again = KINDS[name].from_pretrained(tmp_path, dtype=torch.float64).eval()
    found = output(from_transformers(tmp_path).model.double(), True)
    assert equal(found, output(again, False))
    if path != "pad_token_id":  # ours is the last output, wherever theirs is
        assert equal(found, output(model, False)) == ((name, path, value) in SAME)


@pytest.mark.parametrize(("name", "path", "value", "words"), REFUSED, ids=str)
def test_a_field_that_cannot_be_honoured_is_refused(name, path, value, words, models, tmp_path):
    with pytest.raises(ValueError, match=words) as found:
        from_transformers(edited(models[name][1], tmp_path, path, value))
    assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)


def test_files_of_version_4(models, tmp_path):
    """They describe a trunk of timm by its name and arguments, and say null where they name none."""
    config = json.loads((models["timm"][1] / "config.json").read_text())
    old = {"backbone": "resnet18", "backbone_config": None, "use_timm_backbone": True, "use_pretrained_backbone": False}
    kwargs = {"in_chans": 3, "out_indices": [1, 2, 3, 4]}
    (tmp_path / "model.safetensors").symlink_to(models["timm"][1] / "model.safetensors")
    for more, strides in (({}, [32]), ({"output_stride": 16}, [16])):
        (tmp_path / "config.json").write_text(json.dumps(config | old | {"backbone_kwargs": kwargs | more}))
        found = from_transformers(tmp_path).model
        assert found.strides == strides
        if not more:
            assert equal(output(found.double(), True), output(models["timm"][0], False))
    for more in ({"in_chans": 1}, {"out_indices": [1, 2]}, {"norm_layer": "x"}, {"output_stride": 8}):
        (tmp_path / "config.json").write_text(json.dumps(config | old | {"backbone_kwargs": kwargs | more}))
        with pytest.raises(ValueError, match=f"backbone_kwargs.{[*more][0]}: "):
            from_transformers(tmp_path)
    nulls = {"dilation": None, "backbone": None, "use_timm_backbone": None}
    (tmp_path / "other").mkdir()
    edited(models["detr"][1], tmp_path / "other", "dilation", None)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | nulls))
    found = from_transformers(tmp_path / "other").model.double()
    assert equal(output(found, True), output(models["detr"][0], False))


def test_heads_that_are_not_shared_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = written(rtdetr(), tmp_path, 5)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model.decoder.class_embed"))
    save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="which it must repeat"):
        from_transformers(folder)


FEATURES: list[tuple[dict[str, Any], bool]] = [
    ({"preemphasis": 0.5}, True),
    ({"preemphasis": None}, True),
    ({"hop_length": 200}, True),
    ({"win_length": 320}, True),
    ({"n_fft": 1024}, True),
    ({"padding_value": 1.0}, False),
]


@pytest.mark.parametrize(("change", "matters"), FEATURES, ids=str)
def test_features_of_a_changed_file(change, matters, models, tmp_path):
    edited(models["parakeet"][1], tmp_path, "pad_token_id", 11)
    usual = ParakeetFeatureExtractor(feature_size=16)
    extractor = ParakeetFeatureExtractor(feature_size=16, **change)
    extractor.save_pretrained(tmp_path)
    made: Any = from_transformers(tmp_path).preprocess
    waveform = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    wanted, before = (
        each(waveform.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"][0]
        for each in (extractor, usual)
    )
    features = made(waveform)
    assert (features - wanted[: len(features)]).abs().max() < 1e-3
    changed = wanted.shape != before.shape or bool((wanted - before).abs().max() > 1e-2)
    assert changed == matters
