"""What stands behind the widgets of `zoo app`: the answers of `predict`, maps, notes and errors of one line."""

import html
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.datasets import load_digits

import apping
from apping import voice
from detecting import saved
from generating import generator
from zoo.__main__ import main
from zoo.outputs.label_map import LabelMap
from zoo.tasks import maps
from zoo.tasks.app import classify, contributions, detect, generate, sides, transcribe
from zoo.tasks.app.shelf import KEPT, Shelf, Took
from zoo.tasks.predicting import load
from zoo.tasks.transcribe.listener import Listener, recorded
from zoo.weights import load_checkpoint

DIGITS, SPEECH = "vit_micro.digits", "squeezeformer_micro.spoken_digits"


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf("cpu")


@pytest.fixture
def digit(tmp_path: Path) -> str:
    digits: Any = load_digits()
    Image.fromarray((digits.images[-3] * 255 / 16).round().astype(np.uint8)).save(tmp_path / "digit.png")
    return str(tmp_path / "digit.png")


# Answers


@pytest.mark.parametrize("fused", [False, True])
def test_classes_are_those_of_predict(fused: bool, shelf: Shelf, digit: str):
    first, second = classify.ask(shelf, digit, DIGITS, fused, True)
    wanted = load_checkpoint(DIGITS)(digit)[: classify.TOP]
    for best, took, _ in (first, second):
        assert [each["label"] for each in best] == [each.label for each in wanted]
        probabilities = torch.tensor([each["probability"] for each in best])
        assert (probabilities - torch.tensor([each.probability for each in wanted])).abs().max() < 1e-5
        assert took.milliseconds > 0 and took.calls > 1
    assert first[2] is None and second[2] is not None and second[2].mode == "RGB"
    assert len([*classify.ask(shelf, digit, DIGITS, fused, False)]) == 1


def test_boxes_are_those_of_predict(shelf: Shelf, digit: str, tmp_path: Path):
    name = saved(tmp_path / "finder", LabelMap.from_names(["a", "b"]), 64)
    objects, _, labels = detect.ask(shelf, digit, name, False)
    assert len(objects) > 3
    middle = sorted(each["score"] for each in objects)[len(objects) // 2]
    kept = detect.above(objects, middle)
    main(["detect", "predict", name, digit, "--output", str(tmp_path), "--threshold", str(middle)])
    from zoo.text import from_json

    written = from_json((tmp_path / "detections.json").read_text())["annotations"]
    assert 0 < len(kept) < len(objects)
    assert [each["score"] for each in kept] == [each["score"] for each in written]
    assert [labels.ids[labels.names.index(each["label"])] for each in kept] == [each["category_id"] for each in written]
    plain, some = (np.asarray(detect.drawn(digit, found, labels)) for found in ([], kept))
    assert plain.shape == some.shape == (8, 8, 3) and (plain != some).any()


def test_large_images_are_drawn_smaller_with_their_boxes(tmp_path: Path):
    Image.new("RGB", (2 * detect.SIDE, 100)).save(tmp_path / "wide.png")
    labels = LabelMap.from_names(["a"])
    found = [{"label": "a", "score": 0.5, "box": [2 * detect.SIDE - 200, 40, 2 * detect.SIDE - 100, 80]}]
    image = np.asarray(detect.drawn(str(tmp_path / "wide.png"), found, labels))
    assert image.shape[:2] == (50, detect.SIDE)
    columns = image.any((0, 2)).nonzero()[0]
    assert detect.SIDE - 110 < columns.min() < detect.SIDE - 90  # the left edge of the box


def test_text_is_that_of_predict(shelf: Shelf, tmp_path: Path):
    path = voice(tmp_path / "tone.wav", 1.5, 22050)
    *_, heard = transcribe.ask(shelf, path, SPEECH, False)
    assert heard.text == load_checkpoint(SPEECH)(path) != ""
    assert (
        abs(heard.seconds - 1.5) < 1e-3
        and heard.took is not None
        and heard.took.milliseconds > 0
        and heard.took.parts == 1
    )
    assert " ".join(word["text"] for word in heard.words) == heard.text
    assert transcribe.placed(heard.words).count("<li>") == len(heard.words)


def test_long_sound_comes_part_by_part(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transcribe, "LONGEST", 2.0)
    found = [*transcribe.ask(shelf, voice(tmp_path / "tone.wav", 7.0), SPEECH, False)]
    assert len(found) > 3
    for before, after in zip(found, found[1:], strict=False):
        assert after.text.startswith(before.text) and after.seconds > before.seconds
        assert before.took is not None and after.took is not None and after.took.parts == before.took.parts + 1


def test_silence_has_no_words(shelf: Shelf, tmp_path: Path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    (heard,) = transcribe.ask(shelf, str(tmp_path / "silent.wav"), SPEECH, False)
    assert heard == transcribe.Heard("", [], 1.0, None)


def test_a_streaming_model_gives_word_by_word_what_stream_prints(shelf: Shelf, tmp_path: Path):
    talker = apping.talker(tmp_path)
    path = voice(tmp_path / "tone.wav", 3.0)
    model, preprocess, tokenizer, _ = load_checkpoint(talker)
    listener = Listener(model, preprocess, tokenizer)  # pyright: ignore[reportArgumentType]
    wanted = "".join(listener.push(block) for block in recorded(path)) + listener.finish()
    found = [each.text for each in transcribe.ask(shelf, path, talker, False)]
    assert found[-1] == wanted and len({*found}) > 3
    assert all(after.startswith(before) for before, after in zip(found, found[1:], strict=False))
    # The same from a microphone, in files of half a second.
    samples, stream = soundfile.read(path)[0], None
    for start in range(0, len(samples), 8000):
        soundfile.write(tmp_path / "piece.wav", samples[start : start + 8000], 16000)
        stream = transcribe.hear(shelf, stream, str(tmp_path / "piece.wav"), talker, False)
    assert stream is not None and stream.finish().text == wanted and abs(stream.heard.seconds - 3.0) < 1e-3


def test_another_model_does_not_go_on_with_the_text_of_the_one_before(shelf: Shelf, tmp_path: Path):
    talker, path = apping.talker(tmp_path), voice(tmp_path / "tone.wav", 1.5)
    first = transcribe.hear(shelf, None, path, talker, False)
    assert transcribe.hear(shelf, first, path, talker, False) is first and abs(first.heard.seconds - 3.0) < 1e-3
    second = transcribe.hear(shelf, first, path, talker, True)
    assert second is not first and abs(second.heard.seconds - 1.5) < 1e-3 and second.asked == (talker, True)


def test_a_model_that_does_not_stream_says_so(shelf: Shelf, tmp_path: Path):
    with pytest.raises(ValueError, match=f"{SPEECH} cannot stream: its config has no chunk"):
        transcribe.hear(shelf, None, voice(tmp_path / "tone.wav", 0.5), SPEECH, False)


def test_a_grid_is_that_of_sample(shelf: Shelf, tmp_path: Path):
    name, seen = generator(tmp_path / "model"), list[tuple[int, int]]()
    given = {"classes": "3,8", "each": 2, "steps": 3, "guidance": 2.0, "seed": 5}
    image, number, took, words = generate.ask(shelf, name, False, **given, watch=lambda *at: seen.append(at))
    options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    main(["generate", "sample", name, "--output", str(tmp_path), *options])
    assert (np.asarray(image) == np.asarray(Image.open(tmp_path / "grid.png"))).all()
    assert (
        number == 4
        and took.milliseconds > 0
        and took.calls == 1
        and seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
        and "evaluation" in words
    )
    with pytest.raises(ValueError, match="at most 256 images at once, and 320 were asked for"):
        generate.ask(shelf, name, False, "", 32, 1, 1.0, 0, lambda *_: None)
    with pytest.raises(ValueError, match="unknown class '12'"):
        generate.ask(shelf, name, False, "12", 1, 1, 1.0, 0, lambda *_: None)


def test_what_is_drawn_can_be_cancelled(shelf: Shelf, tmp_path: Path):
    name, seen, asked = generator(tmp_path / "model"), list[int](), generate.Asked()

    def report(done: int, _: int) -> None:
        seen.append(done)
        if done == 2:
            asked.cancel()

    asked.begin()
    for watch in (asked.watch(report), asked.watch(report)):  # the second one waits for the first
        with pytest.raises(generate.Cancelled):
            generate.ask(shelf, name, False, "", 1, 9, 1.0, 0, watch)
    with pytest.raises(generate.Cancelled):  # a handler that comes late
        generate.ask(shelf, name, False, "", 1, 9, 1.0, 0, asked.watch(report))
    assert seen == [0, 1, 2]
    asked.begin()
    generate.ask(shelf, name, False, "3", 1, 1, 1.0, 0, asked.watch(report))
    assert seen == [0, 1, 2, 0, 1]


def test_a_generator_made_for_one_step_starts_at_one(shelf: Shelf, tmp_path: Path):
    usual, one = generator(tmp_path / "usual"), generator(tmp_path / "one", until=True)
    assert [generate.starting(shelf, one, steps) for steps in (generate.USUAL, 7, None, 1)] == [1, 1, 1, 1]
    assert [generate.starting(shelf, usual, steps) for steps in (1, 7, None)] == [generate.USUAL, None, None]
    assert [generate.starting(shelf, name, 1) for name in (DIGITS, "nowhere", "")] == [None, None, None]


# Maps


def test_a_map_has_the_falls_of_the_log_odds():
    """Of a linear model: hiding a part takes its share of the logit, which is all of the log odds of two classes."""
    weights = torch.randn(2, 3, 16, 24)
    image = torch.randn(3, 16, 24)

    def logits(images: Any) -> torch.Tensor:
        return torch.einsum("bchw,kchw->bk", torch.stack([*images]), weights)

    found = contributions.contributions(logits, image, 1)
    hidden = image.flatten(1).median(1).values[:, None, None]
    shares = ((image - hidden) * (weights[1] - weights[0])).sum(0)  # of the log odds, pixel by pixel
    cells = shares.unflatten(1, (8, 3)).unflatten(0, (8, 2)).sum((1, 3))
    around = torch.nn.functional.pad(cells, (1, 1, 1, 1))
    parts = around[:-1, :-1] + around[1:, :-1] + around[:-1, 1:] + around[1:, 1:]  # two cells each way
    wanted = (parts[:-1, :-1] + parts[1:, :-1] + parts[:-1, 1:] + parts[1:, 1:]) / 4
    assert (found - wanted).abs().max() < 1e-3


def test_a_map_of_few_pixels_and_of_one_class():
    found = contributions.contributions(lambda images: torch.stack([*images]).flatten(1)[:, :1], torch.ones(1, 2, 3), 0)
    assert found.shape == (2, 3) and not found.any()
    drawn = maps.drawn(torch.tensor([[1.0, -1.0]]), Image.new("L", (2, 1), 128))
    left, right = drawn.getpixel((0, 0)), drawn.getpixel((drawn.width - 1, 0))
    assert isinstance(left, tuple) and isinstance(right, tuple) and left[0] > left[2] and right[2] > right[0]


# Notes and errors


def test_what_goes_wrong_is_one_line(shelf: Shelf, tmp_path: Path):
    (tmp_path / "a<b.png").write_text("hello")

    def handle(path: str, name: str, fused: bool) -> Any:
        yield from classify.ask(shelf, path, name, fused, False)

    ask = sides.answered(handle, (None,))
    path = str(tmp_path / "a<b.png")
    ((told, blank),) = ask(path, DIGITS, False)
    assert told.startswith('<p class="fault" role="alert">not an image (JPEG') and blank is None
    assert [*ask(None, DIGITS, False)] == [*ask(path, sides.NOTHING, False)] == [("", None)]
    for name, wanted in {
        "": "choose a checkpoint",
        "nowhere": "checkpoint 'nowhere' not found",
        SPEECH: f"`zoo classify` cannot use {SPEECH}; use `zoo transcribe predict`",
        "<b>": "'<b>' not found",
    }.items():
        ((told, _),) = ask(path, name, False)
        assert wanted in html.unescape(told) and "\n" not in told and "<b>" not in told

    def broken(*_: Any) -> Any:
        raise KeyError("x\ny")
        yield

    ((told,),) = sides.answered(broken, ())("x", DIGITS, False)
    assert "KeyError" in told and "\n" not in told


def test_a_number_that_is_not_allowed_is_refused():
    assert [sides.between(each, "steps", 1, 250) for each in (1, 2.5, 250)] == [1, 2.5, 250]
    for value, got in ((0, "0"), (251, "251"), (None, "nothing"), (float("nan"), "nan")):
        with pytest.raises(ValueError, match=f"^steps must be from 1 to 250, got {got}$"):
            sides.between(value, "steps", 1, 250)


def test_notes_are_escaped():
    assert sides.note("<a>", "", "b") == '<p class="note">&lt;a&gt;\N{NO-BREAK SPACE}· b</p>'
    tooks = (Took(1.234, 5), False), (Took(12.34), True), (Took(1000.0, 3) + Took(234.5, 2), False)
    assert [sides.timing(*each) for each in tooks] == [
        "1.23 ms (fastest of 5 calls)",
        "12.3 ms, fused (one call)",
        "1,234 ms (2 parts, fastest of 2 calls each)",
    ]


# The shelf


def test_models_are_loaded_once_and_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = list[str]()
    monkeypatch.setattr("zoo.tasks.app.shelf.files.load", lambda name: loaded.append(name) or load(DIGITS))
    shelf = Shelf("cpu")
    assert shelf.task("a") == "classify"
    plain, fused = (shelf.take("classify", "a", each) for each in (False, True))
    assert shelf.take("classify", " a", False) is plain and shelf.take("classify", "a", True) is fused
    assert loaded == ["a"] and plain.model.fusion is None and fused.model.fusion
    for number in range(KEPT):
        shelf.take("classify", str(number), False)
    assert shelf.take("classify", str(KEPT - 1), False) and loaded == ["a", *map(str, range(KEPT))]
    assert shelf.take("classify", "a", False) is not plain and loaded[-1] == "a"


def test_a_slow_checkpoint_does_not_stop_another(monkeypatch: pytest.MonkeyPatch):
    begun, released = threading.Event(), threading.Event()

    def slow(name: str) -> Any:
        if name == "slow":
            begun.set()
            assert released.wait(20)
        return load(DIGITS)

    monkeypatch.setattr("zoo.tasks.app.shelf.files.load", slow)
    shelf, tasks = Shelf("cpu"), list[str]()
    other = threading.Thread(target=lambda: tasks.append(shelf.task("slow")))
    other.start()
    assert begun.wait(20) and shelf.task("fast") == "classify" and not tasks
    released.set()
    other.join(20)
    assert tasks == ["classify"]


def test_a_short_answer_is_repeated_and_one_question_is_asked_at_a_time():
    shelf, running, most, calls = Shelf("cpu"), [0], [0], [0]

    def ask() -> int:
        running[0] += 1
        most[0], calls[0] = max(most[0], running[0]), calls[0] + 1
        threading.Event().wait(0.002)
        running[0] -= 1
        return 7

    threads = [threading.Thread(target=shelf.timed, args=(ask,)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == [1] and calls == [20]
    assert shelf.timed(ask)[1].calls == 5 and calls == [25]
    answer, took = shelf.timed(ask, repeat=False)
    assert answer == 7 and calls == [26] and 2 <= took.milliseconds < 2000 and took.calls == 1
