"""Files that are written aside: in a hidden folder, from which they are renamed into place."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START, END = ".zoo-", ".new"
LOCK, FILES = "lock", "files"


@contextmanager
def aside(place: str | os.PathLike[str]) -> Iterator[Path]:
    """A context that gives an empty folder on the same disk as the folder `place`, hidden below it.

    It is removed at the end. That of a process that was killed is removed by the next one that writes aside in `place`;
    those of living processes are locked, and stay.

    Raises:
        OSError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    place = Path(place)
    _clear(place)
    while True:
        folder = place / f"{START}{secrets.token_hex(4)}{END}"
        folder.mkdir()
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
            (folder / FILES).mkdir()
            break
        except (Timeout, FileNotFoundError, FileExistsError):
            # Another process took it for that of a dead one, before it was locked, and may still remove it.
            lock.release()
        except BaseException:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            raise
    try:
        yield folder / FILES
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _clear(place: Path) -> None:
    """Removes the folders that no living process has locked."""
    from filelock import FileLock

    with os.scandir(place) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(START) and entry.name.endswith(END)]
    for folder in found:
        if os.path.islink(folder):
            continue
        with suppress(OSError), FileLock(Path(folder, LOCK)).acquire(blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
