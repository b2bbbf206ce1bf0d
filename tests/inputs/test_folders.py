import os
from pathlib import Path

import pytest

from zoo.inputs.audio import read_audio
from zoo.inputs.folders import files_below
from zoo.inputs.images import read_image


def find(top: Path) -> tuple[list[str], list[str]]:
    """Files and omitted links, relative to the folder."""
    found, omitted = files_below(top, lambda name: name.endswith(".png"))
    files = [os.path.join(folder, name) for folder, names in found.items() for name in names]
    assert all(os.path.exists(file) for file in files) and len({os.path.realpath(file) for file in files}) == len(files)
    return [os.path.relpath(file, top) for file in files], [os.path.relpath(link, top) for link in omitted]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name in ("b/1.png", "a/deep/2.png", "a-b/3.png", ".hidden/4.png", "a/.5.png", "a/notes.txt", "0.png"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    return tmp_path / "top"


FILES = ["0.png", "a/deep/2.png", "a-b/3.png", "b/1.png"]


def test_files_in_order_without_hidden_ones(top: Path):
    os.mkfifo(top / "pipe.png")
    (top / "folder.png").mkdir()
    assert find(top) == (FILES, [])
    assert find(top / ".hidden") == (["4.png"], [])


def test_links_in_circles_and_to_what_is_there_add_nothing(top: Path):
    links = {"a/up": "..", "a/self": ".", "b/a": "../a", "a/far": "../../..", "b/root": "/", "b/same.png": "1.png"}
    links |= {"b/other.png": "../a/deep/2.png", "b/absolute": str(top / "a/deep"), "b/above": str(top.parent)}
    for link, target in links.items():
        (top / link).symlink_to(target)
    (top / "a/broken.png").symlink_to("nowhere.png")
    (top / "a/loop.png").symlink_to("loop.png")
    assert find(top) == (FILES, sorted(links))


def test_links_to_other_places_are_followed_once(top: Path):
    for name in ("pool/x/6.png", "pool/7.png", "lone/8.png"):
        (top.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (top.parent / name).touch()
    (top.parent / "pool/back").symlink_to(top)
    (top.parent / "pool/x/circle").symlink_to("..")
    (top / "a/pool").symlink_to("../../pool")
    (top / "b/pool").symlink_to("../../pool")
    (top / "b/x").symlink_to("../../pool/x")
    (top / "b/8.png").symlink_to("../../lone/8.png")
    (top / "b/again.png").symlink_to("../../lone/8.png")
    (top / "b/hidden.png").symlink_to("../.hidden/4.png")
    files, omitted = find(top)
    more = ["a/pool/7.png", "a/pool/x/6.png", "b/8.png", "b/hidden.png"]
    assert sorted(files) == sorted([*FILES, *more])
    assert omitted == ["a/pool/back", "a/pool/x/circle", "b/again.png", "b/pool", "b/x"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        find(tmp_path / "nowhere")


def test_pipes_and_devices_are_never_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        for read in (read_image, read_audio):
            with pytest.raises(ValueError, match=f"^{path}: not a regular file$"):
                read(path)
