"""README and config headers say what is true."""

import re
from pathlib import Path

import pytest
import yaml

import zoo
from zoo.choices import PLACEMENTS
from zoo.models import configure
from zoo.models.base import count_parameters
from zoo.models.presets import conformer, pyramid
from zoo.spec import options_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES = {
    "mixer": zoo.MIXERS,
    "norm": zoo.NORMS,
    "channel": zoo.CHANNELS,
    "position": zoo.POSITIONS,
    "ffn": zoo.FFNS,
    "placement": PLACEMENTS,
}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_tour_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(zoo.MIXERS)
    try:
        exec(compile("\n".join(blocks("python")), "README.md", "exec"), {"__name__": "readme"})
    finally:
        zoo.MIXERS.clear()
        zoo.MIXERS.update(before)


@pytest.mark.parametrize("kind", TABLES)
def test_the_tables_of_choices_are_the_tables_of_the_code(kind):
    table = re.search(rf"^\| {kind} \|.*?\n\|[-|]+\n(.*?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    rows = {}
    for line in table.group(1).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0].strip("`")] = re.findall(r"`(\w+)`", cells[1]) if kind != "placement" else []
    assert set(rows) == set(TABLES[kind])
    if kind != "placement":
        for name, options in rows.items():
            assert options == list(options_of(TABLES[kind][name])), name


def test_the_tables_of_models_are_those_of_the_code():
    import torch

    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) M \|", README, flags=re.MULTILINE))
    assert set(rows) == {*pyramid.PRESETS, *conformer.PRESETS}
    for name, millions in rows.items():
        with torch.device("meta"):
            assert f"{count_parameters(configure(name).build()) / 1e6:.1f}" == millions, name


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\b(?:configs|scripts|zoo)/[\w/.]+\w", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_is_headed(path):
    """A header with the command, and a backbone that builds on the meta device."""
    import torch

    lines = path.read_text().splitlines()
    header = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    task = path.parent.name
    assert any(f"zoo {task} fit --config configs/{task}/{path.name}" in line for line in header)
    for word in ("hardware", "time", "result"):
        assert any(word in line.lower() for line in header), word
    backbone = yaml.safe_load("\n".join(lines))["model"]["backbone"]
    backbone = {"name": "vit_tiny"} | backbone  # finetune.yaml takes its name from a checkpoint
    with torch.device("meta"):
        configure(**backbone).build()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(path):
    """The command line accepts the file: no unknown key, no wrong type."""
    from zoo.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([path.parent.name, "fit", "--config", str(path), "--print_config"])
    assert ended.value.code in (0, None)
