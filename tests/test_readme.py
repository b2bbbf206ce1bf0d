"""README says what is true."""

import re
from pathlib import Path
from typing import Any

import zoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def described(value: Any) -> list[list[int]]:
    """What a comment of the tour says of a value: shapes, or the numbers themselves where they are lengths."""
    if isinstance(value, list):
        return [*described(value[0]), *described(value[-1])]
    return [list(value.shape) if value.is_floating_point() else value.tolist()]


def test_the_tour_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fences = re.findall(r"^\s*```(.+)$", README, flags=re.MULTILINE)
    tour = blocks("python")
    assert set(fences) == {"python", "bash"} and len(tour) == fences.count("python") >= 8
    before, names, compared = dict(zoo.MIXERS), {"__name__": "readme"}, 0
    try:
        for block in tour:
            exec(compile(block, "README.md", "exec"), names)
            for left, said in re.findall(r"^(\w+(?:, \w+)*) = .*# (.*\[\d.*)$", block, flags=re.MULTILINE):
                shapes = [[int(size) for size in shape.split(",")] for shape in re.findall(r"\[([\d, ]+)\]", said)]
                assert shapes == [shape for name in left.split(", ") for shape in described(names[name])], said
                compared += 1
    finally:
        zoo.MIXERS.clear()
        zoo.MIXERS.update(before)
    assert compared >= 3


def test_files_that_the_readme_names_exist():
    paths = re.findall(r"\b(?:configs|scripts|zoo)/[\w/.]+\w", README)
    assert {path.partition("/")[0] for path in paths} == {"configs", "scripts", "zoo"}
    for path in paths:
        assert (ROOT / path).exists(), path
