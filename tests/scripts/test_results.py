"""The comparisons in configs/results: their tables are those of their CSVs."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

RESULTS = Path(__file__).parents[2] / "configs/results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.csv"))
LATER = ("seed", "equal", "metric", "value", "n", "parameters", "multiply_adds", "epochs")


def said(values: list[float], sign: str) -> str:
    """The mean with its 95 % interval over seeds, if there are several."""
    half = t.ppf(0.975, len(values) - 1) / np.sqrt(len(values)) * np.std(values, ddof=1) if len(values) > 1 else None
    return f"{np.mean(values):{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_table_has_the_means_and_differences_of_its_csv(folder: Path):
    with open(folder / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["equal"] == "steps"]
    fields = [name for name in rows[0] if name not in LATER]
    cells = defaultdict[tuple[str, ...], dict[str, float]](dict)
    for row in rows:
        cells[tuple(row[name] for name in fields)][row["seed"]] = float(row["value"])
    text = (folder / "README.md").read_text()
    table = text.partition("## At equal steps")[2].partition("\n## ")[0]
    lines = {tuple(re.findall(r"`([^`]+)`", line)): line for line in table.splitlines() if line.startswith("| `")}
    assert lines.keys() == cells.keys() and re.search(rf"--grid '?{fields[0]}=|--choices {fields[0]}\b", text)
    first = next(iter(cells.values()))
    for choice, values in cells.items():
        apart = [values[seed] - first[seed] for seed in first]
        assert f"| {said([*values.values()], '')} |" in lines[choice]
        assert values is first or f"| {said(apart, '+')} |" in lines[choice]
    assert f"[{folder.name}]({folder.name}/README.md)" in (RESULTS / "README.md").read_text()
