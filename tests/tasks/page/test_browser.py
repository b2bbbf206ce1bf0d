"""A page in Chromium, from disk and without a network: the answers of Python. The runtime is that in the cache."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.datasets import load_digits

from apping import cells
from browsing import CHROMIUM, WEBGPU, Browser
from zoo.__main__ import main
from zoo.tasks.page.runtime import cache
from zoo.weights import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not cache().is_file(), reason="onnxruntime-web is not in the cache; run `zoo page` once"),
]


DIGITS, SPEECH, CELLS = "vit_micro.digits", "squeezeformer_micro.spoken_digits", "rtdetr_micro.blood_cells"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in (DIGITS, SPEECH, CELLS):
        made[name] = tmp_path_factory.mktemp("page") / "page.html"
        main(["page", name, "--output", str(made[name])])
    return made


@contextmanager
def opened(page: Path, profile: Path, *options: str) -> Iterator[Browser]:
    """A browser that shows a page; at the end it has asked for nothing else."""
    with Browser(profile, *options) as browser:
        browser.open(page)
        yield browser
        assert not [each for each in browser.requests if each != page.as_uri() and outside(each)]


@pytest.fixture
def browser(pages: dict[str, Path], tmp_path: Path) -> Iterator[Browser]:
    with opened(pages[DIGITS], tmp_path / "profile") as browser:
        yield browser


def outside(address: str) -> bool:
    """Whether an address is not in the page's own memory."""
    return not address.startswith(("blob:", "data:"))


def digit(index: int, path: Path) -> Path:
    """One of the last 360 digits, which are the validation data: every second one of the model's own size."""
    digits: Any = load_digits()
    image = Image.fromarray((digits.images[-1 - index] * 255 / 16).round().astype(np.uint8))
    if index % 2:
        image = image.resize((32, 32), Image.Resampling.BILINEAR)
    image.save(path)
    return path


def clips(folder: Path, number: int) -> list[Path]:
    """Spoken sounds in the formats and rates of files, the same ones in each call: noise through the resonances of a
    voice, which the model takes for digits."""
    random, found = np.random.default_rng(0), []
    for index in range(number):
        rate = (8000, 16000, 22050, 44100, 48000)[index % 5]
        time_ = np.arange(int(rate * random.uniform(0.3, 1.5))) / rate
        pitch, swell = random.uniform(90, 240), np.sin(np.pi * time_ / time_[-1]) ** 2
        low, high = random.uniform(300, 800, 2), random.uniform(900, 2500, 2)
        glide = time_ / time_[-1]
        voice = np.zeros(len(time_))
        for harmonic in range(1, int(3000 / pitch)):
            hertz = harmonic * pitch
            near = [np.exp(-(((hertz - (a + (b - a) * glide)) / 120) ** 2)) for a, b in (low, high)]
            voice += (near[0] + 0.6 * near[1] + 0.02) * np.sin(2 * np.pi * hertz * time_)
        sound = (0.3 * voice / np.abs(voice).max() * swell + 0.002 * random.standard_normal(len(time_))).astype(
            "float32"
        )
        channels = np.stack([sound, sound * 0.5], 1) if index % 3 == 0 else sound
        path = folder / f"{index}.{('wav', 'flac', 'ogg')[index % 7 % 3]}"
        soundfile.write(path, channels, rate)
        found.append(path)
    return found


def test_50_clips_get_the_words_of_python(pages: dict[str, Path], tmp_path: Path):
    """Files of several formats, rates and channels; a lossless one gives the same logits, too."""
    checkpoint = load_checkpoint(SPEECH)
    model, preprocess, _, _ = checkpoint
    assert preprocess is not None
    with opened(pages[SPEECH], tmp_path / "profile") as browser:
        seen = set()
        for path in clips(tmp_path, 50):
            got, wanted = browser.give(path), checkpoint(str(path))
            assert got["text"] == wanted, path
            seen.add(wanted)
            features = preprocess(str(path))
            with torch.no_grad():
                logits = model(features[None], torch.tensor([len(features)]))[0].numpy().ravel()
            if path.suffix != ".ogg":  # decoders of Vorbis differ in where it ends
                assert len(got["logits"]) == len(logits), path
                assert np.abs(np.array(got["logits"]) - logits).max() < 2e-2 * np.abs(logits).max(), path
        assert len(seen) > 3 and browser.errors == []


def test_long_sound_is_cut_as_in_python(pages: dict[str, Path], tmp_path: Path):
    checkpoint = load_checkpoint(SPEECH)
    parts = [soundfile.read(path)[0] for path in clips(tmp_path, 50) if soundfile.info(path).samplerate == 16000]
    mono = [part.mean(1) if part.ndim == 2 else part for part in parts]
    gap = 0.001 * np.random.default_rng(0).standard_normal(16000 * 4)
    long = np.concatenate([each for part in mono for each in (part, gap)])
    assert len(long) > 16000 * 35
    soundfile.write(tmp_path / "long.wav", long, 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    with opened(pages[SPEECH], tmp_path / "profile") as browser:
        got = browser.give(tmp_path / "long.wav")
        assert got["text"] == checkpoint(str(tmp_path / "long.wav")) != ""
        times = [word["time"] for word in got["words"]]
        assert times == sorted(times) and times[-1] < len(long) / 16000
        assert browser.give(tmp_path / "silent.wav")["text"] == ""


def test_the_microphone_is_heard(pages: dict[str, Path], tmp_path: Path):
    """Chromium's stand-in for a microphone, which beeps."""
    with opened(pages[SPEECH], tmp_path / "profile", "--use-fake-device-for-media-stream") as browser:
        browser.wait("document.body.dataset.state == 'ready'")
        browser.run("document.getElementById('live').click()")
        browser.wait("document.getElementById('live').textContent == 'Stop and read'")
        time.sleep(1.5)
        browser.run("document.getElementById('live').click()")
        browser.wait("answers.length == 1")
        assert browser.run("document.getElementById('live').textContent") == "Use the microphone"
        assert len(browser.run("answers[0].logits")) > 12 * 20  # a second or more


def test_the_camera_is_seen(pages: dict[str, Path], tmp_path: Path):
    """Chromium's stand-in for a camera: first given up, then used."""
    with opened(pages[DIGITS], tmp_path / "profile", "--use-fake-device-for-media-stream") as browser:
        browser.wait("document.body.dataset.state == 'ready'")
        for button in ("stop", "live"):
            browser.run("document.getElementById('live').click()")
            browser.wait("document.getElementById('live').textContent == 'Take the picture'")
            assert not browser.run("document.getElementById('video').hidden")
            browser.run(f"document.getElementById('{button}').click()")
            browser.wait("document.getElementById('video').hidden")
        browser.wait("answers.length == 1")
        assert len(browser.run("answers[0].logits")) == 10


def test_200_digits_get_the_answers_of_python(browser: Browser, tmp_path: Path):
    model, preprocess, _, _ = load_checkpoint("vit_micro.digits")
    assert preprocess is not None
    same, off = 0, [0.0, 0.0]
    for index in range(200):
        path = digit(index, tmp_path / "digit.png")
        got = browser.give(path)
        with torch.no_grad():
            wanted = model(preprocess(str(path))[None])[0].numpy()
        same += got["index"] == wanted.argmax()
        distance = np.abs(np.array(got["logits"]) - wanted).max()
        off[index % 2] = max(off[index % 2], distance if index % 2 else distance / np.abs(wanted).max())
    assert same >= 199
    assert off[0] < 2e-2 and off[1] < 1e-3
    assert browser.errors == []


@pytest.mark.parametrize("name", [DIGITS, SPEECH, CELLS])
def test_the_first_answer_comes_within_5_seconds(name: str, pages: dict[str, Path], tmp_path: Path):
    path = clips(tmp_path, 1)[0] if name == SPEECH else digit(0, tmp_path / "digit.png")
    with opened(pages[name], tmp_path / "profile") as browser:
        start = time.monotonic()
        browser.open(pages[name])
        browser.give(path)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["jpg", "clear", "turned", "wide"])
def test_other_images_get_the_answers_of_python(kind: str, browser: Browser, tmp_path: Path):
    """A JPEG, half transparent pixels, a camera's EXIF, and a photo's size."""
    model, preprocess, _, _ = load_checkpoint("vit_micro.digits")
    assert preprocess is not None
    path = tmp_path / f"image.{'png' if kind == 'clear' else 'jpg'}"
    image = Image.open(digit(3, tmp_path / "digit.png")).convert("RGB")
    options: dict[str, Any] = {"quality": 90}
    if kind == "clear":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        options = {}
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image, options["exif"] = image.resize((48, 64)), exif
    elif kind == "wide":
        image = image.resize((4000, 3000), Image.Resampling.BICUBIC)
    image.save(path, **options)
    got = browser.give(path)
    with torch.no_grad():
        wanted = model(preprocess(str(path))[None])[0].numpy()
    assert got["index"] == wanted.argmax()
    assert np.abs(np.array(got["logits"]) - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_what_is_not_an_image_gets_one_line(browser: Browser, tmp_path: Path):
    for name, contents in (("empty.png", b""), ("text.png", b"hello"), ("cut.jpg", b"\xff\xd8\xff\xe0")):
        (tmp_path / name).write_bytes(contents)
        browser.choose(tmp_path / name)
        browser.wait("document.body.dataset.state == 'failed'")
        wanted = "This file is not an image that the browser can read."
        assert browser.run("document.getElementById('status').textContent") == wanted
        browser.give(digit(0, tmp_path / "digit.png"))


def test_a_script_cannot_reach_the_network(browser: Browser):
    """The policy of the page, not the missing network, forbids it."""
    browser.wait("document.body.dataset.state == 'ready'")
    told = """new Promise((done) => {
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("https://example.org/").catch(() => {});
        setTimeout(() => done("nothing was forbidden"), 3000);
    })"""
    assert browser.run(told) == "connect-src"


def test_boxes_are_those_of_python(pages: dict[str, Path], tmp_path: Path):
    checkpoint, number, wanted = load_checkpoint(CELLS), 0, []
    with opened(pages[CELLS], tmp_path / "profile") as browser:
        for seed in range(10):
            path = cells(tmp_path / "cells.png", seed)
            got, wanted = browser.give(path)["found"], checkpoint(str(path))
            assert len(got) == len(wanted) == 100
            for each in (each for each in wanted if each.score >= 0.3):
                number += 1
                near = min(
                    got, key=lambda one: np.abs(np.subtract(one["box"], each.box)).max() + (one["label"] != each.label)
                )
                assert near["label"] == each.label and abs(near["score"] - each.score) < 0.02
                assert np.abs(np.subtract(near["box"], each.box)).max() < 1
        counted = "[...document.querySelectorAll('#answers .share')].slice(1).map((each) => parseInt(each.textContent))"
        assert sum(browser.run(counted)) == sum(each.score >= 0.5 for each in wanted)
        browser.run(
            "const slider = document.querySelector('input[type=range]'); slider.value = 0.05;"
            "slider.dispatchEvent(new Event('input'))"
        )
        assert sum(browser.run(counted)) == sum(each.score >= 0.05 for each in wanted)
    assert number > 20


@pytest.mark.parametrize(
    "event", ["DragEvent('drop', { dataTransfer: data })", "ClipboardEvent('paste', { clipboardData: data })"]
)
def test_drop_and_paste(event: str, browser: Browser):
    browser.wait("document.body.dataset.state == 'ready'")
    script = """(async () => {
        const canvas = new OffscreenCanvas(20, 20), data = new DataTransfer();
        canvas.getContext("2d").fillRect(0, 0, 20, 20);
        data.items.add(new File([await canvas.convertToBlob()], "image.png", { type: "image/png" }));
        window.dispatchEvent(new EVENT);
    })()""".replace("EVENT", event)
    browser.run(script)
    browser.wait("answers.length == 1")


@pytest.fixture(scope="module")
def webgpu_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that hold the form for a GPU, too."""
    made = {}
    for name in (DIGITS, SPEECH, CELLS):
        made[name] = tmp_path_factory.mktemp("webgpu") / "page.html"
        main(["page", name, "--webgpu", "--output", str(made[name])])
    return made


def test_webgpu_gives_the_answers_of_python(webgpu_pages: dict[str, Path], tmp_path: Path):
    """On an adapter that computes on the CPU: for images of the model's size and others, and for speech."""
    model, preprocess, _, _ = load_checkpoint(DIGITS)
    assert preprocess is not None
    with opened(webgpu_pages[DIGITS], tmp_path / "digits", *WEBGPU) as browser:
        for index in range(4):
            path = digit(index, tmp_path / "digit.png")
            got = browser.give(path)
            with torch.no_grad():
                wanted = model(preprocess(str(path))[None])[0].numpy()
            assert np.abs(np.array(got["logits"]) - wanted).max() < (1e-3 if index % 2 else 2e-2) * np.abs(wanted).max()
        assert browser.run("document.body.dataset.provider") == "webgpu"
        assert browser.run("document.getElementById('status').textContent").endswith(" ms by WebGPU.")
        assert browser.errors == []
    checkpoint = load_checkpoint(SPEECH)
    with opened(webgpu_pages[SPEECH], tmp_path / "speech", *WEBGPU) as browser:
        for path in clips(tmp_path, 3):
            assert browser.give(path)["text"] == checkpoint(str(path)) != ""
        assert browser.run("document.body.dataset.provider") == "webgpu"


def test_a_detector_that_webgpu_cannot_run_gives_the_boxes_of_python(webgpu_pages: dict[str, Path], tmp_path: Path):
    """The runtime's deformable attention on WebGPU stops with an error about shapes."""
    checkpoint, path = load_checkpoint(CELLS), cells(tmp_path / "cells.png", 1)
    with opened(webgpu_pages[CELLS], tmp_path / "profile", *WEBGPU) as browser:
        got, wanted = browser.give(path)["found"], checkpoint(str(path))
    best = [sorted(each["score"] for each in got)[-5:], sorted(each.score for each in wanted)[-5:]]
    assert np.abs(np.subtract(best[0], best[1])).max() < 0.02


@pytest.mark.parametrize("name", [DIGITS, SPEECH])
def test_a_page_for_webgpu_without_an_adapter(name: str, webgpu_pages: dict[str, Path], tmp_path: Path):
    """It asks for nothing, and gives the answers of the usual page."""
    path = clips(tmp_path, 1)[0] if name == SPEECH else digit(0, tmp_path / "digit.png")
    with opened(webgpu_pages[name], tmp_path / "profile") as browser:
        answer, wanted = browser.give(path), load_checkpoint(name)(str(path))
        assert answer["text"] == wanted if name == SPEECH else str(answer["index"]) == wanted[0][0]
        assert browser.run("document.body.dataset.provider") == "wasm"
        assert browser.run("document.getElementById('status').textContent").endswith(" ms by WebAssembly.")
        assert {*browser.errors} <= {"No available adapters."}, "the browser says so itself"


FAILURES = {
    "no device": "GPUAdapter.prototype.requestDevice = () => Promise.reject(new Error('no device'));",
    "no adapter": "navigator.gpu.requestAdapter = () => Promise.resolve(null);",
    "a broken adapter": "navigator.gpu.requestAdapter = () => Promise.reject(new Error('broken'));",
    "a run": "GPUBuffer.prototype.mapAsync = () => Promise.reject(new Error('device lost'));",
}


@pytest.mark.parametrize("case", FAILURES)
def test_where_webgpu_fails_webassembly_answers(case: str, webgpu_pages: dict[str, Path], tmp_path: Path):
    model, preprocess, _, _ = load_checkpoint(DIGITS)
    assert preprocess is not None
    path = digit(1, tmp_path / "digit.png")
    with torch.no_grad():
        wanted = model(preprocess(str(path))[None])[0].numpy()
    with Browser(tmp_path / "profile", *WEBGPU) as browser:
        browser.send("Page.addScriptToEvaluateOnNewDocument", source=FAILURES[case])
        browser.open(webgpu_pages[DIGITS])
        for _ in range(2):
            assert np.abs(np.array(browser.give(path)["logits"]) - wanted).max() < 1e-3
            assert browser.run("document.body.dataset.provider") == "wasm"
