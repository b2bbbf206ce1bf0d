"""The text of a recording, as it comes."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.tasks import predicting as files
from zoo.tasks.app.shelf import Shelf
from zoo.tasks.app.sides import Side, answered, asked, note, timing, unchanged

LONGEST = 30.0  # seconds of a part, as in `zoo transcribe predict`


@dataclass
class Heard:
    """What was recognised so far: text, words with times (none from a streaming model or a transducer), the seconds of
    sound, and the milliseconds that the model took."""

    text: str
    words: list[dict[str, Any]]
    seconds: float
    milliseconds: float
    streamed: bool = False


def ask(shelf: Shelf, path: str, name: str, fused: bool) -> Iterator[Heard]:
    """The text of a recording, as it comes: word by word from a streaming model, as `zoo transcribe stream` prints it,
    else part by part, as `zoo transcribe predict` writes it."""
    model, preprocess, tokenizer = files.recogniser(shelf.take("transcribe", name, fused), name)
    config: Any = model.config
    if config.chunk is not None:
        yield from streamed(shelf, path, model, preprocess, tokenizer)
        return
    from zoo.tasks.transcribe import transcripts

    decode = transcripts.decoder(argparse.Namespace(decode="greedy", name=name), model, tokenizer)
    transcribe = transcripts.Transcriber(model, preprocess, tokenizer, decode, "32")
    parts: list[transcripts.Part] = []
    spent = 0.0
    for part in transcripts.parts_of(path, transcribe, LONGEST):
        parts.append(part)
        if part.features is not None:
            features = part.features

            def again(part: Any = part, features: Any = features) -> None:
                part.features, part.words, part.text, part.error = features, [], "", None
                transcribe([part])

            _, milliseconds = shelf.timed(again)
            spent += milliseconds
        if part.error is not None:
            raise part.error
        found = transcripts.together(parts, decode is not None)
        yield Heard(found["text"], found["words"] or [], found["seconds"], spent)


def streamed(shelf: Shelf, path: str, model: Any, preprocess: Any, tokenizer: Any) -> Iterator[Heard]:
    """The text of a recording from a streaming model, at each new word."""
    from zoo.tasks.transcribe import listener as sound

    rate = sound.rate_of(path)
    listener = sound.Listener(model, preprocess, tokenizer, rate=rate)
    text, samples, spent = "", 0, 0.0
    for block in sound.recorded(path):
        samples += len(block)
        said, milliseconds = shelf.timed(lambda block=block: listener.push(block), repeat=False)
        text, spent = text + said, spent + milliseconds
        if said:
            yield Heard(text, [], samples / rate, spent, True)
    said, milliseconds = shelf.timed(listener.finish, repeat=False)
    yield Heard(text + said, [], samples / rate, spent + milliseconds, True)


def placed(words: list[dict[str, Any]]) -> str:
    """Words with their times, as HTML."""
    each = "<li>{}<small>{:.2f} s</small></li>"
    rows = "".join(each.format(html.escape(word["text"]), word["start"]) for word in words)
    return f'<ol class="words">{rows}</ol>' if rows else ""


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""

    def handle(path: str, name: str, fused: bool) -> Iterator[tuple[Any, ...]]:
        for heard in ask(shelf, path, name, fused):
            lasts = f"{heard.seconds:.1f} s of sound"
            empty = "" if heard.text else "no words"
            told = note(name, timing(heard.milliseconds, fused), lasts, empty)
            yield told, heard.text, placed(heard.words)

    with gr.Row():
        with gr.Column():
            audio = gr.Audio(
                label="Recording",
                type="filepath",
                sources=["upload", "microphone"],
                editable=False,
                buttons=["download"],
                elem_id="transcribe_input",
            )
        for side in sides:
            with side.column(gr):
                told = gr.HTML()
                text = gr.Textbox(label="Text", lines=3, interactive=False, buttons=["copy"])
                words = gr.HTML()
            asked(gr, [audio.change], side, answered(handle, ("", "")), [unchanged(audio)], [told, text, words])
