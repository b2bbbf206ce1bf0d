"""The files of onnxruntime-web that a page holds: from a folder, or from the npm registry, checked."""

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from zoo.aside import aside
from zoo.text import reason

VERSION = "1.30.0"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # sha512
LIMIT = 200_000_000  # bytes of the archive
SECONDS = 60  # without an answer
NAMES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# With WebGPU. The native form in ort.webgpu.bundle.min.mjs lacks the operators in float64 that preparing inputs takes.
WEBGPU_NAMES = ("ort.bundle.min.mjs", "ort-wasm-simd-threaded.jsep.wasm")


class Runtime(NamedTuple):
    """The script and the WebAssembly of onnxruntime-web."""

    engine: bytes
    binary: bytes


def cache() -> Path:
    """The folder in which the files are kept: that of ZOO_CACHE, by default `~/.cache/zoo`."""
    home = os.environ.get("ZOO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "zoo")
    return Path(home).expanduser() / f"onnxruntime-web-{VERSION}.tgz"


def read_runtime(folder: str | None, names: tuple[str, str] = NAMES) -> Runtime:
    """The files in an unpacked npm package, or those of the pinned version, downloaded once.

    Args:
        folder: of the package; None is the pinned version.
        names: of the files: NAMES, or WEBGPU_NAMES for the form that runs on a GPU, and slower without one.

    Raises:
        ValueError: the folder lacks a file, or what was downloaded is not what was published.
        OSError: the registry cannot be reached, or a file cannot be read.
    """
    if folder is not None:
        root = Path(folder).expanduser()
        places = [root, root / "dist", root / "package" / "dist"]
        found = next((each for each in places if all((each / name).is_file() for name in names)), None)
        if found is None:
            raise ValueError(
                f"--runtime {folder}: {' and '.join(names)} not found; give the folder of an unpacked onnxruntime-web"
            )
        return Runtime(*((found / name).read_bytes() for name in names))
    path = cache()
    archive = path.read_bytes() if path.is_file() else b""
    if not intact(archive):
        archive = download()
        keep(path, archive)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        members = (files.extractfile(f"package/dist/{name}") for name in names)
        return Runtime(*(each.read() for each in members if each is not None))


def intact(archive: bytes) -> bool:
    """Whether these bytes are the archive that was published."""
    return base64.b64encode(hashlib.sha512(archive).digest()).decode() == INTEGRITY


def download() -> bytes:
    """The archive from the npm registry."""
    try:
        with urllib.request.urlopen(ADDRESS, timeout=SECONDS) as answer:
            archive = answer.read(LIMIT)
    except OSError as error:
        raise OSError(
            f"cannot download onnxruntime-web {VERSION} ({reason(getattr(error, 'reason', error))}); where there is "
            f"internet, run `npm pack onnxruntime-web@{VERSION}`, unpack it, and give its folder with --runtime"
        ) from error
    if not intact(archive):
        raise ValueError(f"{ADDRESS} is not what was published: its SHA-512 differs; nothing was written")
    return archive


def keep(path: Path, archive: bytes) -> None:
    """Writes the archive aside and renames it into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path.parent) as folder:
            made = folder / path.name
            made.write_bytes(archive)
            os.replace(made, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {reason(error)}; set ZOO_CACHE to a folder that can be written") from error
