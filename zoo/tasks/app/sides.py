"""What the panels of the app share: two sides, each with a checkpoint; notes in one line; and inputs as files."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from zoo.tasks.predicting import message

NOTHING = "nothing"  # the name on the second side where it is not used


@dataclass
class Side:
    """One checkpoint: the widgets of its name and of whether it is fused, and the columns of its answers."""

    name: Any
    fused: Any
    columns: list[Any] = field(default_factory=list)


def note(*parts: str) -> str:
    """A line below an answer, as HTML."""
    return f'<p class="note">{html.escape(" · ".join(part for part in parts if part))}</p>'


def fault(error: Exception, path: str = "") -> str:
    """A line in the place of an answer, as HTML."""
    return f'<p class="fault" role="alert">{html.escape(message(error, path))}</p>'


def timing(milliseconds: float, fused: bool) -> str:
    """How long an answer took."""
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{digits}f} ms{' fused' * fused}"


def answered(
    ask: Callable[..., Iterator[tuple[Any, ...]]], blanks: tuple[Any, ...]
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """A handler of the events of one side, with its input first, then the name and whether it is fused.

    It gives what `ask` gives, a note first; only blanks without an input or a name; and a line with what is wrong
    before blanks, where `ask` fails.
    """

    def handle(given: Any, name: str | None, fused: bool, *more: Any) -> Iterator[tuple[Any, ...]]:
        if given is None or name == NOTHING:
            yield "", *blanks
            return
        try:
            yield from ask(given, name, fused, *more)
        except Exception as error:  # a broken file, or a model from elsewhere, may raise anything
            yield fault(error, given if isinstance(given, str) else ""), *blanks

    return handle


def unchanged(widget: Any) -> Any:
    """The widget gives the path of the file that was uploaded, as it is."""
    widget.preprocess = lambda payload: None if payload is None else payload.path
    return widget
