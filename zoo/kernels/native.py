"""C++ sources of this folder, compiled on the machine at first use and kept for the next time."""

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from zoo.aside import aside
from zoo.text import one_line

# The vector types of the sources are those of GCC and Clang.
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Tried in this order: some compilers have no OpenMP, some processors no `native`.
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `<name>.cpp` of this folder, or None, with one warning, if it cannot be compiled.

    Libraries are in the folder of the environment variable ZOO_CACHE, by default `~/.cache/zoo`; the name of each
    depends on source, flags, compiler and processor. Set ZOO_NATIVE=0 to disable it.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    if os.environ.get("ZOO_NATIVE", "1") == "0":
        return None
    try:
        path = build(source)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or made on another system that shares the folder
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(build(source)))
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        warnings.warn(
            f"zoo: {source.name} cannot be used ({reason}); plain PyTorch computes the same, several times slower. "
            "Install a C++ compiler (GCC or Clang), or set ZOO_NATIVE=0 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def cache_folder() -> Path:
    """The folder for files made on this machine: ZOO_CACHE, or `zoo` in the user's cache folder."""
    return Path(os.environ.get("ZOO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "zoo")).expanduser()


def build(source: Path) -> Path:
    """The path of the compiled library, made if missing; RuntimeError, with the reason, if it cannot be made."""
    compiler = next((found for name in _compilers() if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"no C++ compiler found among {', '.join(_compilers())}")
    made_for = (source.read_bytes(), repr((FLAGS, EXTRAS, compiler, platform.machine(), _processor())).encode())
    key = hashlib.sha256(b"\0".join(made_for)).hexdigest()[:16]
    folder = cache_folder().absolute()  # a name without a slash would be looked up among the system's libraries
    path = folder / f"{source.stem}-{key}.so"
    if path.exists():
        return path
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(aside(folder))
        except OSError:  # a home that cannot be written: compiled in each process
            work = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, work, ignore_errors=True)
            path = work / path.name
        _compile(compiler, source, work / "fresh.so")
        os.replace(work / "fresh.so", path)  # atomic, as several processes may do so at once
    return path


def _compilers() -> tuple[str, ...]:
    return (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS


def _compile(compiler: str, source: Path, target: Path) -> None:
    said = ""
    for extra in EXTRAS:
        command = [compiler, *FLAGS, *extra, str(source), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{compiler} did not finish within five minutes") from None
        if done.returncode == 0:
            return
        said = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit status {done.returncode}"
    raise RuntimeError(f"{compiler} failed: {said}")


def _processor() -> str:
    """A name for processors of the same instructions, as a home may be shared between machines."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
