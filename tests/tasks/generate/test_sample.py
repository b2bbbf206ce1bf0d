"""`zoo generate sample` in a folder that an earlier run has used."""

import json
from pathlib import Path

import pytest

from generating import generator
from training import refused
from zoo.__main__ import main
from zoo.tasks.generate.images import listed
from zoo.tasks.generate.sample import split_classes

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


def test_names_of_classes_may_hold_commas():
    names = ["cat", "cat, black", "dog", "a, b, c"]
    assert split_classes("cat, black,dog", names) == ["cat, black", "dog"]
    assert split_classes(" cat ,a, b, c,cat", names) == ["cat", "a, b, c", "cat"]
    for text, bad in (("cat,", "''"), ("", "''"), ("cat, white", "'white'"), ("a, b", "'a'")):
        with pytest.raises(ValueError, match=f"--classes: unknown class {bad}"):
            split_classes(text, names)


def test_too_many_or_too_large_samples(model, tmp_path, monkeypatch):
    arguments = ["generate", "sample", model, "--classes=3", "--steps=1", "--device=cpu", f"--output={tmp_path / 'o'}"]
    assert refused(*arguments, "--each=1000001") == "--each: at most 1,000,000 images at once, got 1,000,001"

    def full(*given: object, **options: object) -> object:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("zoo.tasks.generate.images.sample", full)
    found = refused(*arguments, "--size=6x4", "--each=2")
    assert found == "not enough memory for 2 samples of 6x4 at once; lower the batch or the size"


@pytest.mark.parametrize(("until", "sampler", "steps"), [(False, "heun", 50), (True, "meanflow", 1)])
def test_steps_by_default_are_those_that_fit_the_model(until, sampler, steps, tmp_path):
    name, output = generator(tmp_path / "model", until=until), tmp_path / "out"
    main(["generate", "sample", name, "--classes=3", "--each=1", "--device=cpu", "--output", str(output)])
    record = json.loads((output / "samples.json").read_text())
    assert (record["sampler"], record["steps"]) == (sampler, steps)
