"""`zoo classify predict --maps`: the map of a model that attends to one patch, the figure, what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from helpers import randomise
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess
from zoo.tasks import maps as shared
from zoo.tasks.classify import answers, maps
from zoo.tasks.classify.predict import FILES
from zoo.tasks.predicting import MAPS
from zoo.weights import Checkpoint

LABELS = ["dark", "light"]
DIM, PATCH, SIDES = 16, 8, (20, 36)  # a grid of 3 x 5, whose last row and column reach beyond the image
PREPROCESS = ImagePreprocess(size=SIDES, crop=1.0, fit="squash")
AT = (1, 3)  # the place of the light patch


@torch.no_grad()
def gazing(**choices: Any) -> Any:
    """A vision transformer whose tokens all attend to the one light patch of a dark image, in every block."""
    given = {"dim": DIM, "depth": 2, "heads": 2, "patch": PATCH, "image": 32, "classes": 2, "position": "none"}
    model: Any = zoo.create_model("vit_micro", **given | choices).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("head") and "norm" not in name and "before" not in name:
            parameter.zero_()
    model.stem.conv.weight[0] = 1.0  # the first channel is the light of a patch, the others are zero
    for block in model.blocks:
        layer = block.steps[0].branch
        layer.qkv.bias[:DIM] = 5.0  # every query asks for
        layer.qkv.weight[DIM : 2 * DIM, 0] = 1.0  # light
    return model


def dark(place: tuple[int, int] = AT, sides: tuple[int, int] = SIDES) -> Image.Image:
    """A dark image whose patch at this place of the grid is light."""
    pixels = np.zeros((*sides, 3), np.uint8)
    row, column = (PATCH * index for index in place)
    pixels[row : row + PATCH, column : column + PATCH] = 255
    return Image.fromarray(pixels)


def classifier(model: Any, preprocess: ImagePreprocess = PREPROCESS, precision: str = "32") -> answers.Classifier:
    return answers.classifier(Checkpoint(model, preprocess, LABELS, {}), 2, precision)  # pyright: ignore


def saved(folder: Path, model: Any) -> str:
    return str(zoo.save_model(model, folder, preset="vit_micro", preprocess=PREPROCESS, labels=LABELS))


def red(picture: Any) -> Tensor:
    """How red each pixel is."""
    pixels = torch.tensor(np.asarray(picture)).float()
    return pixels[..., 0] - pixels[..., 1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    dark().save("images/a.png")
    dark((2, 4)).save("images/b.png")
    return tmp_path


# The map


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_the_map_of_a_model_that_attends_to_one_patch(read: int, precision: str):
    """A block keeps half of what a token is and takes half from the light patch: of the grid's tokens a quarter is
    left after two, a class token has no place of its own in the map."""
    pool: dict[str, Any] = {"pool": ("mean", "token", "distilled")[read], "class_token": read > 0, "registers": read}
    model = gazing(**pool)
    found = maps.attended(classifier(model, precision=precision), PREPROCESS(dark()))
    grid, left = (3, 5), 0.0 if read else 0.25
    wanted = torch.full(grid, left)
    wanted[AT] = left + (1 - left) * 15
    assert model.config.tokens_read == read and found.covered == (24, 40)
    assert (found.values - wanted).abs().max() < 1e-5


def test_rows_of_tokens_that_the_head_does_not_read_do_not_matter():
    """A class token that no pool reads, and what it attends to, are left out."""
    model = gazing(class_token=True)
    one = maps.attended(classifier(model), PREPROCESS(dark())).values
    assert model.config.tokens_read == 0 and one[0, 0] == pytest.approx(0.25, abs=1e-5)


def test_blocks_without_weights_are_left_out_and_named():
    found = maps.attended(classifier(gazing(mixer=("softmax", "sla"), depth=12)), PREPROCESS(dark()))
    assert found.values[0, 0] == pytest.approx(0.5**6, abs=1e-5)
    assert "over 6 of 12 blocks (the others have no attention weights): what the grid's tokens" in found.about
    whole = maps.attended(classifier(gazing(class_token=True, pool="token")), PREPROCESS(dark())).about
    assert "over all 2 blocks: what the class token attends to" in whole


def test_mixers_side_by_side_are_one_layer():
    """Their mean, and not their product as if one followed the other."""
    model: Any = randomise(
        zoo.create_model("vit_micro", mixer="blend(of=('softmax', 'power'))", depth=1, dim=48)
    ).eval()
    found = maps.attended(classifier(model), image := torch.randn(3, 32, 32))
    both = [each.mean(1, keepdim=True) for each in zoo.maps(model, image[None]).values()]
    wanted = zoo.rollout([sum(both) / 2])[0].mean(0).view(found.values.shape)
    assert len(both) == 2 and torch.allclose(found.values, wanted / wanted.mean(), atol=1e-5)


@pytest.mark.parametrize(("last", "stage", "grid"), [("softmax", 4, (1, 2)), ("sepconv", 3, (2, 3))])
def test_a_pyramid_shows_its_last_stage_with_weights(last: str, stage: int, grid: tuple[int, int]):
    choices: dict[str, Any] = {"dim": (8, 8, 16, 16), "depth": (1, 1, 2, 1), "heads": (1, 1, 2, 2), "image": 32}
    choices |= {"mixer": ("sepconv", "sepconv", "softmax", last), "classes": 2}
    model: Any = randomise(zoo.create_model("caformer_s18", **choices)).eval()
    image = torch.randn(3, *SIDES)
    found = maps.attended(classifier(model), image)
    weights = [each for name, each in zoo.maps(model, image[None]).items() if f"stages.{stage - 1}" in name]
    wanted = zoo.rollout(weights)[0].mean(0).view(grid)
    assert found.values.shape == grid and found.covered == tuple(2 ** (stage + 1) * side for side in grid)
    assert torch.allclose(found.values, wanted / wanted.mean(), atol=1e-5)
    which = "the only block" if stage == 4 else "all 2 blocks"
    assert f"over {which} of stage {stage} of 4: what the grid's tokens" in found.about


# The figure


@pytest.mark.parametrize("at", [AT, (0, 0), (2, 4)], ids=str)
def test_the_drawn_map_is_reddest_at_the_patch(at: tuple[int, int]):
    found = maps.attended(classifier(gazing()), PREPROCESS(dark(at)))
    image = dark(at)
    drawn = shared.drawn(found.values - found.values.min(), image, found.covered)
    scale = drawn.width // image.width
    assert drawn.size == (scale * image.width, scale * image.height) and max(drawn.size) >= shared.SIDE
    row, column = divmod(int(red(drawn).argmax()), drawn.width)
    assert (row // scale // PATCH, column // scale // PATCH) == at
    assert red(drawn).min() == 0  # grey where the map has its least value; the interpolation does not overshoot to blue


def test_an_image_is_drawn_as_the_model_sees_it():
    fitted = ImagePreprocess(size=(32, 48), crop=1.0, fit="longest", mean=(0.1, 0.4, 1.2))
    part = dark((0, 0), (32, 16))
    whole = shared.seen(fitted, part)
    assert whole.size == (48, 32) and whole.crop((0, 0, 16, 32)).tobytes() == part.tobytes()
    assert whole.getpixel((40, 10)) == (26, 102, 255)
    prepared = fitted(part)
    plain = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    assert (fitted.scaled(plain)[:2] - prepared[:2]).abs().max() < 0.01  # the border is the mean, rounded
    assert shared.seen(PREPROCESS, part).size == SIDES[::-1]


def test_the_figure_has_each_image_beside_its_map(place: Path):
    name = saved(place / "gazing", gazing())
    answer = classifier(zoo.load_model(name))
    entries, shown = answers.predict(["images/a.png", "images/b.png"], answer, 2)
    figure = maps.draw([*entries, {"path": "c", "error": "broken"}], shown, answer)
    assert len(figure.axes) == 2
    for axes, at in zip(figure.axes, (AT, (2, 4)), strict=True):
        pair = np.asarray(axes.images[0].get_array())
        width = (pair.shape[1] - maps.SPACE) // 2
        left, right = pair[:, :width], pair[:, -width:]
        scale = width / SIDES[1]
        assert red(left).abs().max() == 0 and pair.shape[0] == left.shape[0]
        row, column = divmod(int(red(right).argmax()), width)
        assert (int(row / scale) // PATCH, int(column / scale) // PATCH) == at
        light = np.argwhere(left[..., 0] > 200).mean(0) / scale
        assert tuple((light / PATCH).astype(int)) == at
        texts = axes.texts[0].get_text().splitlines()
        assert texts[1] == "0.25 to 11.50 times the mean"
    last = figure.texts[0].get_text().splitlines()
    assert last[-1] == "1 had an error" and last[0].startswith("Attention rollout over all 2 blocks")


def test_predict_writes_the_maps(place: Path, capsys: pytest.CaptureFixture[str]):
    name = saved(place / "gazing", gazing())
    main(["classify", "predict", name, "images", "--output", "plain"])
    assert sorted(os.listdir("plain")) == sorted(FILES)
    capsys.readouterr()
    main(["classify", "predict", name, "images", "--maps", "--output", "images"])
    wrote = "wrote predictions.json, predictions.csv, predictions.png, maps.png to images"
    assert capsys.readouterr().err == f"zoo: 2 of 2 images done; {wrote}\n"
    with Image.open(f"images/{MAPS}") as picture:
        assert picture.format == "PNG" and red(picture.convert("RGB")).max() > 60
    for file in FILES[:2]:
        assert Path("images", file).read_text() == Path("plain", file).read_text()
    main(["classify", "predict", name, "images", "--output", "images"])  # without what it drew before
    assert len(json.loads(Path("images/predictions.json").read_text())) == 2


# What is wrong


def test_a_model_without_weights_is_refused_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]):
    name = saved(place / "linear", zoo.create_model("vit_micro", mixer="sla", depth=1, classes=2))
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", name, "images", "--maps"])
    assert exit.value.code == f"zoo: error: --maps: cannot draw maps of {name}; its layers have no attention weights"
    assert not Path("runs").exists() and capsys.readouterr().out == ""


def test_maps_that_cannot_be_drawn_cost_no_answers(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*given: object) -> None:
        raise RuntimeError("not enough memory")

    name = saved(place / "gazing", gazing())
    monkeypatch.setattr(maps, "attended", full)
    main(["classify", "predict", name, "images", "--maps"])
    assert sorted(os.listdir("runs/predict")) == sorted(FILES)
    assert "zoo: maps.png could not be drawn: not enough memory" in capsys.readouterr().err
