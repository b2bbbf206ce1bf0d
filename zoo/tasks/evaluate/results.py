"""A table of figures that grows: `--output results.csv`."""

import csv
import errno
import fcntl
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.text import one_line, reason

COLUMNS = ("name", "task", "data", "split", "metric", "value", "n", "low", "high", "seconds", "device", "precision")


def check_table(path: Path) -> None:
    """ValueError if the file is another table or cannot be written; a missing file is fine if its folder exists."""
    if path.exists():
        with _opened(path) as file:
            file.seek(0)
            _check_header(path, file.readline())
    elif not path.parent.is_dir():
        raise ValueError(f"--output: {path.parent} is not a folder")


def add_rows(path: Path, result: Mapping[str, Any]) -> None:
    """Adds a row for each figure of a result, in one write; first the header if the file is new or empty.

    Raises:
        ValueError: the file has other columns, or cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    with _opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation may add its own
        file.seek(0)
        if first := file.readline():
            _check_header(path, first)
            file.seek(-1, os.SEEK_END)
            text.write("" if file.read(1) == b"\n" else "\n")
        else:
            table.writerow(COLUMNS)
        for figure in result["figures"]:
            low, high = figure["interval"] or ("", "")
            values = {**result, **figure, "low": low, "high": high}
            table.writerow([values[column] for column in COLUMNS])
        content, before = text.getvalue().encode(errors="backslashreplace"), file.seek(0, os.SEEK_END)
        try:
            if os.write(file.fileno(), content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(before)  # a disk that became full keeps a part of a row
            raise ValueError(f"cannot write to {path}: {reason(error)}") from error


def _opened(path: Path) -> Any:
    try:
        return open(path, "a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {reason(error)}") from error


def _check_header(path: Path, line: bytes) -> None:
    found = line.decode(errors="replace").strip()
    if found and found != ",".join(COLUMNS):
        raise ValueError(f"--output: {path} has other columns ({one_line(found, 100)}); give a new file")
