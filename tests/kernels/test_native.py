"""How C++ sources are compiled, kept and done without. The compilers here are scripts that copy a file."""

import functools
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import TimeoutExpired

import pytest
import torch

from helpers import relative
from zoo.kernels import deformable, deformable_cpu, native
from zoo.kernels.deformable import gathered

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    NATIVE = deformable_cpu.available()

COMPILED = Path(str(native.library("deformable_cpu")._name)) if NATIVE else Path()  # what the true compiler made
WANTED = os.environ.get("ZOO_NATIVE") != "0" and any(map(shutil.which, native._compilers()))
needs_native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler, or ZOO_NATIVE=0")
SOURCE = Path(native.__file__).with_name("deformable_cpu.cpp")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    for name in ("CXX", "ZOO_NATIVE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    library = functools.cache(native.library.__wrapped__)
    for module in (native, deformable_cpu):
        monkeypatch.setattr(module, "library", library)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes a script the compiler: it notes its call, runs `body`, and gives `product` out as what it compiled.
    Returns how often it was called."""

    def install(product: Path | None = None, body: str = "") -> Callable[[], int]:
        script, log = tmp_path / "compiler", tmp_path / "log"
        copy = f'cp "{product}" "$target"' if product else ""
        find = 'all="$*"\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && target=$2; shift; done'
        script.write_text(f'#!/bin/sh\n{find}\necho called >> "{log}"\n{body}\n{copy}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(log.read_text().split()) if log.exists() else 0

    return install


@pytest.fixture
def product(tmp_path):
    path = tmp_path / "product"
    path.write_text("compiled " * 1000)
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "thing.cpp"
    path.write_text("int thing;")
    return path


def equal_the_oracle():
    """Whether values and gradients are right in fp32, computed by whatever there is."""
    value, weights = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 2, 9)
    offsets = torch.randint(-1, 2, (*weights.shape, 2)) + 0.1 + 0.8 * torch.rand(*weights.shape, 2)
    lines = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    points = torch.stack(lines, -1).flatten(0, 1)[:, None, None]
    taps = torch.stack(torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij"), -1).flatten(0, 1)
    given = [each.requires_grad_() for each in (value, offsets, weights)]
    leaves = [each.detach().double().requires_grad_() for each in given]
    wanted = gathered(leaves[0], points + taps + leaves[1].flatten(1, 2), leaves[2].flatten(1, 2))
    got = deformable(*given, kernel=3).flatten(1, 2)
    seed = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, given, seed), torch.autograd.grad(wanted, leaves, seed.double()), strict=True)
    return all(relative(one.double(), other) <= 1e-5 for one, other in [(got, wanted), *pairs])


def quietly():
    """What equal_the_oracle says, and that there was no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return equal_the_oracle() and not caught


# Without


@pytest.mark.parametrize(
    ("variable", "value", "tried"), [("PATH", "", ".*"), ("CXX", "no-such-compiler", "no-such-compiler")]
)
def test_without_a_compiler_one_warning_says_what_to_do_and_results_are_the_same(monkeypatch, variable, value, tried):
    monkeypatch.setenv(variable, value)
    words = rf"no C\+\+ compiler found among {tried}\W.*Install a C\+\+ compiler"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert equal_the_oracle()
    assert len(caught) == 1 and "ZOO_NATIVE=0" in str(caught[0].message)
    assert quietly(), "the warning came again"


def test_zoo_native_0_does_without_in_silence(monkeypatch, compiler):
    calls = compiler()
    monkeypatch.setenv("ZOO_NATIVE", "0")
    assert quietly() and native.library("deformable_cpu") is None
    assert calls() == 0


def test_a_compiler_that_fails_is_cited_and_results_are_the_same(compiler):
    compiler(body="echo 'thing.cpp:1: error: no such thing' >&2; echo 'and more' >&2; exit 1")
    with pytest.warns(RuntimeWarning, match="failed: thing.cpp:1: error: no such thing") as caught:
        assert equal_the_oracle()
    assert len(caught) == 1 and "and more" not in str(caught[0].message)
    assert quietly(), "the warning came again"


def test_a_compiler_that_fails_without_a_word_is_cited_by_its_status(compiler, source):
    compiler(body="exit 3")
    with pytest.raises(RuntimeError, match="exit status 3"):
        native.build(source)


def test_a_compiler_that_never_ends_is_given_up(monkeypatch, compiler):
    def hang(command, timeout, **options):
        raise TimeoutExpired(command, timeout)

    compiler()
    monkeypatch.setattr("zoo.kernels.native.subprocess.run", hang)
    with pytest.warns(RuntimeWarning, match="did not finish within five minutes"):
        assert equal_the_oracle()


def test_what_cannot_be_loaded_is_done_without(compiler, product):
    compiler(product)
    path = native.build(SOURCE)
    path.write_bytes(b"\x7fELF and nothing more")
    with pytest.warns(RuntimeWarning, match="deformable_cpu.cpp cannot be used") as caught:
        assert equal_the_oracle()
    assert len(caught) == 1


# With


@pytest.mark.skipif(not WANTED, reason="no C++ compiler, or ZOO_NATIVE=0")
def test_the_source_compiles_where_there_is_a_compiler():
    assert NATIVE


@needs_native
def test_second_use_does_not_compile_again(compiler):
    calls = compiler(COMPILED)
    assert quietly() and native.library("deformable_cpu") is not None
    assert calls() == 1
    native.library.cache_clear()  # another process
    assert quietly() and native.library("deformable_cpu") is not None
    assert calls() == 1


def test_another_source_is_compiled_anew(compiler, product, source):
    calls = compiler(product)
    first = native.build(source)
    assert native.build(source) == first and calls() == 1
    source.write_text("int other;")
    assert native.build(source) != first and calls() == 2
    assert first.exists()


def test_another_compiler_compiles_anew(compiler, product, source, monkeypatch, tmp_path):
    compiler(product)
    first = native.build(source)
    other = tmp_path / "other"
    other.write_bytes((tmp_path / "compiler").read_bytes())
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert native.build(source) != first


def test_another_processor_compiles_anew(compiler, product, source, monkeypatch):
    compiler(product)
    first = native.build(source)
    monkeypatch.setattr(native, "_processor", lambda: "flags: fewer")
    assert native.build(source) != first


def test_flags_that_a_compiler_does_not_know_are_left_away(compiler, product, source):
    calls = compiler(product, 'case "$all" in *-fopenmp*) echo "no OpenMP" >&2; exit 1;; esac')
    assert native.build(source).read_bytes() == product.read_bytes()
    assert calls() == 2


def test_two_builds_at_once_leave_one_whole_file(compiler, product, source, tmp_path):
    """And nobody sees half of it."""
    calls = compiler(product, f'head -c 4500 "{product}" > "$target"; sleep 0.3')
    seen, over = set(), threading.Event()

    def watch():
        while not over.is_set():
            seen.update(path.stat().st_size for path in (tmp_path / "cache").glob("*.so"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(native.build, [source, source])
    finally:
        over.set()
        watcher.join()
    assert calls() == 2, "they did not overlap"
    assert first == second and first.read_bytes() == product.read_bytes()
    assert seen <= {product.stat().st_size}
    assert list((tmp_path / "cache").iterdir()) == [first]


def test_a_failed_build_leaves_nothing(compiler, source, tmp_path):
    compiler(body='echo half > "$target"; exit 1')
    with pytest.raises(RuntimeError):
        native.build(source)
    assert not list((tmp_path / "cache").iterdir())


# The folder


def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(compiler, product, source, monkeypatch, tmp_path):
    compiler(product)
    monkeypatch.setenv("ZOO_CACHE", str(source / "cache"))  # below a file there is no folder, not even for root
    path = native.build(source)
    assert path.read_bytes() == product.read_bytes()
    assert source not in path.parents


@needs_native
def test_the_operator_works_from_a_cache_that_cannot_be_written(compiler, monkeypatch, tmp_path):
    calls = compiler(COMPILED)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "compiler" / "cache"))
    assert quietly() and native.library("deformable_cpu") is not None
    assert quietly() and calls() == 1


def test_by_default_libraries_lie_in_the_cache_of_the_user(compiler, product, source, monkeypatch, tmp_path):
    compiler(product)
    monkeypatch.delenv("ZOO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert native.build(source).parent == tmp_path / "home" / ".cache" / "zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.build(source).parent == tmp_path / "xdg" / "zoo"


@pytest.mark.parametrize("folder", [".", "here"])
def test_a_relative_cache_is_one_of_the_working_folder(compiler, product, source, monkeypatch, tmp_path, folder):
    compiler(product)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_CACHE", folder)
    path = native.build(source)
    assert path.is_absolute() and path.parent == tmp_path / folder
