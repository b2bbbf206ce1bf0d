"""Messages in one line."""

import difflib
from collections.abc import Iterable


def one_line(value: object, most: int = 300) -> str:
    """What an error or any other value says, in one line of at most `most` characters."""
    return " ".join((str(value) or type(value).__name__).split())[:most]


def reason(error: object) -> str:
    """Why something failed, in one line: of an operating system's error the reason alone, without the path."""
    return one_line(getattr(error, "strerror", None) or error)


def near(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """At most three of the allowed names that look like this one, the nearest first."""
    return difflib.get_close_matches(name, [*allowed], n=3, cutoff=cutoff)


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """That a name is unknown, which are near, and which are allowed, where these are few or none is near."""
    allowed = [*allowed]
    found = near(name, allowed)
    hints = [f"did you mean {' or '.join(found)}?"] if found else []
    if not found or len(allowed) <= 20:
        hints.append(f"choose from: {', '.join(allowed) or 'none'}")
    return f"unknown {what} '{name}'; {' '.join(hints)}"
