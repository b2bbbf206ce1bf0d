"""Every checkpoint in the repository loads, meets its probe, is in the index, and does what its card says."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

import zoo
from zoo.data.images import Images
from zoo.inputs.audio import AudioPreprocess
from zoo.models import configure
from zoo.models.base import count_parameters
from zoo.outputs.tokens import Tokenizer
from zoo.weights import load_checkpoint

FOLDER = Path(__file__).parents[2] / "checkpoints"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and not path.name.startswith("."))
INDEX = {
    line.split("|")[1].split("]")[0].strip(" ["): line
    for line in (FOLDER / "README.md").read_text().splitlines()
    if "](" in line
}


def test_the_index_lists_what_is_there():
    assert sorted(INDEX) == NAMES and NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_meets_its_probe_and_its_row(name):
    model, preprocess, labels, config = load_checkpoint(FOLDER / name, check=True)
    assert preprocess is not None and labels is not None and config["source"]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in INDEX[name]
    assert "license: unknown" not in (FOLDER / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_code_on_each_card_runs(name, tmp_path, monkeypatch):
    card = (FOLDER / name / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "checkpoints").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("image.jpg")
    soundfile.write("recording.wav", 0.1 * np.sin(np.arange(8000) * 0.2), 8000)
    names = {}
    exec(code, names)
    if "drawn" in names:
        output = names["drawn"]
    else:
        assert names["answer"] or names["answer"] == "" and "an4" in name  # a tone is no word
        output = names["logits"] if "logits" in names else names["found"]["logits"]
    assert torch.isfinite(output).all()


def test_digits_are_read_as_the_card_says():
    model, preprocess, _, _ = load_checkpoint(FOLDER / "vit_micro.digits")
    data = Images(size=preprocess.size, crop=preprocess.crop)
    assert data.preprocess == preprocess
    with torch.inference_mode():
        right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in data.val_dataloader())
    accuracy = f"{right / 360:.4f}"
    assert accuracy in INDEX["vit_micro.digits"] and accuracy in (FOLDER / "vit_micro.digits/README.md").read_text()


def test_spoken_digits_are_the_model_of_their_recipe():
    """The error rate on the card cannot be measured here: the recordings are not in the repository."""
    model, preprocess, tokenizer, config = load_checkpoint(FOLDER / "squeezeformer_micro.spoken_digits")
    assert isinstance(preprocess, AudioPreprocess) and isinstance(tokenizer, Tokenizer) and model.config.stride == 4
    said = tokenizer.decode(list(range(tokenizer.vocabulary - 1))).split()
    assert {"ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"} <= set(said)
    (recipe,) = [word for word in config["source"].split() if word.endswith(".yaml")]
    text = (FOLDER.parent / recipe).read_text()
    assert configure(**yaml.safe_load(text)["model"]["backbone"]) == model.config
    assert re.search(rf"\| {Path(recipe).stem} +\| {count_parameters(model) / 1e6:.2f} M ", text)


def test_blood_cells_are_the_model_of_their_recipe():
    """The precision on the card cannot be measured here: the images are not in the repository."""
    model, preprocess, labels, config = load_checkpoint(FOLDER / "rtdetr_micro.blood_cells")
    assert labels.names == ("RBC", "WBC", "Platelets") and labels.ids == (1, 2, 3)
    (recipe,) = [word for word in config["source"].split() if word.endswith(".yaml")]
    text = (FOLDER.parent / recipe).read_text()
    given = yaml.safe_load(text)
    assert configure(**given["model"]["backbone"], classes=3) == model.config
    assert preprocess.size == given["data"]["size"] and "AP50 0.829 " in text


def test_a_picture_is_kept_and_alone_is_no_checkpoint(tmp_path: Path):
    model = zoo.create_model("vit_micro", classes=3)
    folder = zoo.save_model(model, tmp_path / "model")
    (folder / "gallery.png").write_bytes(b"drawn")
    zoo.save_model(model, folder)
    assert (folder / "gallery.png").read_bytes() == b"drawn" and (folder / "config.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/gallery.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="mine holds gallery.png, so it is not replaced by a checkpoint"):
        zoo.save_model(model, tmp_path / "mine")
    assert (tmp_path / "mine/gallery.png").read_bytes() == b"mine"


def test_a_checkpoint_is_found_by_name(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    assert isinstance(zoo.load_model(NAMES[0]), torch.nn.Module)
