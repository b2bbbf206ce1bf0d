"""`zoo transcribe predict --maps`: weights of each block over time, their scale, the figure, what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import zoo
from apping import talker, voice
from speech_cases import tiny
from zoo.__main__ import main
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.tokens import Characters
from zoo.tasks.predicting import MAPS
from zoo.tasks.transcribe import maps
from zoo.tasks.transcribe.predict import FILES
from zoo.tasks.transcribe.transcripts import Transcriber

TOKENIZER = Characters(" abcdefghi")
PREPROCESS = AudioPreprocess(mels=20)
FRAME = 0.01  # seconds


def transcriber(model: Any, precision: str = "32") -> Transcriber:
    return Transcriber(model, PREPROCESS, TOKENIZER, None, precision)


def saved(folder: Path, model: Any) -> str:
    return str(zoo.save_model(model, folder, preprocess=PREPROCESS, labels=TOKENIZER))


def entry_of(path: Path, seconds: float, words: list[tuple[str, float, float]] | None) -> dict[str, Any]:
    listed = words and [{"text": text, "start": start, "end": end, "probability": 0.9} for text, start, end in words]
    return {"path": voice(path, seconds), "text": "", "seconds": seconds, "words": listed}


# The weights

LAYERS = {
    "relative": ("conformer_ctc_s", {"mixer": "relative"}, (4, 4, 4, 4)),
    "window": ("conformer_ctc_s", {"mixer": "relative(window=3)"}, (4, 4, 4, 4)),
    "softmax": ("conformer_ctc_s", {"mixer": ("softmax", "sla"), "position": "rope"}, (4, None, 4, None)),
    "local": ("fastconformer_s", {"mixer": "local(window=2)"}, (8, 8, 8, 8)),
    "unet": ("squeezeformer_xs", {}, (4, 8, 8, 4)),
    "grouped": (
        "conformer_ctc_s",
        {"mixer": ("grouped(size=3)", "relative"), "widths": (32, 48), "strided": (2,)},
        (12, 12, 12, 8),  # the third block attends before it halves the rate
    ),
    "streaming": (
        "conformer_ctc_s",
        {"chunk": 4, "left": 8, "subsampling": "conv4(padding='causal')"},
        (4, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_each_block_and_the_frames_of_a_row(name: str):
    preset, choices, frames = LAYERS[name]
    model, features = tiny(preset, **choices), torch.randn(97, 20)
    found = maps.heard(transcriber(model), features)
    wanted = [*zoo.maps(model, features[None]).values()]
    steps = {index: number for index, number in enumerate(frames) if number}
    assert [each.block for each in found] == [*steps]
    for each, weights in zip(found, wanted, strict=True):
        assert each.step == pytest.approx(steps[each.block] * FRAME)
        assert torch.equal(each.weights, weights[0].mean(0))
        assert len(each.weights) == len(weights[0, 0])
        rows = -(-97 // steps[each.block])
        assert abs(len(each.weights) - rows) <= 1  # the rows cover the sound


def test_weights_in_bf16_are_near():
    model, features = tiny("conformer_ctc_s"), torch.randn(97, 20)
    exact, near = (maps.heard(transcriber(model, precision), features) for precision in ("32", "bf16"))
    apart = max(float((one.weights - two.weights).abs().max()) for one, two in zip(exact, near, strict=True))
    assert 0 < apart < 0.05 and near[0].weights.dtype == torch.float32


# The figure


def test_the_figure_has_the_weights_over_seconds(tmp_path: Path):
    """Attention to two tokens on either side is a band along the diagonal, in seconds."""
    entry = entry_of(tmp_path / "a.wav", 1.2, [("ab", 0.2, 0.5), ("$c_d$", 0.6, 1.9)])
    unheard = entry_of(tmp_path / "b.wav", 0.7, None)
    broken = {"path": "c", "error": "broken"}
    transcribe = transcriber(tiny("conformer_ctc_s", mixer=("local(window=2)", "sla")))
    figure = maps.draw([broken, entry, unheard], transcribe)
    assert len(figure.axes) == 4  # two of the four blocks, twice
    for axes, seconds in zip(figure.axes, (1.2, 1.2, 0.7, 0.7), strict=True):
        (drawn,) = axes.images
        shown = np.asarray(drawn.get_array())
        left, right, bottom, top = drawn.get_extent()
        assert (left, top) == (0, 0) and right == bottom == pytest.approx(0.04 * len(shown))
        assert 0 <= right - seconds < 0.06 and axes.get_xlim() == (0, seconds) and axes.get_ylim() == (seconds, 0)
        rows, columns = shown.nonzero()
        assert np.abs(rows - columns).max() == 2
    first, second, last = figure.axes[0], figure.axes[1], figure.axes[2]
    assert [first.texts[0].get_text(), second.texts[0].get_text()] == ["block 0", "block 2"]
    wanted = maps.heard(transcribe, PREPROCESS(entry["path"]))
    for axes, layer in zip((first, second), wanted, strict=True):
        assert np.allclose(np.asarray(axes.images[0].get_array()), layer.weights, atol=1e-6)
    assert [text.get_text() for text in first.texts[2:]] == ["ab", "$c_d$"] and len(last.texts) == 2
    across = [np.asarray(line.get_xdata()).tolist() for line in first.lines[::2]]
    down = [np.asarray(line.get_ydata()).tolist() for line in first.lines[1::2]]
    assert across == down == [[0.2, 0.5], [0.6, 1.2]] and not last.lines
    said = [text.get_text() for text in figure.texts]
    assert said == ["a.wav", "1.2 s", "b.wav", "0.7 s", f"{maps.ABOUT}; 2 of 4 blocks have attention weights"]


def test_words_do_not_cover_each_other_and_many_blocks_take_more_rows(tmp_path: Path):
    said = [("word", 0.02 * index, 0.02 * index + 0.01) for index in range(60)] + [("late", 11.0, 12.0)]
    entry = entry_of(tmp_path / "a.wav", 12.0, said)
    figure = maps.draw([entry], transcriber(tiny("conformer_ctc_s", depth=11)))
    figure.draw_without_rendering()
    assert len(figure.axes) == 11 and len({round(axes.get_position().y0, 3) for axes in figure.axes}) == 2
    words = figure.axes[0].texts[2:]
    boxes = [text.get_window_extent() for text in words]
    assert 1 < len(words) < 60 and not any(one.overlaps(two) for one, two in zip(boxes, boxes[1:], strict=False))
    assert max(box.y1 for box in boxes) < figure.texts[0].get_window_extent().y0
    assert len(figure.axes[6].texts) == 2 and len(figure.axes[6].lines) == 2 * 60
    assert figure.axes[0].get_xlim() == (0, 10) and figure.texts[1].get_text() == "the first 10 s of 12.0 s"


def test_only_the_first_files_are_drawn(tmp_path: Path):
    entries = [entry_of(tmp_path / f"{index}.wav", 0.5, []) for index in range(maps.MOST + 1)]
    figure = maps.draw(entries, transcriber(tiny("conformer_ctc_s", depth=1)))
    assert len(figure.axes) == maps.MOST
    assert figure.texts[-1].get_text() == f"{maps.ABOUT}; the first 4 of 5 files"


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("sounds").mkdir()
    voice(Path("sounds/a.wav"), 1.0)
    soundfile.write("sounds/b.wav", np.zeros(16000), 16000)
    return tmp_path


def test_predict_writes_the_maps(place: Path, capsys: pytest.CaptureFixture[str]):
    name = talker(place)
    capsys.readouterr()
    main(["transcribe", "predict", name, "sounds", "--output", "plain"])
    assert sorted(os.listdir("plain")) == sorted(FILES)
    capsys.readouterr()
    main(["transcribe", "predict", name, "sounds", "--maps"])
    wrote = "wrote transcripts.json, transcripts.csv, transcripts.png, maps.png to runs/predict"
    assert capsys.readouterr().err.splitlines()[-1] == f"zoo: 2 of 2 files done; {wrote}"
    with Image.open(f"runs/predict/{MAPS}") as picture:
        assert picture.format == "PNG" and picture.size[0] == 1320
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    for file in FILES[:2]:
        assert Path("runs/predict", file).read_text() == Path("plain", file).read_text()


def test_a_model_without_weights_is_refused_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]):
    name = saved(place / "linear", tiny("conformer_ctc_s", mixer="sla", position="rope", depth=1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["transcribe", "predict", name, "sounds", "--maps"])
    assert exit.value.code == f"zoo: error: --maps: cannot draw maps of {name}; its layers have no attention weights"
    assert not Path("runs").exists() and capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conformer_micro.an4", "squeezeformer_micro.spoken_digits"])
def test_maps_of_a_checkpoint(name: str, place: Path):
    checkpoint = str(Path(zoo.__file__).parents[1] / "checkpoints" / name)
    main(["transcribe", "predict", checkpoint, "sounds/a.wav", "--maps"])
    assert sorted(os.listdir("runs/predict")) == sorted([*FILES, MAPS])
