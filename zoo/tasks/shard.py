"""`zoo shard`: packs a data set into tars that `data.dataset=shards` and WebDataset read."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from zoo.text import counted, one_line

MOST = 10**18  # bytes of a tar: offsets are int64
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="zoo shard",
        usage="zoo shard FOLDER OUT [--size 256MB] [--split NAME ...]\n       zoo shard --check OUT",
        description="Packs the files of a data set into tars, unchanged, with an index. Train on them with\n"
        "--data.dataset=shards --data.root=OUT; WebDataset reads them, too. Run it again to continue.",
        epilog="FOLDER is an image folder (train/CLASS/*), has a COCO, YOLO or Pascal VOC format, or holds\n"
        "LibriSpeech's folders or NeMo's manifests.\n\n"
        "example:\n  zoo shard imagenet/ imagenet_shards/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("folder", nargs="?", metavar="FOLDER", help="the data set")
    made.add_argument("out", nargs="?", metavar="OUT", help="a new folder for the tars")
    made.add_argument("--size", metavar="SIZE", default="256MB", help="most bytes of a tar, such as 256MB or 1GB")
    made.add_argument("--split", nargs="+", metavar="NAME", help="splits to pack; all, if not given")
    made.add_argument("--check", metavar="OUT", help="compare the tars with the hashes of their index")
    return made


def size_of(text: str) -> int:
    """Bytes, from a number and a unit; ValueError if it is not one."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?(B|KB|MB|GB)", text.upper())
    if found is None or not 0 < (size := int(float(found[1]) * UNITS[found[2]])) <= MOST:
        raise ValueError(f"--size must be a number with B, KB, MB or GB, as in 256MB, got {one_line(repr(text), 60)}")
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    """Packs or checks as given by the arguments. ValueError or OSError of one line otherwise."""
    made = parser()
    given = made.parse_args(arguments)
    if given.check is not None:
        if given.folder is not None:
            made.error("--check takes one folder, that of the shards")
        return check(Path(given.check).expanduser())
    if given.folder is None or given.out is None:
        made.error("FOLDER and OUT are needed")
    from zoo.data.layouts import layout
    from zoo.data.packing import described, pack

    size = size_of(given.size)
    folder, output = Path(given.folder).expanduser(), Path(given.out).expanduser()
    if output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output} is inside {folder}; choose an OUT beside it")
    found = layout(folder, given.split)
    splits = ["--split", *given.split] if given.split else []
    command = shlex.join(["zoo", "shard", given.folder, given.out, "--size", given.size, *splits])
    index = pack(output, found, size, command)
    print(f"{output} holds {described(index)}")


def check(folder: Path) -> None:
    """Compares finished shards with their hashes; ValueError names those that differ."""
    from zoo.data.packing import described, faults
    from zoo.data.shards import read_index

    index = read_index(str(folder))
    if found := [*faults(folder)]:
        raise ValueError(f"{counted(len(found), 'file')} of {folder} differ from the index: {'; '.join(found)}")
    print(f"{folder} is as it was packed; {described(index)}")
