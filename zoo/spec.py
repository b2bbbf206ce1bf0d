"""Words in a config: "pool(size=5)" names a row of a table and its options; `make` builds the row."""

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, get_args, get_origin

from zoo.text import unknown

# One name for all blocks, or a tuple of names that the blocks take in turn. Where a model has stages, the tuple has an
# entry for each stage, and such an entry may again be a tuple of names that the stage's blocks take in turn.
Choice = str | tuple[str | tuple[str, ...], ...]

# The largest value of an option that is an integer; 1,000,000 for others.
LARGEST = {"kernel": 1_000, "layers": 100, "levels": 100, "size": 1_000, "stride": 64, "steps": 1_000, "span": 10_000}
LARGEST |= {"positions": 10_000, "width": 1_000, "bits": 1_000, "features": 10_000, "keys": 100, "relations": 1_000}
LARGEST |= {"rank": 4_096, "head_dim": 4_096, "rotary": 4_096, "experts": 4_096, "anchors": 1_000, "symbols": 10_000}
LARGEST |= {"hidden": 100_000, "latents": 10_000}


@lru_cache(maxsize=4096)
def parse(spec: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Splits "pool(size=5)" into ("pool", (("size", 5),)). Options are literals; nothing is ever evaluated."""
    form = "write a name, or a name with options as in 'pool(size=5)'"
    if len(spec) > 500:
        raise ValueError(f"cannot read {spec[:40]!r}..., which has {len(spec)} characters; {form}")
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"cannot read {spec!r}; {form}") from None
    if isinstance(node, ast.Name):
        return node.id, ()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(f"cannot read {spec!r}; {form}")
    options = []
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in dict(options):
            raise ValueError(f"cannot read {spec!r}; give each option once, as NAME=VALUE")
        try:
            options.append((keyword.arg, ast.literal_eval(keyword.value)))
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"cannot read {spec!r}; {form}; put words in quotes") from None
    return node.func.id, tuple(options)


@lru_cache(maxsize=1024)
def options_of(row: type) -> dict[str, Any]:
    """The options of a row and their defaults: its constructor's keyword-only parameters."""
    parameters = inspect.signature(row).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@lru_cache(maxsize=1024)
def repeatable(row: type) -> frozenset[str]:
    """The options of a row that may also be a tuple of values: those annotated like `int | tuple[int, ...]`."""
    parameters = inspect.signature(row).parameters.values()
    return frozenset(p.name for p in parameters if any(get_origin(each) is tuple for each in get_args(p.annotation)))


def check(table: Mapping[str, type], spec: str, offered: Iterable[str] | None = None) -> dict[str, Any]:
    """All options of the row that spec names, given ones over defaults; ValueError if a name or option is invalid,
    which lists what is `offered`, by default the whole table."""
    name, given = parse(spec)
    if name not in table:
        raise ValueError(unknown("name", name, table if offered is None else offered))
    allowed = options_of(table[name])
    for option, value in given:
        if option not in allowed:
            raise ValueError(unknown(f"option of {name}", option, allowed))
        several = option in repeatable(table[name])
        for each in value if several and isinstance(value, tuple) and value else (value,):
            _check_value(name, option, each, allowed[option], several)
    return allowed | {option: float(value) if isinstance(allowed[option], float) else value for option, value in given}


def _check_value(name: str, option: str, value: Any, default: Any, several: bool) -> None:
    if several and isinstance(default, tuple):
        default = default[0]
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
        wanted = f"a value like {default!r}" + (", or a tuple of them" if several else "")
        raise ValueError(f"option {option} of '{name}' must be {wanted}, got {value!r}")
    if isinstance(default, int | float) and not isinstance(default, bool):
        least, most = 1 if isinstance(default, int) and default > 0 else 0, LARGEST.get(option, 1_000_000)
        if not least <= value < math.inf:
            raise ValueError(f"option {option} of '{name}' must be finite and >= {least}, got {value!r}")
        if value > most and isinstance(default, int):
            raise ValueError(f"option {option} of '{name}' must be <= {most:,}, got {str(value)[:40]}")


def make(table: Mapping[str, type], spec: str, *arguments: Any, field: str = "") -> Any:
    """Builds the row that spec names: make(MIXERS, "pool(size=5)", dim, heads, place). An error begins with the field
    and the spec if the field is given."""
    try:
        return table[parse(spec)[0]](*arguments, **check(table, spec))
    except ValueError as error:
        raise ValueError(f"{field} '{spec}': {error}" if field else str(error)) from None


def respelled(spec: str, name: str | None = None, **options: Any) -> str:
    """A spec with another name, or with some options replaced or added; an option of None is left out."""
    old, given = parse(spec)
    kept = {**dict(given), **options}
    text = ", ".join(f"{option}={value!r}" for option, value in kept.items() if value is not None)
    return f"{name or old}({text})" if text else name or old


def names_of(choice: Choice) -> list[str]:
    """The names in a choice."""
    return [choice] if isinstance(choice, str) else [name for each in choice for name in names_of(each)]


def each_name(choice: Choice, change: Callable[[str], str]) -> Any:
    """The choice with each of its names changed."""
    return change(choice) if isinstance(choice, str) else tuple(each_name(each, change) for each in choice)
