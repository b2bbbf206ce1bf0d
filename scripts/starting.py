"""Starts a script of this folder with the Python that zoo is installed in: this one, or that of .venv."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv"


def imported(name: str) -> Any:
    """A module; if it or what it needs is missing here, the script starts again in .venv, or ends with one line."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        python, script = ENVIRONMENT / "bin" / "python", Path(sys.argv[0])
        if python.exists() and Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
            os.execv(python, [str(python), *sys.argv])
        sys.exit(f"scripts/{script.name}: {error}; run it with the Python that zoo is installed in")
