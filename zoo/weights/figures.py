"""Figures of a checkpoint: what was measured, on which data, on how many samples, and by which command."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from zoo.text import one_line


class Figure(TypedDict):
    """A measured value, as config.json holds it.

    `n` is the number of samples; `interval` is the 95 % interval, None if it was not computed; `command` measures it
    again.
    """

    data: str
    split: str
    metric: str
    value: float
    n: int
    interval: list[float] | None
    command: str


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def checked_figures(given: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """Figures with values of the right types; ValueError, in one line, otherwise."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"figures must be a list, got {type(given).__name__}")
    return [_checked(each, f"figures[{index}]") for index, each in enumerate(given)]


def _checked(given: Mapping[str, Any], where: str) -> Figure:
    allowed = [*Figure.__annotations__]
    if not isinstance(given, Mapping) or {*given} != {*allowed}:
        found = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"{where} must have the fields {', '.join(allowed)}, got {one_line(found)}")
    for name in ("data", "split", "metric", "command"):
        if not isinstance(given[name], str):
            raise ValueError(f"{where}: {name} must be a string, got {type(given[name]).__name__}")
    if not _number(given["value"]):
        raise ValueError(f"{where}: value must be a finite number, got {one_line(given['value'], 40)}")
    if type(given["n"]) is not int or given["n"] < 0:
        raise ValueError(f"{where}: n must be an integer >= 0, got {one_line(given['n'], 40)}")
    interval = given["interval"]
    if interval is not None:
        if not isinstance(interval, list | tuple) or len(interval) != 2 or not all(map(_number, interval)):
            raise ValueError(f"{where}: interval must be two finite numbers or null, got {one_line(interval, 40)}")
        interval = [float(each) for each in interval]
    return Figure(**{**given, "value": float(given["value"]), "interval": interval})  # pyright: ignore
