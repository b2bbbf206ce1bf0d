"""The HTML file: nothing in a label or a card can act, and nothing is loaded from elsewhere."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from paging import config, seen, unpacked
from zoo.tasks.page import document as module
from zoo.tasks.page.document import document
from zoo.tasks.page.runtime import Runtime

EVIL = ["</script><script>alert(1)</script>", "<!--", '"quoted" \' & <b>', "犬 🐕 \u2028 \udcff", "{{model}}", "a\nb"]
WRITTEN: dict[str, Any] = {"family": "vit", "preset": None, "parameters": 1234567}
FIGURE = {"data": EVIL[0], "split": "val", "metric": "top-1", "value": 0.5, "n": 9, "interval": [0.25, 0.75]}
RUNTIME = Runtime(b"export {}\n//# sourceMappingURL=ort.map", b"\0asm")


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page(task: str = "classify", webgpu: Runtime | None = None, **written: Any) -> str:
    shown = {"labels": EVIL, "top": 5}
    return document(task, EVIL[0] + EVIL[2], WRITTEN | written, shown, b"graph", RUNTIME, webgpu).decode()


def test_labels_and_card_are_text():
    plain = page(card="A model.", license="mit", datasets=["digits"], figures=[FIGURE | {"data": "digits"}])
    evil = page(card="\n".join(EVIL), license=EVIL[0], datasets=EVIL, figures=[FIGURE])
    assert config(evil)["labels"] == EVIL
    assert Elements(evil).found == Elements(plain).found  # no element more, no attribute other
    for each in (EVIL[0], EVIL[1], EVIL[2], "犬 🐕"):
        assert each in seen(evil)
    assert unpacked(evil, "model") == b"graph"
    assert "0.2500 to 0.7500" in seen(evil) and "1,234,567" in seen(evil)


@pytest.mark.parametrize("task", module.WORDS)
def test_nothing_is_loaded_and_no_address_is_inside(task: str):
    made = page(task, RUNTIME, card="A model.")
    assert "http" not in re.sub(r'http-equiv="Content', "", made)
    assert all("//" not in unpacked(made, f"{provider}-engine").decode() for provider in ("wasm", "webgpu"))
    for _, attributes in Elements(made).found:
        assert not {"src", "href", "action", "style", "onclick", "onload"} & {*attributes}


def test_the_policy_allows_the_page_s_own_script_alone():
    made = page()
    (policy,) = [each["content"] for tag, each in Elements(made).found if each.get("http-equiv")]
    assert policy is not None and "default-src 'none'" in policy and "connect-src 'none'" in policy
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{kind} [^;]*'sha256-{re.escape(digest)}'", policy)
    assert "unsafe-inline" not in policy and "'unsafe-eval'" not in policy


def test_a_page_has_a_largest_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(ValueError, match="^the page would take 0 MB, and 0 MB is allowed$"):
        page()


def test_the_form_for_a_gpu_is_beside_the_usual_one():
    made = page(webgpu=Runtime(b"export const gpu = 1", b"\0gpu"))
    assert config(made)["providers"] == ["webgpu", "wasm"] and config(page())["providers"] == ["wasm"]
    assert unpacked(made, "webgpu-binary") == b"\0gpu" and unpacked(made, "wasm-binary") == RUNTIME.binary
    assert "webgpu-engine" not in page().split("<script>")[0]
