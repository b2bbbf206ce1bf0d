"""`zoo app` in Chromium: answers by file and microphone, comparison, bad input, two users; nothing but 127.0.0.1."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.datasets import load_digits

import apping
from apping import voice
from browsing import CHROMIUM, Browser
from zoo.weights import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
]

DIGITS, SPEECH, CELLS = "vit_micro.digits", "squeezeformer_micro.spoken_digits", "rtdetr_micro.blood_cells"
FISH, DRAWN, ONE_STEP = "rtdetr_micro.aquarium", "dit_micro.digits", "dit_micro.digits_in_one_step"
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")
RECORD = (
    "[...document.querySelectorAll('{} button')].find((each) => each.innerText.trim() == '{}' && each.offsetParent)"
)


def heed() -> None:
    """Ctrl-C ends a process even where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class App:
    """A running app: its address, and what it wrote."""

    def __init__(self, folder: Path, *names: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.talker = names[-1] if names else ""
        self.log, self.address = folder / "log", f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-m", "zoo", "app", *names, "--no-browser", "--port", str(port), "--device", "cpu"]
        # A proxy that nothing listens at: the app needs no other machine to start and to answer.
        environment = {**os.environ, "TMPDIR": str(folder)} | dict.fromkeys(PROXIES, "http://127.0.0.1:9")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment, preexec_fn=heed)
        limit = time.monotonic() + 25
        while self.address not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < limit, self.log.read_text()
            time.sleep(0.05)

    def stop(self, number: int) -> str:
        """Ends the app by a signal; what it wrote."""
        self.process.send_signal(number)
        assert self.process.wait(20) == 0, self.log.read_text()
        return self.log.read_text()


class User(Browser):
    """A browser at the app."""

    def choose_checkpoint(self, name: str, label: str = "Checkpoint") -> None:
        field = f"""document.querySelector('input[aria-label="{label}"]')"""
        self.run(f"{field}.focus(), {field}.select()")
        self.send("Input.insertText", text=name)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
        self.run(f"{field}.blur()")

    def fuse(self, second: bool = False) -> None:
        self.run(f"document.querySelector('#fused_{1 + second} input').click()")

    def press(self, place: str, words: str) -> None:
        button = RECORD.format(place, words)
        self.wait(f"!!{button}")
        self.run(f"{button}.click()")

    def upload(self, task: str, path: Path | str) -> None:
        """Gives the app a file, in the place of an earlier one."""
        clear = '[aria-label=Clear], [aria-label="Remove Image"]'
        self.run(f"document.querySelector('#{task}_input').querySelector('{clear}')?.click()")
        self.wait(f"!!document.querySelector('#{task}_input input[type=file]')")
        self.wait(f"!document.querySelector(':is(#{task}_1, #{task}_2) :is(.note, .fault)')")
        self.choose(Path(path), f"#{task}_input input[type=file]")

    def told(self, task: str, side: int, *words: str) -> str:
        """The note of a side, once it has all of these words."""
        note = f"(document.querySelector('#{task}_{side} .note, #{task}_{side} .fault')?.innerText ?? '')"
        note += ".replaceAll('\\u00a0', ' ')"
        self.wait(" && ".join(f"{note}.includes({json.dumps(each)})" for each in words))
        return self.run(note)

    def classes(self, side: int = 1) -> dict[str, float]:
        """The shown classes and their probabilities."""
        script = f"""[...document.querySelectorAll('#classify_{side} meter')].map((each) => [each.ariaLabel,
            Number(each.getAttribute('value'))])"""
        return dict(self.run(script))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("app")
    running = App(folder, DIGITS, apping.talker(folder / "talker"))
    try:
        yield running
        assert "Traceback" not in running.stop(signal.SIGTERM)
        assert not [*folder.glob("zoo-app-*")], "the files that were given to it are gone"
    finally:
        running.process.kill()


@contextmanager
def opened(app: App, profile: Path, *options: str) -> Iterator[User]:
    """A user of the app; in the end, all that the browser asked for was on this machine."""
    with User(profile, *options, local=True) as user:
        user.visit(app.address)
        user.wait("!!document.querySelector('input[aria-label=\"Checkpoint\"]')")
        user.wait("document.body.innerText.includes('parameters')")
        yield user
        inside = (app.address, "data:", "blob:")
        assert not [each for each in user.requests if not each.startswith(inside)]
        assert len(user.requests) > 20


@pytest.fixture
def user(app: App, tmp_path: Path) -> Iterator[User]:
    with opened(app, tmp_path / "profile") as user:
        yield user


def digit(index: int, path: Path) -> Path:
    digits: Any = load_digits()
    Image.fromarray((digits.images[-1 - index] * 255 / 16).round().astype(np.uint8)).save(path)
    return path


def shows(user: User, path: Path, side: int = 1) -> bool:
    """Whether the classes that are shown in the end, after those of an earlier image, are the first ones of Python."""
    wanted = load_checkpoint(DIGITS)(str(path))[:5]
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        found = user.classes(side)
        if len(found) == 5 and all(abs(each.probability - found.get(each.label, 0.0)) < 1e-4 for each in wanted):
            return True
        time.sleep(0.05)
    return False


def test_an_image_is_classified_and_compared_with_the_fused_model(user: User, tmp_path: Path):
    path = digit(2, tmp_path / "digit.png")
    user.upload("classify", path)
    user.told("classify", 1, DIGITS, " ms")
    assert shows(user, path)
    user.wait("!!document.querySelector('#classify_1 img')")  # the map
    assert not user.run("!!document.querySelector('#classify_2')?.offsetParent")
    user.choose_checkpoint(DIGITS, "Compare with")
    user.fuse(second=True)
    user.told("classify", 2, DIGITS, " ms, fused")
    assert shows(user, path, 2)
    user.upload("classify", digit(5, path))
    for side in (1, 2):
        user.told("classify", side, DIGITS, " ms")
        assert shows(user, path, side)


def test_the_threshold_chooses_the_boxes_of_python(user: User, tmp_path: Path):
    path = apping.cells(tmp_path / "cells.png", 0)
    scores = [each.score for each in load_checkpoint(CELLS)(str(path))]
    user.choose_checkpoint(CELLS)
    user.wait("!!document.querySelector('#detect_input')?.offsetParent")
    user.choose_checkpoint(FISH, "Compare with")
    user.upload("detect", path)
    user.told("detect", 2, FISH, " ms")
    for threshold in (0.3, 0.6):
        number = "document.querySelector('#detect_threshold input[type=number]')"
        setter = "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
        user.run(f"{setter}.call({number}, {threshold}), {number}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        user.run(f"{number}.dispatchEvent(new Event('change', {{bubbles: true}})), {number}.blur()")
        wanted = sum(each >= threshold for each in scores)
        told = "(document.querySelector('#detect_1 .note')?.innerText.match(/ calls?\\)(.*)/)?.[1] ?? '')"
        user.wait(f"[...{told}.matchAll(/\\d+(?= )/g)].reduce((sum, each) => sum + Number(each), 0) == {wanted}")
    assert 0 < wanted < sum(each >= 0.3 for each in scores)
    assert user.run("document.querySelectorAll('#detect_1 img, #detect_2 img').length") == 2


def typed(user: User, place: str, text: str) -> None:
    """Puts a number into a field, as one that is typed, before the field is left."""
    setter = "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
    field = f"document.querySelector('{place} input')"
    user.run(
        f"{setter}.call({field}, {json.dumps(text)}), {field}.dispatchEvent(new Event('input', {{bubbles: true}}))"
    )


def test_a_number_out_of_range_gets_one_line(user: User, tmp_path: Path):
    """In the app's own words: the fixture reads that gradio printed no stack trace."""
    user.choose_checkpoint(CELLS)
    user.wait("!!document.querySelector('#detect_input')?.offsetParent")
    user.upload("detect", apping.cells(tmp_path / "cells.png", 0))
    user.told("detect", 1, CELLS, " ms")
    typed(user, "#detect_threshold", "5")
    user.told("detect", 1, "threshold must be from 0 to 1, got 5")
    typed(user, "#detect_threshold", "0.5")
    user.told("detect", 1, CELLS, " ms")
    user.choose_checkpoint(DRAWN)
    user.wait("!!document.querySelector('#generate_button')?.offsetParent")
    typed(user, "#generate_seed", "-1")
    user.run("document.querySelector('#generate_button').click()")
    user.told("generate", 1, "seed must be from 0 to 1000000000, got -1")


def heard(user: User, side: int = 1) -> str:
    return user.run(f"document.querySelector('#transcribe_{side} textarea').value")


def test_a_recording_is_transcribed(user: User, tmp_path: Path):
    user.choose_checkpoint(SPEECH)
    user.wait("!!document.querySelector('#transcribe_input')?.offsetParent")
    user.choose_checkpoint(SPEECH, "Compare with")
    for number, (seconds, rate, kind) in enumerate(((1.5, 16000, "wav"), (0.7, 44100, "flac"), (1.0, 8000, "ogg"))):
        path = voice(tmp_path / f"{number}.{kind}", seconds, rate)
        user.upload("transcribe", path)
        for side in (1, 2):
            user.told("transcribe", side, SPEECH, " ms", f"{seconds} s of sound")
            assert heard(user, side) == load_checkpoint(SPEECH)(path)


def test_the_microphone_is_heard_and_words_come_while_a_person_speaks(app: App, tmp_path: Path):
    """Chromium's stand-in for a microphone plays a file."""
    options = (
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={voice(tmp_path / 'a.wav', 9)}",
    )
    with opened(app, tmp_path / "profile", *options) as user:
        user.choose_checkpoint(SPEECH)
        user.wait("!!document.querySelector('#transcribe_input')?.offsetParent")
        user.run("document.querySelector('#transcribe_input [aria-label=\"Record audio\"]').click()")
        user.press("#transcribe_input", "Record")
        time.sleep(1.5)
        user.press("#transcribe_input", "Stop")
        assert " ms" in user.told("transcribe", 1, SPEECH, "s of sound") and heard(user)
        user.choose_checkpoint(app.talker)
        user.told("transcribe", 1, app.talker, "s of sound")
        user.run("document.querySelector('#transcribe_live button').click()")
        time.sleep(2)  # gradio loads its recorder, and the text of the recording is whole
        before = heard(user)
        user.press("#transcribe_live", "Record")
        seen, limit = [before], time.monotonic() + 60
        while len(seen) < 5:
            assert time.monotonic() < limit, (seen, user.run("document.body.innerText"), user.errors)
            if (text := heard(user)) != seen[-1]:
                seen.append(text)
        user.press("#transcribe_live", "Stop")
        assert all(after.startswith(earlier) for earlier, after in zip(seen[1:], seen[2:], strict=False)), seen
        user.choose_checkpoint(SPEECH)
        user.press("#transcribe_live", "Record")
        user.told("transcribe", 1, f"{SPEECH} cannot stream: its config has no chunk")


def test_two_generators_draw_the_grids_of_python(user: User):
    user.choose_checkpoint(DRAWN)
    user.wait("!!document.querySelector('#generate_button')?.offsetParent")
    user.choose_checkpoint(ONE_STEP, "Compare with")
    user.run("document.querySelector('#generate_button').click()")
    user.told("generate", 1, DRAWN, "80 images", "heun, 99 evaluations an image")
    user.told("generate", 2, ONE_STEP, "80 images", "meanflow, 50 evaluations an image")
    sizes = "[...document.querySelectorAll('#generate_1 img, #generate_2 img')].map((each) => each.naturalHeight)"
    user.wait(f"{sizes}.length == 2 && {sizes}.every((each) => each > 300)")


def test_what_is_drawn_can_be_cancelled(user: User):
    user.choose_checkpoint(DRAWN)
    user.wait("!!document.querySelector('#generate_button')?.offsetParent")
    user.choose_checkpoint(ONE_STEP, "Compare with")
    user.wait("!!document.querySelector('#generate_2')?.offsetParent")
    for steps, button in (("250", "cancel"), ("1", "button")):
        typed(user, "#generate_steps", steps)
        user.run("document.querySelector('#generate_button').click()")
        if button == "cancel":
            user.wait("/[0-9]\\/500 steps/.test(document.body.innerText)")
            user.run("document.querySelector('#generate_cancel').click()")
        for side, name in ((1, DRAWN), (2, ONE_STEP)):
            user.told("generate", side, name, "cancelled" if button == "cancel" else "80 images")


def test_a_generator_made_for_one_step_starts_at_one(user: User):
    steps = "document.querySelector('#generate_steps input[type=number]')?.value"
    for name, wanted in ((DRAWN, "50"), (ONE_STEP, "1"), (DIGITS, ""), (DRAWN, "50"), (DIGITS, ""), (ONE_STEP, "1")):
        user.choose_checkpoint(name)
        shown = f"{steps} == '{wanted}'" if wanted else "!!document.querySelector('#classify_input')?.offsetParent"
        user.wait(shown)
    user.run("document.querySelector('#generate_button').click()")
    user.told("generate", 1, ONE_STEP, "80 images", "meanflow, 1 evaluation an image")


@pytest.mark.parametrize("name", ["text.png", "empty.png", "moving.gif", "one.png", "thin.png", "large.png"])
def test_any_image_gets_an_answer_or_one_line(name: str, user: User, tmp_path: Path):
    path = tmp_path / name
    if name == "moving.gif":
        frames = [Image.open(digit(index, tmp_path / f"{index}.png")) for index in (0, 1)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif name in ("one.png", "thin.png"):
        Image.new("RGB", (1, 1 if name == "one.png" else 500), (200, 10, 10)).save(path)
    else:
        path.write_bytes({"text.png": b"hello", "empty.png": b"", "large.png": bytes(100_000_000)}[name])
    user.upload("classify", path)
    if name == "large.png":
        user.wait("document.body.innerText.includes('exceed the maximum allowed size of 50.0 M')")
    elif name in ("text.png", "empty.png"):
        user.told("classify", 1, {"text.png": "not an image (JPEG, PNG", "empty.png": "the file is empty"}[name])
        assert user.run("document.querySelectorAll('#classify_1 .fault').length") == 1
    else:
        user.told("classify", 1, DIGITS, " ms")
        assert shows(user, path)
    user.upload("classify", digit(1, tmp_path / "digit.png"))
    user.told("classify", 1, DIGITS, " ms")
    assert shows(user, tmp_path / "digit.png")


def test_any_sound_gets_an_answer_or_one_line(user: User, tmp_path: Path):
    user.choose_checkpoint(SPEECH)
    user.wait("!!document.querySelector('#transcribe_input')?.offsetParent")
    for name, seconds in (("silent.wav", 1.0), ("short.wav", 0.0002)):
        soundfile.write(tmp_path / name, np.zeros(round(16000 * seconds)), 16000)
        user.upload("transcribe", tmp_path / name)
        user.told("transcribe", 1, "silence", f"{seconds:.1f} s of sound", "no words")
        assert heard(user) == ""
    for name, contents, words in (("text.wav", b"hello", "cannot be read as audio"), ("no.wav", b"", "file is empty")):
        (tmp_path / name).write_bytes(contents)
        user.upload("transcribe", tmp_path / name)
        assert "\n" not in user.told("transcribe", 1, words)


def test_a_checkpoint_that_cannot_be_used_gets_one_line(user: User, tmp_path: Path):
    user.upload("classify", digit(0, tmp_path / "digit.png"))
    user.told("classify", 1, DIGITS, " ms")
    for name, words in (
        ("nowhere", "checkpoint 'nowhere' not found"),
        (str(tmp_path), "has no config.json"),
        (" ", "choose a checkpoint"),
    ):
        user.choose_checkpoint(name)
        user.told("classify", 1, words)
        user.wait(f"document.querySelector('#about').innerText.includes({json.dumps(words)})")
    user.choose_checkpoint(DIGITS)
    user.told("classify", 1, DIGITS, " ms")
    user.choose_checkpoint(SPEECH, "Compare with")
    user.told("classify", 2, f"`zoo classify` cannot use {SPEECH}")
    assert shows(user, tmp_path / "digit.png")


def test_two_users_at_once_get_their_own_answers(app: App, tmp_path: Path):
    with opened(app, tmp_path / "a") as one, opened(app, tmp_path / "b") as other:
        for index in range(5):
            paths = [digit(2 * index + user, tmp_path / f"{user}.png") for user in (0, 1)]
            for user, path in zip((one, other), paths, strict=True):
                user.upload("classify", path)
            for user, path in zip((one, other), paths, strict=True):
                user.told("classify", 1, DIGITS, " ms")
                assert shows(user, path)
        other.choose_checkpoint(CELLS)
        other.wait("!!document.querySelector('#detect_input')?.offsetParent")
        assert one.run("!!document.querySelector('#classify_input')?.offsetParent")


def test_ctrl_c_ends_the_app_in_silence(tmp_path: Path):
    running = App(tmp_path)
    try:
        assert running.stop(signal.SIGINT) == f"zoo: the app runs at {running.address}; Ctrl-C ends it\n"
    finally:
        running.process.kill()
