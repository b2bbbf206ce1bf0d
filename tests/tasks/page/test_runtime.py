"""The files of onnxruntime-web: from a folder, or from npm once, and never other ones."""

import base64
import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from paging import stand_in
from zoo.tasks.page import runtime
from zoo.tasks.page.runtime import NAMES, VERSION, WEBGPU_NAMES, read_runtime


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive that takes the place of the published one."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    stand_in(tmp_path / "package")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as file:
        file.add(tmp_path / "package", "package")
    archive = (tmp_path / "made.tgz").read_bytes()
    monkeypatch.setattr(runtime, "INTEGRITY", base64.b64encode(hashlib.sha512(archive).digest()).decode())
    return archive


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | OSError) -> list[str]:
    asked: list[str] = []

    def urlopen(address: str, timeout: float) -> Any:
        asked.append(address)
        if isinstance(answer, OSError):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_it_is_downloaded_once(published: bytes, monkeypatch: pytest.MonkeyPatch):
    asked = serve(monkeypatch, published)
    first, second = read_runtime(None), read_runtime(None)
    assert first == second and first.binary == b"\0asm"
    assert read_runtime(None, WEBGPU_NAMES).binary == b"\0asm" + WEBGPU_NAMES[1].encode()
    assert asked == [f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"]


def test_another_archive_is_refused_and_not_kept(published: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    serve(monkeypatch, published + b"\0")
    with pytest.raises(ValueError, match="is not what was published: its SHA-512 differs; nothing was written$"):
        read_runtime(None)
    assert not (tmp_path / "cache").exists()


def test_an_altered_cache_is_replaced(published: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    serve(monkeypatch, published)
    read_runtime(None)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(published[:-5])
    assert read_runtime(None).binary == b"\0asm" and kept.read_bytes() == published


def test_without_internet_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, urllib.error.URLError(OSError(101, "Network is unreachable")))
    wanted = rf"^cannot download .* \(Network is unreachable\); .* `npm pack onnxruntime-web@{VERSION}`.* --runtime$"
    with pytest.raises(OSError, match=wanted):
        read_runtime(None)


def test_a_folder_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = serve(monkeypatch, b"")
    for folder in (tmp_path, tmp_path / "package", tmp_path / "package" / "dist"):
        assert read_runtime(str(folder)).binary == b"\0asm"
    (tmp_path / "package" / "dist" / NAMES[1]).unlink()
    with pytest.raises(ValueError, match=f"^--runtime .*: {NAMES[0]} and {NAMES[1]} not found; give the folder of an"):
        read_runtime(str(tmp_path))
    assert not asked
