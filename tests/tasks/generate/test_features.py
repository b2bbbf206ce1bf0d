"""Features of 8-bit images: pixels, what a checkpoint's classifier sees, and a model of timm."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import zoo
from helpers import randomise
from zoo.inputs.images import ImagePreprocess
from zoo.tasks.generate.features import classifier_of, features_of

IMAGES = torch.arange(3 * 8 * 8).view(3, 8, 8, 1).to(torch.uint8)
SMALL: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "image": 16, "patch": 8}


def saved(folder: Path, preset: str = "vit_micro", **more: Any) -> str:
    given = {"preprocess": ImagePreprocess(size=16), "labels": ["ant", "bee", "cat"]} | more
    fields = SMALL | {"classes": 3} | given.pop("fields", {})
    model = randomise(zoo.create_model(preset, **fields))
    return str(zoo.save_model(model, folder, preset=preset, **given))


def test_pixels():
    found = features_of(None)(IMAGES)
    assert found.shape == (3, 64) and torch.equal((found * 255).round().view_as(IMAGES).byte(), IMAGES)


def test_features_are_what_the_classifier_sees(tmp_path):
    name = saved(tmp_path / "model")
    features, logits = features_of(name), classifier_of(name)
    assert features.names is None and logits.names == ("ant", "bee", "cat")
    head: Any = zoo.load_model(name).head
    found = features(IMAGES)
    assert found.shape == (3, 32)
    assert torch.allclose(head(found), logits(IMAGES), atol=1e-5)
    checkpoint: Any = zoo.load_checkpoint(name)
    for image, each in zip(IMAGES, logits(IMAGES), strict=True):  # grey, enlarged, and with this model's own statistics
        assert torch.allclose(checkpoint.model(checkpoint.preprocess(image.numpy())[None])[0], each, atol=1e-5)


def test_a_backbone_gives_its_features(tmp_path):
    name = saved(tmp_path / "model", fields={"classes": 0}, labels=None)
    assert features_of(name)(IMAGES).shape == (3, 32)
    with pytest.raises(ValueError, match="must be an image classifier"):
        classifier_of(name)


def test_a_model_of_timm(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, pretrained, **more: create(*given, **more))
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda _: CONFIG)
    before = torch.get_rng_state()
    found = features_of("timm:test_resnet")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.preprocess == ImagePreprocess(size=32, crop=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert found(IMAGES).shape[0] == 3 and found.name == "timm:test_resnet"


CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9}


def fail(*_: Any, **__: Any) -> None:
    raise OSError("cannot\nconnect")


def test_refused_models(tmp_path, monkeypatch):
    def refused(read: Any, name: str) -> str:
        with pytest.raises(ValueError) as error:
            read(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    dit = {"image": 8, "channels": 1, "patch": 2, "classes": 3, "dim": 32, "depth": 1, "heads": 2}
    generator = saved(tmp_path / "dit", "dit_micro", fields=dit, preprocess=None)
    for read in (features_of, classifier_of):
        assert "must be an image classifier" in refused(read, generator)
        assert "not found" in refused(read, "nothing")
    assert "must be an image classifier" in refused(features_of, saved(tmp_path / "bare", preprocess=None))
    name = saved(tmp_path / "model")
    fused = zoo.save_model(zoo.fuse(zoo.load_model(name)), tmp_path / "fused", preset="vit_micro")
    assert "give the unfused" in refused(features_of, str(fused))
    assert "timm has no model 'nothing'" in refused(features_of, "timm:nothing")
    monkeypatch.setattr(timm, "create_model", fail)
    assert "timm:resnet18 cannot be loaded: cannot connect" in refused(features_of, "timm:resnet18")


def test_outputs_that_are_not_finite(tmp_path):
    reader = features_of(saved(tmp_path / "model"))
    assert reader.model is not None
    next(reader.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="output of .* is NaN or infinite"):
        reader(IMAGES)
