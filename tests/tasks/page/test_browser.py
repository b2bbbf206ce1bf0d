"""A page in Chromium, from disk and without a network: the answers of Python. The runtime is that in the cache."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from browsing import CHROMIUM, Browser
from zoo.__main__ import main
from zoo.tasks.page.runtime import cache
from zoo.weights import load_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not cache().is_file(), reason="onnxruntime-web is not in the cache; run `zoo page` once"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "digits.html"
    main(["page", "vit_micro.digits", "--output", str(path)])
    return path


@pytest.fixture
def browser(page: Path, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        yield browser
        assert not [each for each in browser.requests if each not in (page.as_uri(), "about:blank") and outside(each)]


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


def test_200_digits_get_the_answers_of_python(browser: Browser, page: Path, tmp_path: Path):
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


def test_the_first_answer_comes_within_5_seconds(browser: Browser, page: Path, tmp_path: Path):
    path = digit(0, tmp_path / "digit.png")
    start = time.monotonic()
    browser.open(page)
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
