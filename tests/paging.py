"""What the tests of `zoo page` share: a stand-in for the runtime, and what is inside a page."""

import base64
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

from zoo.tasks.page.runtime import NAMES, WEBGPU_NAMES


def stand_in(folder: Path) -> str:
    """A folder in the form of an unpacked onnxruntime-web, whose files do nothing."""
    (folder / "dist").mkdir(parents=True)
    for engine, binary in (NAMES, WEBGPU_NAMES):
        (folder / "dist" / engine).write_bytes(b"export const env = {};\n//# sourceMappingURL=ort.map\n")
        (folder / "dist" / binary).write_bytes(b"\0asm" + (binary.encode() if "jsep" in binary else b""))
    return str(folder)


def embedded(page: str, name: str) -> str:
    """The text of an embedded part."""
    found = re.findall(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return found[0]


def unpacked(page: str, name: str) -> bytes:
    return gzip.decompress(base64.b64decode(embedded(page, name)))


def config(page: str) -> Any:
    return json.loads(embedded(page, "config"))


def seen(page: str) -> str:
    """The text of the card."""
    return html.unescape(re.findall(r'<section id="card".*?</section>', page, re.DOTALL)[0])
