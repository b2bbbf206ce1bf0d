"""What the panels of the app share: two sides, each with a checkpoint; notes in one line; and inputs as files."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.tasks.app.shelf import Took
from zoo.tasks.predicting import message

NOTHING = "nothing"  # the name on the second side where it is not used
BUTTONS = ["download", "fullscreen"]  # of an image; without the one that shares it on the web

Rows = Iterator[tuple[Any, ...]]


@dataclass
class Side:
    """One checkpoint: the widgets of its name and of whether it is fused, and the columns of its answers."""

    name: Any
    fused: Any
    second: bool
    columns: list[Any] = field(default_factory=list)

    def column(self, gr: Any, task: str) -> Any:
        """A new column for answers; that of the second side is hidden until it has a checkpoint."""
        self.columns.append(gr.Column(scale=3, visible=not self.second, elem_id=f"{task}_{1 + self.second}"))
        return self.columns[-1]


def note(*parts: str) -> str:
    """A line about an answer, as HTML."""
    text = "\N{NO-BREAK SPACE}· ".join(part for part in parts if part)
    return f'<p class="note">{html.escape(text)}</p>'


def fault(error: Exception, path: str = "") -> str:
    """A line in the place of an answer, as HTML."""
    return f'<p class="fault" role="alert">{html.escape(message(error, path))}</p>'


def timing(took: Took, fused: bool) -> str:
    """How long an answer took, and how that was measured."""
    digits = 2 if took.milliseconds < 10 else 1 if took.milliseconds < 100 else 0
    calls = "one call" if took.calls == 1 else f"fastest of {took.calls} calls"
    how = calls if took.parts == 1 else f"{took.parts} parts, {calls} each"
    return f"{took.milliseconds:,.{digits}f} ms{', fused' * fused} ({how})"


def answered(ask: Callable[..., Rows], blanks: Sequence[Any]) -> Callable[..., Rows]:
    """A handler of the events of one side, whose arguments are the input, the name, whether it is fused, and others.

    It gives what `ask` gives, a note first; blanks alone without an input or a name; and a line that says what is
    wrong, then blanks, where `ask` fails.
    """

    def handle(given: Any, name: str | None, fused: bool, *more: Any) -> Rows:
        if given is None or name == NOTHING:
            yield "", *blanks
            return
        try:
            yield from ask(given, name, fused, *more)
        except Exception as error:  # a broken file, or a model from elsewhere, may raise anything
            yield fault(error, given if isinstance(given, str) else ""), *blanks

    return handle


def asked(
    gr: Any, events: list[Any], side: Side, handle: Callable[..., Rows], inputs: Sequence[Any], outputs: list[Any]
) -> None:
    """Calls a handler at these events, and when the side has another checkpoint; the last of several calls counts.
    `inputs` are the raw input, then what follows the name and whether it is fused."""
    first, *more = inputs
    gr.on(
        [*events, side.name.change, side.fused.change],
        handle,
        [first, side.name, side.fused, *more],
        outputs,
        trigger_mode="always_last",
        concurrency_limit=None,
        show_progress="minimal",
        api_visibility="private",
    )


def unchanged(widget: Any) -> Any:
    """The widget, which now gives its value as it is, and the path of the file that was uploaded. The widget's own
    checks would end in a stack trace."""
    widget.preprocess = lambda payload: getattr(payload, "path", payload)
    return widget


def between(value: float | None, name: str, least: float, most: float) -> float:
    """A number that a user gave; ValueError if it is none, or not between these ends."""
    if value is None or not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {'nothing' if value is None else value}")
    return value
