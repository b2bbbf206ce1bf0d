"""Every checkpoint has a picture that was made for its weights, and README.md shows it."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo
from helpers import randomise
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.tokens import Characters
from zoo.weights import save_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.parent.name for path in ROOT.glob("checkpoints/*/config.json"))


@pytest.fixture(scope="module")
def made(scripted: Callable[[str], ModuleType]) -> Any:
    return scripted("generate.gallery"), scripted("generate.checkpoints")


@pytest.fixture(scope="module")
def known(made: Any) -> dict[str, dict[str, Any]]:
    return made[1].configs(ROOT)


def test_every_picture_was_made_for_its_checkpoint(made: Any):
    assert made[0].stale(ROOT) == [], "run scripts/tables"
    for name in NAMES:
        path = ROOT / "checkpoints" / name / "gallery.png"
        assert path.stat().st_size <= 60_000
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == (300, 200)
            assert len({*np.asarray(image.convert("L")).ravel()}) > 3, "something is drawn"


def test_the_pages_are_current(made: Any):
    gallery, checkpoints = made
    assert (ROOT / "README.md").read_text() == gallery.readme(ROOT), "run scripts/tables"
    page = (ROOT / "checkpoints/README.md").read_text()
    assert page == checkpoints.page(ROOT, gallery.pictures(ROOT)), "run scripts/tables"
    for name in NAMES:
        assert f"]({name}/gallery.png)" in page
        cell = re.search(rf"\[!\[{name}\]\((\S+?)\)\]\((\S+?)\)<br>(\S+?)\|", gallery.section(ROOT))
        assert cell is not None and (ROOT / cell[1]).is_file() and (ROOT / cell[2]).is_file()
        assert re.search(r"&nbsp;\d\.\d{4}<br>\d+\.\d&nbsp;MB$", cell[3])


def test_other_weights_or_figures_make_a_picture_stale(made: Any, known: dict[str, Any], tmp_path: Path):
    gallery, _ = made
    for name, config in known.items():
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        changed = json.loads(json.dumps(config))
        if name == NAMES[0]:
            changed["files"]["model.safetensors"]["sha256"] = "0" * 64
        elif name == NAMES[1]:
            changed["figures"][0]["value"] += 0.01
        (folder / "config.json").write_text(json.dumps(changed))
        if name != NAMES[2]:
            (folder / "gallery.png").write_bytes((ROOT / "checkpoints" / name / "gallery.png").read_bytes())
    assert [path.parent.name for path in gallery.stale(tmp_path)] == NAMES[:3]


@pytest.mark.parametrize("name", ["vit_micro.digits", "rtdetr_micro.blood_cells"])
def test_a_picture_is_what_the_code_draws(name: str, made: Any, known: dict[str, Any]):
    with Image.open(io.BytesIO(made[0].picture(known, name))) as new:
        assert made[0].notes(ROOT / "checkpoints" / name / "gallery.png") == dict(new.info)
        pixels = np.asarray(new.convert("RGB"), dtype=float)
    with Image.open(ROOT / "checkpoints" / name / "gallery.png") as old:
        assert np.abs(pixels - np.asarray(old.convert("RGB"))).mean() < 2


def test_a_classifier_without_free_images_reads_what_a_generator_drew(made: Any, known: dict[str, Any]):
    names = ("dit_micro.digits_in_one_step", "vit_micro.digits")
    configs = json.loads(json.dumps({name: known[name] for name in names}))
    configs[names[1]]["figures"][0]["data"] = "other_digits"
    with Image.open(io.BytesIO(made[0].picture(configs, names[1]))) as image:
        assert image.info["Description"] == "Answers on generated images"


def test_a_recogniser_of_sentences(
    made: Any, scripted: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its picture has one sound, with the words that were heard in the places where they were."""
    voices = scripted("synthesis.voices")
    said: list[str] = []

    def say(self: Any, text: str) -> np.ndarray:
        said.append(text)
        return (0.1 * np.sin(np.arange(32000) * 0.2)).astype("float32")

    monkeypatch.setattr(voices.Voice, "say", say)
    small: Any = {"vocabulary": 28, "depth": 1, "dim": 16, "heads": 2, "mels": 80}
    model: Any = randomise(zoo.create_model("conformer_s", **small), 1)
    labels = Characters([*" abcdefghijklmnopqrstuvwxyz"])
    figure: Any = {"data": "an4", "split": "test", "metric": "word error rate", "value": 0.5, "n": 9}
    figure |= {"interval": None, "command": ""}
    name = str(save_model(model, tmp_path / "heard", preprocess=AudioPreprocess(), labels=labels, figures=[figure]))
    config = json.loads(Path(name, "config.json").read_text())
    with Image.open(io.BytesIO(made[0].picture({name: config}, name))) as image:
        assert image.info["Description"] == "Spectrograms of synthetic speech, and what was heard"
        colours = np.asarray(image.convert("RGB"), dtype=int)
    assert said == [made[0].SENTENCE]
    assert (np.ptp(colours, -1) > 60).mean() > 0.2, "the spectrogram is coloured"


def test_what_has_no_picture_shows_its_figures(made: Any, known: dict[str, Any]):
    """A classifier of classes that no generator draws."""
    config = json.loads(json.dumps(known["vit_micro.digits"])) | {"labels": ["boot", "bag"]}
    config["figures"][0]["data"] = "fashion_mnist"
    with Image.open(io.BytesIO(made[0].picture({"vit.fashion": config}, "vit.fashion"))) as image:
        assert image.info["Description"] == "Bars of the figures with their 95 % intervals"


def test_a_readme_without_a_place_for_the_gallery(made: Any, tmp_path: Path):
    (tmp_path / "README.md").write_text("# zoo\n\n<!--gallery-->\n")
    with pytest.raises(ValueError, match="^README.md has no "):
        made[0].readme(tmp_path)
