"""A trained model changed for a new task, and the report of what was taken from it."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import zoo
from helpers import randomise, rehash
from zoo.inputs.images import ImagePreprocess
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Characters
from zoo.weights import load_checkpoint, load_model, save_model

NAMES = ("ant", "bee", "cat")
SIZES: dict[str, dict[str, Any]] = {
    "vit_micro": {"dim": 16, "depth": 2, "heads": 2, "image": 16, "patch": 8, "classes": 3},
    "davit_tiny": {"dim": (16, 32), "depth": (1, 1), "heads": (2, 4), "image": 32, "classes": 3}
    | {"mixer": ("window(size=2)", "channel")},
    "caformer_s18": {"dim": (16, 32), "depth": (1, 1), "heads": (2, 4), "image": 32, "classes": 3}
    | {"mixer": ("sepconv", "softmax"), "placement": "pre"},
    "conformer_ctc_s": {"dim": 16, "depth": 1, "heads": 2, "mels": 16, "vocabulary": 4},
    "rtdetr_micro": {"queries": 10, "classes": 3, "image": 64},
    "dit_micro": {"dim": 16, "depth": 2, "heads": 2, "classes": 3},
    "dico_micro": {"dim": (16, 32, 16), "depth": (1, 1, 1), "heads": (2, 2, 2), "classes": 3},
}


def kept(folder: Path, name: str, labels: Any = NAMES, preprocess: Any = None, **more: Any) -> Path:
    """A checkpoint of a small model."""
    model = randomise(zoo.create_model(name, **SIZES[name] | more)).eval()
    if name.startswith("conformer"):
        labels = Characters("abc")
    elif name.startswith("rtdetr"):
        labels = LabelMap(NAMES, (1, 2, 3))
    return save_model(model, folder / name, preset=name, labels=labels, preprocess=preprocess)


@pytest.mark.parametrize("name", ["vit_micro", "caformer_s18", "conformer_ctc_s", "rtdetr_micro", "dit_micro"])
def test_a_number_of_classes_makes_a_new_head(name, tmp_path):
    start = kept(tmp_path, name)
    config: Any = load_model(start).config
    model: Any = load_model(start, classes=5)
    assert getattr(model.config, config.counted) == 5 and model.labels is None
    source, state = load_model(start).state_dict(), model.state_dict()
    assert model.loaded.new and not model.loaded.resized
    assert all(key.startswith(model.replaceable) for key in model.loaded.new)
    assert all(torch.equal(state[key], source[key]) for key in model.loaded.taken)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    same: Any = load_model(start, classes=config.labelled)
    assert same.loaded.taken == (*source,) and same.labels is not None, "the same number changes nothing"


def test_kept_classes_keep_their_logits_bit_for_bit(tmp_path):
    start, images = kept(tmp_path, "vit_micro"), torch.randn(2, 3, 16, 24)
    before, after = load_model(start)(images), load_model(start, classes=["cat", "dog", "bee"])(images)
    assert torch.equal(after[:, [0, 2]], before[:, [2, 1]])
    assert load_checkpoint(start, classes=["cat", "dog", "bee"]).labels == ("cat", "dog", "bee")


def test_grey_images_give_what_three_channels_of_the_same_grey_gave(tmp_path):
    grey = torch.randn(2, 1, 32, 40, dtype=torch.float64)
    for name in ("vit_micro", "davit_tiny", "rtdetr_micro"):
        start = kept(tmp_path, name, preprocess=ImagePreprocess(size=32) if name != "rtdetr_micro" else None)
        three: Any = load_model(start, dtype=torch.float64)
        for channels in (1, 2, 4, 6) if name != "rtdetr_micro" else (6,):  # it magnifies the rounding of weights
            model: Any = load_model(start, channels=channels, dtype=torch.float64)
            found, wanted = (each(grey.expand(-1, n, -1, -1)) for each, n in ((model, channels), (three, 3)))
            found, wanted = (each["logits"] if isinstance(each, dict) else each for each in (found, wanted))
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (name, channels)
            assert len(model.loaded.resized) == 1 and not model.loaded.new
            if channels == 1 and name != "rtdetr_micro":
                assert model.preprocess.mean == pytest.approx([sum(ImagePreprocess.mean) / 3])
            else:
                assert model.preprocess is None, "files have one or three channels"
    one = kept(tmp_path / "one", "vit_micro", channels=1)
    single, triple = load_model(one, dtype=grey.dtype), load_model(one, channels=3, dtype=grey.dtype)
    assert torch.allclose(triple(grey.expand(-1, 3, -1, -1)), single(grey), atol=1e-5)


def test_other_fields_change_only_if_they_are_named(tmp_path):
    start = kept(tmp_path, "vit_micro")
    for changes, words in (
        ({"mixer": "sla"}, "has mixer 'softmax', not 'sla'; to allow it, list it in fresh, as in fresh=\\['mixer'\\]"),
        ({"ffn": "mlp(activation='relu')"}, "has ffn 'mlp', not 'mlp\\(activation='relu'\\)'"),
        ({"dim": 32}, "has dim '16', not '32'"),
        ({"mixr": "sla"}, "'mixr'; did you mean mixer"),
        ({"fresh": ["mixr"]}, "'mixr'; did you mean mixer"),
        ({"classes": ["a", "a"]}, "labels: 'a' appears twice"),
        ({"classes": 0.5}, "classes must be a number, a list of names or a LabelMap, got float"),
        ({"classes": "cat"}, "classes must be a number, a list of names or a LabelMap, got str"),
        ({"fresh": [1]}, "fresh must be a list of names of fields"),
        ({"dtype": torch.int32}, "device None and dtype torch.int32 are not possible"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(start, **changes)
    model: Any = load_model(start, mixer="sla", fresh="mixer", drop_path=0.2)
    assert model.config.mixer == "sla" and model.config.drop_path == 0.2
    assert all(".steps.0.branch." in key for key in model.loaded.new) and model.loaded.new
    assert "; new: blocks.0.steps.0.branch." in str(model.loaded)
    none = save_model(zoo.create_model("vit_micro", **SIZES["vit_micro"]), tmp_path / "none")
    with pytest.raises(ValueError, match="has no labels, so none can be matched; give the number of classes"):
        load_model(none, classes=NAMES)
    fused = save_model(zoo.fuse(load_model(start)), tmp_path / "fused")
    with pytest.raises(ValueError, match="is fused, so its config cannot change"):
        load_model(fused, classes=9)


def test_a_changed_model_says_what_it_was_made_from(tmp_path):
    figure: Any = {"data": "x", "split": "val", "metric": "accuracy", "value": 0.5, "n": 8, "interval": None}
    model = load_model(kept(tmp_path, "vit_micro"))
    model.preprocess = ImagePreprocess(size=16)
    start = save_model(model, tmp_path / "y", figures=[figure | {"command": ""}], license="mit", datasets=["x"])
    again = load_checkpoint(save_model(load_model(start, classes=["ant", "fox"]), tmp_path / "z"))
    assert again.config["base"] == {"address": "y", "commit": None, "layout": "zoo"}
    assert "Made from y." in (tmp_path / "z" / "README.md").read_text()
    assert load_model(start, drop_path=0.2).about["figures"], "it computes the same"
    assert "figures" not in load_model(start, channels=1).about and "figures" not in load_model(start, image=32).about
    assert again.config["figures"] == [] and again.config["license"] == "mit" and again.labels == ("ant", "fox")


def test_dtype_device_and_the_families_own_names(tmp_path):
    start = kept(tmp_path, "vit_micro")
    model: Any = load_model(start, dtype=torch.bfloat16, device="cpu")
    assert model.head.weight.dtype == torch.bfloat16
    kind: Any = type(model)
    assert torch.equal(kind.from_pretrained(start).head.weight, load_model(start).head.weight)
    with pytest.raises(ValueError, match="holds a ViT, not a Pyramid; use zoo.load_model"):
        type(zoo.create_model("davit_tiny", **SIZES["davit_tiny"])).from_pretrained(start)
    kind.from_pretrained(start).save_pretrained(tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved", check=True).labels == NAMES


def test_a_pretrained_model_by_preset_and_name():
    one: Any = zoo.create_model("vit_micro", pretrained="digits", classes=37)
    assert one.config.classes == 37 and one.loaded.new == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match="'vit_micro.digit' not found"):
        zoo.create_model("vit_micro", pretrained="digit")


def test_names_that_say_where(tmp_path, monkeypatch):
    (tmp_path / "vit_micro.digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        load_model("vit_micro.digits")
    assert isinstance(load_model("zoo:vit_micro.digits", check=True), torch.nn.Module)
    for name, words in (
        ("zoo:vit_micro.digit", "unknown checkpoint of the zoo 'vit_micro.digit'; did you mean vit_micro.digits"),
        ("hf:digits", "'digits' must be OWNER/NAME or OWNER/NAME@REVISION on the Hub"),
        ("nemo:nothing.nemo", "nemo:nothing.nemo: "),
        ("timm:nothing", "timm:nothing: unknown model of timm 'nothing'"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_model(name)
        assert "\n" not in str(error.value)


def test_weights_that_are_nan_are_refused(tmp_path):
    start = kept(tmp_path, "vit_micro")
    tensors = safetensors.torch.load_file(start / "model.safetensors")
    tensors["head.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(tensors, start / "model.safetensors")
    rehash(start)
    with pytest.raises(ValueError, match="model.safetensors: 'head.weight' is NaN or infinite"):
        load_model(start)
