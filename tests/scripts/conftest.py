"""Modules below scripts/."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")


@pytest.fixture(scope="module")
def scripted() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of scripts/ by its name."""
    sys.path.insert(0, SCRIPTS)
    try:
        yield import_module
    finally:
        sys.path.remove(SCRIPTS)
