"""What a sweep found: a table of means and differences over seeds, as Markdown, CSV and an image."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sweeps.cells import COST, STEPS, Cell, Result

Found = Mapping[Cell, Result]
FEW = 12  # rows that a panel can name beside its points
TITLES = {STEPS: "at equal steps", COST: "at equal multiply-adds"}


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval (Student's t), NaN for one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".4f"
        return format(self.mean, spec) + ("" if math.isnan(self.half) else f" ± {format(self.half, spec)}")


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values that vary as a normal distribution does, with its interval."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Estimate(mean, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values)))


class Row(NamedTuple):
    """One combination of choices: its cells, its mean, and the mean difference to the first, seed by seed."""

    choices: tuple[tuple[str, str], ...]
    result: Result
    seeds: int
    value: Estimate
    difference: Estimate | None  # None for the first


def rows_of(found: Found, equal: str) -> list[Row]:
    """A row for each combination that has a result, in the order of the cells."""
    by_choices: dict[tuple[tuple[str, str], ...], dict[int, Result]] = {}
    for cell, result in found.items():
        if cell.equal == equal:
            by_choices.setdefault(cell.choices, {})[cell.seed] = result
    rows, first = list[Row](), next(iter(by_choices.values()), {})
    for choices, results in by_choices.items():
        paired = [results[seed].value - first[seed].value for seed in results if seed in first]
        difference = estimate(paired) if rows and paired else None
        value = estimate([result.value for result in results.values()])
        rows.append(Row(choices, next(iter(results.values())), len(results), value, difference))
    return rows


def markdown(found: Found, title: str, command: str) -> str:
    """The tables of a sweep."""
    lines = [f"# {title}", "", f"Made by `{command}`. The score of the last epoch on validation data; ± is the half"]
    lines += ["width of a 95 % interval over seeds. The difference to the first row pairs equal seeds.", ""]
    lines += ["![The scores of the table](results.png)", ""]
    for equal, heading in TITLES.items():
        if not (rows := rows_of(found, equal)):
            continue
        fields = [field for field, _ in rows[0].choices]
        metric, n = rows[0].result.metric, rows[0].result.n
        head = [*fields, "parameters", "multiply-adds", "epochs", "seeds", metric, "difference"]
        lines += [f"## {heading.capitalize()} (n = {n:,})", "", _line(head), _line(["---"] * len(head))]
        for row in rows:
            choices = [f"`{value}`" for _, value in row.choices]
            sizes = [f"{row.result.parameters:,}", f"{row.result.multiply_adds:,}", row.result.epochs, row.seeds]
            lines.append(_line([*choices, *sizes, row.value, "" if row.difference is None else signed(row.difference)]))
        lines.append("")
    return "\n".join(lines)


def signed(difference: Estimate) -> str:
    return ("+" if difference.mean >= 0 else "") + str(difference)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def table(found: Found) -> str:
    """A line of CSV for each cell."""
    text = io.StringIO()
    fields = [field for field, _ in next(iter(found)).choices]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fields, "seed", "equal", *Result._fields])
    for cell, result in found.items():
        writer.writerow([*(value for _, value in cell.choices), cell.seed, cell.equal, *result])
    return text.getvalue()


def draw(found: Found, title: str, path: Path) -> None:
    """The means with their intervals, a panel for each comparison: over multiply-adds, or for more than `FEW` rows
    below each other, from the smallest to the largest, with long intervals cut at the edges."""
    from matplotlib.figure import Figure

    shown = {equal: rows for equal in TITLES if (rows := rows_of(found, equal))}
    many, metric = max(map(len, shown.values())) > FEW, next(iter(found.values())).metric
    height = 1.2 + 0.19 * max(map(len, shown.values())) if many else 4.4
    figure = Figure(figsize=(6.4 * len(shown), height), dpi=120, layout="constrained")
    for axes, (equal, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        labels = [", ".join(value for _, value in row.choices) for row in rows]
        halves = [0.0 if math.isnan(row.value.half) else row.value.half for row in rows]
        if many:
            order = sorted(range(len(rows)), key=lambda at: rows[at].value.mean)
            for place, at in enumerate(order):
                axes.errorbar(
                    rows[at].value.mean, place, xerr=halves[at], fmt="o", ms=4, capsize=2, color=f"C{at == 0:d}"
                )
            axes.axvline(rows[0].value.mean, color="C1", lw=0.8, label=f"{labels[0]}, the first")
            axes.set_yticks(range(len(rows)), [labels[at] for at in order], fontsize=7)
            means = [row.value.mean for row in rows]
            margin = 0.1 * (max(means) - min(means)) or 0.1
            axes.set(xlabel=metric, ylim=(-1, len(rows)), xlim=(min(means) - margin, max(means) + margin))
        else:
            for row, half, label in zip(rows, halves, labels, strict=True):
                axes.errorbar(row.result.multiply_adds / 1e6, row.value.mean, half, fmt="o", capsize=4, label=label)
            axes.set(xlabel="million multiply-adds for one input", ylabel=metric)
        axes.set_title(f"{title} {TITLES[equal]}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)
