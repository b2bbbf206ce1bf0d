"""The text of a recording, as it comes."""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from zoo.inputs.audio.features import LONGEST
from zoo.tasks import predicting as files
from zoo.tasks.app.shelf import Shelf, Took
from zoo.tasks.app.sides import Side, answered, asked, fault, note, timing, unchanged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heard:
    """What was recognised so far: text, words with times (none from a streaming model or a transducer), the seconds of
    sound, and how long the model took; None if it heard only silence."""

    text: str
    words: list[dict[str, Any]]
    seconds: float
    took: Took | None


def ask(shelf: Shelf, path: str, name: str, fused: bool) -> Iterator[Heard]:
    """The text of a recording, as it comes: word by word from a streaming model, as `zoo transcribe stream` prints it,
    else part by part, as `zoo transcribe predict` writes it."""
    model, preprocess, tokenizer = files.recogniser(shelf.take("transcribe", name, fused), name)
    config: Any = model.config
    if config.chunk is not None:
        yield from streamed(shelf, path, name, fused)
        return
    from zoo.tasks.transcribe import transcripts

    decode = transcripts.decoder(argparse.Namespace(decode="greedy", name=name), model, tokenizer)
    transcribe = transcripts.Transcriber(model, preprocess, tokenizer, decode, "32")
    parts: list[transcripts.Part] = []
    took: Took | None = None
    for part in transcripts.parts_of(path, transcribe, LONGEST):
        if part.features is not None:
            part, more = shelf.timed(partial(fresh, part, transcribe))
            took = more if took is None else took + more
        if part.error is not None:
            raise part.error
        parts.append(part)
        found = transcripts.together(parts, decode is not None)
        yield Heard(found["text"], found["words"] or [], found["seconds"], took)


def fresh(part: Any, transcribe: Any) -> Any:
    """A copy of a part, transcribed."""
    made = replace(part, words=[])
    transcribe([made])
    return made


class Stream:
    """The text that a streaming model recognises while audio of one sample rate arrives; ValueError if the model does
    not stream."""

    def __init__(self, shelf: Shelf, name: str, fused: bool, rate: int) -> None:
        from zoo.tasks.transcribe.listener import Listener

        parts = files.recogniser(shelf.take("transcribe", name, fused), name)
        try:
            self.listener = Listener(*parts, rate=rate)
        except ValueError as error:
            raise ValueError(f"{name} cannot stream: {error}") from None
        self.shelf, self.rate, self.asked = shelf, rate, (name, fused)
        self.heard = Heard("", [], 0.0, None)

    def push(self, samples: Tensor) -> Heard:
        """The result so far, after the next samples [n]."""
        return self._add(partial(self.listener.push, samples), len(samples))

    def finish(self) -> Heard:
        """The final result; the stream is then finished."""
        return self._add(self.listener.finish, 0)

    def _add(self, call: Callable[[], str], samples: int) -> Heard:
        said, took = self.shelf.timed(call, repeat=False)
        before = self.heard
        took = took if before.took is None else before.took + took
        self.heard = Heard(before.text + said, [], before.seconds + samples / self.rate, took)
        return self.heard


def streamed(shelf: Shelf, path: str, name: str, fused: bool) -> Iterator[Heard]:
    """The text that a streaming model recognises in a file, after each new word."""
    from zoo.tasks.transcribe.listener import rate_of, recorded

    stream = Stream(shelf, name, fused, rate_of(path))
    before = ""
    for block in recorded(path):
        heard = stream.push(block)
        if heard.text != before:
            yield heard
        before = heard.text
    yield stream.finish()


def hear(shelf: Shelf, stream: Stream | None, path: str, name: str, fused: bool) -> Stream:
    """The stream after the next piece of sound, which is a file; a new one if there is none, or it is of another
    model."""
    from zoo.inputs.audio import read_audio
    from zoo.tasks.transcribe.listener import rate_of

    if stream is None or stream.asked != (name, fused):
        stream = Stream(shelf, name, fused, rate_of(path))
    stream.push(read_audio(path, stream.rate))
    return stream


def placed(words: list[dict[str, Any]]) -> str:
    """Words with their times, as HTML."""
    each = "<li>{}<small>{:.2f} s</small></li>"
    rows = "".join(each.format(html.escape(word["text"]), word["start"]) for word in words)
    return f'<ol class="words">{rows}</ol>' if rows else ""


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""

    def row(heard: Heard, name: str, fused: bool) -> tuple[Any, ...]:
        took = "silence" if heard.took is None else timing(heard.took, fused)
        told = note(name, took, f"{heard.seconds:.1f} s of sound", "" if heard.text else "no words")
        return told, heard.text, placed(heard.words)

    def handle(path: str, name: str, fused: bool) -> Iterator[tuple[Any, ...]]:
        for heard in ask(shelf, path, name, fused):
            yield row(heard, name, fused)

    def listen(path: str, name: str, fused: bool, stream: Stream | None) -> Iterator[tuple[Any, ...]]:
        stream = hear(shelf, stream, path, name, fused)
        yield *row(stream.heard, name, fused), stream

    def finish(stream: Stream | None) -> tuple[Any, ...]:
        try:
            return (*(row(stream.finish(), *stream.asked) if stream else [gr.skip()] * 3), None)
        except Exception as error:  # as in `answered`
            return fault(error), "", "", None

    with gr.Row():
        with gr.Column(scale=2):
            widgets: dict[str, Any] = {"type": "filepath", "editable": False, "buttons": ["download"]}
            sources = ["upload", "microphone"]
            audio = gr.Audio(label="Recording", sources=sources, elem_id="transcribe_input", **widgets)
            with gr.Accordion("Live, with a streaming checkpoint", open=False, elem_id="transcribe_live"):
                live = gr.Audio(label="Microphone", sources=["microphone"], streaming=True, **widgets)
        for side in sides:
            with side.column(gr, "transcribe"):
                told = gr.HTML()
                text = gr.Textbox(label="Text", lines=3, interactive=False, buttons=["copy"])
                words = gr.HTML()
                stream = gr.State()
            asked(gr, [audio.change], side, answered(handle, ("", "")), [unchanged(audio)], [told, text, words])
            private: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
            private["api_visibility"] = "private"
            live.stream(
                answered(listen, ("", "", None)),
                [unchanged(live), side.name, side.fused, stream],
                [told, text, words, stream],
                stream_every=0.5,
                **private,
            )
            live.stop_recording(finish, stream, [told, text, words, stream], **private)
