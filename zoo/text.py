"""Messages in one line, and JSON."""

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any


def one_line(value: object, most: int = 300) -> str:
    """The text of an error or any other value, in one printable line of at most `most` characters."""
    return plain(" ".join((str(value) or type(value).__name__).split())[:most])


def plain(text: str) -> str:
    """Escapes what is not printable: names may hold line breaks or a terminal's commands."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def readable(value: Any, between: str = ", ") -> str:
    """A field's value in readable form: stages are separated by commas, choices in turn by slashes."""
    if isinstance(value, tuple):
        return between.join(readable(each, " / ") for each in value) or "none"
    return str(value) or "none"


def reason(error: object) -> str:
    """Why something failed, in one line: for an error of the operating system only the reason, without the path."""
    return one_line(getattr(error, "strerror", None) or error)


def from_json(text: str | bytes, finite: bool = False) -> Any:
    """The value of a JSON text; ValueError if it is invalid or has a key twice, or with `finite` NaN or infinity."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {key!r} appears twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"the number {digits[:40]} is too large")
        return value

    strict: Any = {"parse_constant": constant, "parse_float": number} if finite else {}
    return json.loads(text, object_pairs_hook=mapping, **strict)


def near(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """At most three of the allowed names that look like this one, the nearest first."""
    return difflib.get_close_matches(name, [*allowed], n=3, cutoff=cutoff)


def listed(names: Iterable[str], most: int = 15) -> str:
    """The names with commas; of more than `most`, the first of them and the number of the others."""
    names = [*names]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and a noun in its singular or plural, by default with an s: 1 image, 2 images."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """A message that a name is unknown, with similar names, and with all allowed ones if few or none is similar."""
    allowed = [*allowed]
    found = near(name, allowed)
    hints = [f"did you mean {' or '.join(found)}?"] if found else []
    if not found or len(allowed) <= 20:
        hints.append(f"choose from: {', '.join(allowed) or 'none'}")
    return f"unknown {what} '{one_line(name, 100) if name else name}'; {' '.join(hints)}"
