"""ViT, DeiT and DINOv2 of transformers: equal outputs at every size, and configs that nothing is ignored of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.convert import from_transformers
from zoo.models.vit import ViT

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
MLP = {"intermediate_size": 40}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "a: crane"}, "label2id": {"cat": 0, "dog": 1, "a: crane": 2}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", MLP | NAMES),
    "vit, no head": ("ViTModel", MLP),
    "vit, other choices": (
        "ViTForImageClassification",
        MLP | NAMES | {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "layer_norm_eps": 0.01, "num_channels": 1},
    ),
    "deit": ("DeiTForImageClassification", MLP | NAMES),
    "deit, two heads": ("DeiTForImageClassificationWithTeacher", MLP | NAMES),
    "deit, no head": ("DeiTModel", MLP),
    "dinov2": ("Dinov2ForImageClassification", NAMES | {"mlp_ratio": 2}),
    "dinov2, no head": ("Dinov2Model", {"hidden_act": "quick_gelu"}),
    "dinov2, swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersForImageClassification", NAMES | {"num_register_tokens": 3}),
    "registers, no head": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
}
SIZES = [(16, 16), (8, 8), (28, 28), (12, 24), (8, 32)]


def published(name: str, **choices: Any) -> Any:
    """A small model of transformers in fp64 whose every parameter is random."""
    kind, options = MODELS[name]
    model = getattr(transformers, kind)
    torch.manual_seed(0)
    made = model(model.config_class(**(SMALL | options | choices))).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def written(model: Any, folder: Path, version: int = 4) -> str:
    model.save_pretrained(folder, save_original_format=version == 4)
    return str(folder)


def images(sides: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(model: Any, x: Tensor) -> Tensor:
    resized = {} if "dinov2" in model.config.model_type else {"interpolate_pos_encoding": True}
    found = model(x, **resized)
    return found.logits if "logits" in found else found.last_hidden_state[:, 0]


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest wanted value."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def one_line(found: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_at_any_size_what_it_gives_in_transformers(name: str, version: int, tmp_path: Path):
    model = published(name)
    found: Any = from_transformers(written(model, tmp_path, version))
    assert isinstance(found.model, ViT) and not found.model.training
    for sides in SIZES:
        x = images(sides, found.model.config.channels)
        assert error(found.model(x), theirs(model, x)) < 1e-5, sides
    assert found.preprocess is None
    assert found.labels == (("cat", "dog", "a: crane") if "id2label" in MODELS[name][1] else None)
    assert error(zoo.fuse(found.model)(x), found.model(x)) < 1e-9


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with fields of its config.json changed; ... removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


# Changes of a config that transformers can read, too.
CHANGED = [
    ("vit", {"hidden_act": "relu"}),
    ("vit", {"hidden_act": "gelu_new"}),
    ("vit", {"hidden_act": "quick_gelu"}),
    ("vit", {"hidden_act": "swish"}),
    ("vit", {"layer_norm_eps": 0.1}),
    ("vit", {"num_attention_heads": 4}),
    ("dinov2", {"hidden_act": "relu"}),
    ("dinov2", {"layer_norm_eps": 0.1}),
    ("registers", {"num_attention_heads": 2}),
]
# Changes that are as before.
SAME = [
    ("vit", {"image_size": [16, 16], "patch_size": [4, 4]}),
    ("vit", {"hidden_act": ...}),
    ("vit", {"qkv_bias": ...}),
    ("vit", {"layer_norm_eps": ...}),
    ("vit", {"head_dim": 8}),
    ("vit", {"pooler_act": "relu", "encoder_stride": 3, "hidden_dropout_prob": 0.3, "initializer_range": 1.0}),
    ("vit", {"architectures": None}),
    ("dinov2", {"layerscale_value": 0.1, "drop_path_rate": 0.2, "apply_layernorm": False, "use_mask_token": True}),
    ("dinov2", {"out_features": None, "out_indices": None}),
    ("dinov2, swiglu", {"hidden_act": "relu"}),
    ("registers", {"num_register_tokens": 3}),
]


@pytest.mark.parametrize(("name", "change"), CHANGED + SAME, ids=str)
def test_a_changed_config_is_read_as_in_transformers(name: str, change: dict[str, Any], tmp_path: Path):
    model = published(name)
    folder = edited(Path(written(model, tmp_path)), **change)
    again = type(model).from_pretrained(folder, torch_dtype=torch.float64).eval()
    found: Any = from_transformers(folder)
    x = images((16, 16))
    assert error(found.model(x), theirs(again, x)) < 1e-5
    changed = error(found.model(x), theirs(model, x)) > 1e-5
    assert changed == ((name, change) in CHANGED)


REFUSED = [
    ("vit", {"hidden_act": "mish"}, "hidden_act: the zoo supports 'gelu' or .*, not 'mish'"),
    ("vit", {"hidden_act": None}, "hidden_act: .* not null"),
    ("vit", {"layer_norm_eps": None}, "layer_norm_eps: it must be a number, got null"),
    ("vit", {"layer_norm_eps": -1.0}, "config.json: norm: .*eps of 'layernorm' must be finite and >= 0"),
    ("vit", {"qkv_bias": False}, "'layers.0.attention.._proj.bias' is not used"),
    ("vit", {"qkv_bias": None}, "qkv_bias: it must be true or false, got null"),
    ("vit", {"patch_size": 2}, "'embeddings.position_embeddings' has shape|'embeddings.patch_emb.* has shape"),
    ("vit", {"patch_size": 5}, "image_size: it must be a multiple of the patch_size 5, got 16"),
    ("vit", {"patch_size": [4, 2]}, r"patch_size: the zoo supports squares, not \[4, 2\]"),
    ("vit", {"image_size": [16, 32]}, r"image_size: the zoo supports squares, not \[16, 32\]"),
    ("vit", {"image_size": 32}, "'embeddings.position_embeddings' has shape"),
    ("vit", {"num_hidden_layers": 1}, "'layers.1.* is not used"),
    ("vit", {"num_hidden_layers": 3}, "'layers.2.* is missing"),
    ("vit", {"hidden_size": 48}, "has shape"),
    ("vit", {"hidden_size": "24"}, "hidden_size: it must be an integer, got '24'"),
    ("vit", {"intermediate_size": 44}, "'layers.0.mlp.fc1.weight' has shape"),
    ("vit", {"num_channels": 1}, "projection.weight' has shape"),
    ("vit", {"num_attention_heads": 5}, "q_proj.weight' has shape"),
    ("vit", {"head_dim": 4}, "q_proj.weight' has shape"),
    ("vit", {"id2label": {"0": "cat", "2": "dog"}}, "id2label: its ids must be 0 to 1"),
    ("vit", {"id2label": ["cat"]}, "id2label: it must be an object"),
    ("vit", {"id2label": None}, r"'classifier.weight' has shape \[3, 24\], but this model needs \[2, 24\]"),
    ("vit", {"num_register_tokens": 2}, "num_register_tokens: the zoo does not know this key"),
    ("vit, no head", {"architectures": ["ViTForImageClassification"]}, "'classifier.weight' is missing"),
    ("vit", {"model_type": "deit"}, "'embeddings.distillation_token' is missing"),
    ("vit", {"model_type": "vit_msn"}, "model_type: the zoo supports .*vit.*, not 'vit_msn'"),
    ("deit", {"model_type": "vit"}, "'embeddings.position_embeddings' has shape"),
    ("dinov2", {"use_swiglu_ffn": True}, "mlp.gate_proj.weight' is missing"),
    ("dinov2", {"mlp_ratio": 4}, "'layers.0.mlp.fc1.weight' has shape"),
    ("dinov2", {"mlp_ratio": 1e300}, "mlp_ratio: it must be > 0 and <= 1000"),
    ("dinov2", {"mlp_ratio": 0.001}, "config.json: ratio must give 1 to|config.json: .*ratio"),
    ("dinov2, swiglu", {"use_swiglu_ffn": False}, "mlp.fc1.weight' is missing"),
    ("registers", {"num_register_tokens": 2}, "'embeddings.register_tokens' has shape"),
    ("registers", {"num_register_tokens": -1}, "registers >= 0"),
    ("registers", {"model_type": "dinov2"}, "num_register_tokens: the zoo does not know this key"),
    ("registers", {"model_type": "dinov2", "num_register_tokens": ...}, "register_tokens' is not used"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=str)
def test_a_config_that_does_not_fit_is_refused(name: str, change: dict[str, Any], words: str, tmp_path: Path):
    folder = edited(Path(written(published(name), tmp_path)), **change)
    with pytest.raises(ValueError, match=words) as found:
        from_transformers(folder)
    assert str(tmp_path) in one_line(found)


def test_files_of_other_heads_and_pickles_are_refused(tmp_path: Path):
    masked = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, **MLP, encoder_stride=4))
    with pytest.raises(ValueError, match="'decoder.0.bias' is not used by this model"):
        from_transformers(written(masked, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read, never a pickle"):
        from_transformers(tmp_path)
    tensors["vit.layernorm.bias"][0] = float("nan")
    save_file({key: value for key, value in tensors.items() if "decoder" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'layernorm.bias' is NaN or infinite"):
        from_transformers(tmp_path)


def test_a_converted_model_is_saved_and_answers_as_in_transformers(tmp_path: Path):
    model = published("dinov2").float()
    processor = transformers.BitImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "theirs")
    found: Any = from_transformers(written(model, tmp_path / "theirs"))
    zoo.save_model(found.model, str(tmp_path / "ours"), preprocess=found.preprocess, labels=found.labels)
    again = zoo.load_checkpoint(str(tmp_path / "ours"))
    assert again.preprocess == found.preprocess and again.labels == found.labels
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    wanted = theirs(model, processor(image, return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    best: Any = again(str(tmp_path / "image.png"))
    got = torch.tensor([dict(best)[label] for label in found.labels])
    assert error(got, wanted) < 1e-4
