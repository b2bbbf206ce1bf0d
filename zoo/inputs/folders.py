"""Finds the files below a folder, each real file once, and checks that a path is a regular file."""

import errno
import os
import stat
from collections.abc import Callable


def files_below(top: str | os.PathLike[str], fits: Callable[[str], bool]) -> tuple[dict[str, list[str]], list[str]]:
    """Finds the files below a folder whose names fit; hidden files and folders are skipped.

    Links are followed, but each real folder and file is listed once, by its own path if that is below `top`. A link
    to one that is already listed, or to a folder above, is omitted.

    Args:
        top: the folder.
        fits: whether to list a file of this name.

    Returns:
        The names by folder, all sorted, folders without such a file included; and the paths of omitted links.

    Raises:
        OSError: a folder cannot be read.
    """
    top = os.fspath(top)
    home = os.path.realpath(top)
    found: dict[str, list[str]] = {}
    seen: set[str] = set()  # real folders, then the files that links lead to
    to_folders: list[str] = []
    to_files: list[str] = []

    def descend(folder: str, real: str) -> None:
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            if real in seen:
                continue
            seen.add(real)
            names = found[folder] = []
            inside: list[tuple[str, str]] = []
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink():
                        (to_folders if os.path.isdir(entry.path) else to_files).append(entry.path)
                    elif entry.is_dir():
                        inside.append((entry.path, os.path.join(real, entry.name)))
                    elif entry.is_file() and fits(entry.name):  # no pipes or devices
                        names.append(entry.name)
            waiting.extend(reversed(inside))

    descend(top, home)
    omitted: list[str] = []
    for link in to_folders:  # grows while links are followed
        real = os.path.realpath(link)
        if real in seen or leads_above(link, home):
            omitted.append(link)
        else:
            descend(link, real)
    for link in to_files:
        folder, name = os.path.split(link)
        real = os.path.realpath(link)
        place, target = os.path.split(real)
        if not fits(name) or not os.path.isfile(link):
            continue
        if real in seen or (place in seen and fits(target) and not target.startswith(".")):
            omitted.append(link)
        else:
            seen.add(real)
            found[folder].append(name)
    ordered = sorted(found, key=lambda folder: folder.split(os.sep))
    return {folder: sorted(found[folder]) for folder in ordered}, sorted(omitted)


def leads_above(path: str, top: str) -> bool:
    """Whether a path leads to `top`, which is a real path, or to a folder above it."""
    return os.path.join(top, "").startswith(os.path.join(os.path.realpath(path), ""))


def check_regular(path: str) -> None:
    """OSError if a path is a pipe or a device, which may never end; or where it does not exist."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file")
