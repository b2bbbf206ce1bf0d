"""`zoo generate sample` in a folder that an earlier run has used."""

import json
from pathlib import Path

import pytest

from generating import generator
from zoo.__main__ import main
from zoo.tasks.generate.images import listed

FILES = {"grid.png", "samples.json", "samples.npz"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return generator(tmp_path_factory.mktemp("generator") / "model")


def sample(model: str, output: Path, each: int) -> set[str]:
    flags = ["--classes=3", f"--each={each}", "--steps=1", "--sampler=euler", "--device=cpu"]
    main(["generate", "sample", model, *flags, "--output", str(output)])
    return {path.name for path in output.iterdir()}


def test_a_smaller_run_removes_the_images_of_a_larger_one(model, tmp_path):
    assert sample(model, tmp_path, 3) == FILES | {"00000.png", "00001.png", "00002.png"}
    (tmp_path / "00009.png").write_text("foreign")
    (tmp_path / "notes.txt").write_text("foreign")
    assert sample(model, tmp_path, 1) == FILES | {"00000.png", "00009.png", "notes.txt"}
    assert (tmp_path / "00009.png").read_text() == "foreign"


@pytest.mark.parametrize("files", [["../00007.png"], ["keep.png"], [3], [None], "ab", ["00007.png/.."]])
def test_only_images_of_a_run_are_removed(model, tmp_path, files):
    output = tmp_path / "out"
    output.mkdir()
    foreign = [tmp_path / "00007.png", output / "keep.png"]
    for path in foreign:
        path.write_text("foreign")
    (output / "samples.json").write_text(json.dumps({"samples": [{"file": file} for file in files]}))
    assert sample(model, output, 1) == FILES | {"00000.png", "keep.png"}
    assert all(path.read_text() == "foreign" for path in foreign)


@pytest.mark.parametrize("text", ["", "[]", '{"samples": 3}', '{"samples": [3]}', '{"samples": {"file": 1}}', "\xff"])
def test_a_record_that_cannot_be_read_lists_nothing(text, tmp_path):
    assert listed(tmp_path / "missing.json") == set()
    (tmp_path / "samples.json").write_text(text, encoding="latin-1")
    assert listed(tmp_path / "samples.json") == set()
