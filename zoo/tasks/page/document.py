"""The page itself: one HTML file with everything inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import zoo
from zoo.tasks.page.runtime import VERSION, Runtime
from zoo.text import plain

LARGEST = 40_000_000  # bytes of a page
FIGURES = ("data", "split", "metric", "value", "n", "95 % interval")
WORDS: dict[str, dict[str, str]] = {
    "classify": {
        "about": "Image classification.",
        "hint": "Drop an image here, paste one, or",
        "choose": "Choose an image",
        "live": "Use the camera",
        "accept": "image/*",
        "shown": "The image that was read",
    },
    "detect": {
        "about": "Object detection.",
        "hint": "Drop an image here, paste one, or",
        "choose": "Choose an image",
        "live": "Use the camera",
        "accept": "image/*",
        "shown": "The image that was read, with the boxes of the objects",
    },
    "transcribe": {
        "about": "Speech recognition.",
        "hint": "Drop a recording here, or",
        "choose": "Choose a recording",
        "live": "Use the microphone",
        "accept": "audio/*",
        "shown": "The sound that was read",
    },
}


def document(
    task: str,
    name: str,
    written: Mapping[str, Any],
    shown: Mapping[str, Any],
    graph: bytes,
    runtime: Runtime,
    webgpu: Runtime | None = None,
) -> bytes:
    """The contents of the file.

    Args:
        task: of the checkpoint.
        name: of the checkpoint, the title.
        written: its config.json.
        shown: what the script needs to show an answer.
        graph: the contents of an ONNX file.
        runtime: the files of onnxruntime-web.
        webgpu: those of its form for a GPU, which is tried first where there is one.

    Raises:
        ValueError: the page is larger than LARGEST.
    """
    style, script = asset("page.css"), "\n".join(map(asset, ("page.js", "sound.js", "boxes.js")))
    parts = {
        "policy": policy(style, script),
        "style": style,
        "script": script,
        "card": card(written),
        "config": inert({"task": task, "providers": ["webgpu"] * (webgpu is not None) + ["wasm"], **shown}),
        "model": embedded("model", graph),
        "runtimes": "\n".join(
            embedded(f"{provider}-{part}", contents)
            for provider, each in {"wasm": runtime, "webgpu": webgpu}.items()
            if each is not None
            for part, contents in zip(each._fields, each, strict=True)
        ),
    }
    texts = {"task": task, "title": plain(name), "version": zoo.__version__, "runtime": VERSION, **WORDS[task]}
    parts |= {key: html.escape(text) for key, text in texts.items()}
    parts["heading"] = re.sub("([._-])", r"\1<wbr>", parts["title"])  # a long name is broken there
    made = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset("page.html"))
    contents = made.encode("utf-8", "backslashreplace")
    if len(contents) > LARGEST:
        raise ValueError(f"the page would take {len(contents) / 1e6:.0f} MB, and {LARGEST / 1e6:.0f} MB is allowed")
    return contents


def asset(name: str) -> str:
    return files("zoo.tasks.page").joinpath(name).read_text("utf-8")


def policy(style: str, script: str) -> str:
    """A content security policy that forbids every connection, and every script but the page's own and the runtime,
    which it loads from memory."""
    style, script = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (style, script))
    allowed = {
        "default-src": "'none'",
        "script-src": f"'sha256-{script}' blob: 'wasm-unsafe-eval'",
        "style-src": f"'sha256-{style}'",
        "media-src": "blob:",
        "connect-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{key} {value}" for key, value in allowed.items())


def embedded(name: str, contents: bytes) -> str:
    """An element that holds a file, without the address that a source map would be loaded from."""
    text = re.sub(rb"\n//# sourceMappingURL=.*", b"", contents) if name.endswith("-engine") else contents
    packed = base64.b64encode(gzip.compress(text, 9, mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def inert(value: Any) -> str:
    """JSON that cannot end the element in which it stands."""
    return re.sub(r"[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value))


def card(written: Mapping[str, Any]) -> str:
    """What a checkpoint's card says, as HTML."""

    def cell(value: object, tag: str = "td", scope: str = "") -> str:
        return f"<{tag}{scope}>{html.escape(plain(str(value)))}</{tag}>"

    def table(rows: list[str]) -> str:
        return f'<div class="table"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'

    text = "\n".join(map(plain, str(written.get("card") or "").split("\n")))
    made = ["<h2>About the model</h2>"] + ([f"<p>{html.escape(text)}</p>"] if text.strip() else [])
    rows = ["".join(cell(name, "th") for name in FIGURES)]
    for each in written.get("figures") or []:
        interval = "" if each["interval"] is None else "{:.4f} to {:.4f}".format(*each["interval"])
        values = (each["data"], each["split"], each["metric"], f"{each['value']:.4f}", each["n"] or "", interval)
        rows.append("".join(map(cell, values)))
    if len(rows) > 1:
        made.append(table(rows))
    facts = {
        "Model": written.get("preset") or written["family"],
        "Parameters": f"{written['parameters']:,}",
        "Data": ", ".join(written.get("datasets") or []) or "not stated",
        "License of the weights": written.get("license") or "unknown",
    }
    made.append(table([cell(name, "th", ' scope="row"') + cell(value) for name, value in facts.items()]))
    return "\n".join(made)
