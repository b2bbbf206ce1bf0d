"""The listener behind the command that streams: text and times in pieces of any size, memory, and what it refuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from listening import HEADS, LETTERS, PIECES, PREPROCESS, TINY, sound, spelt, talkative, tokens_of
from training import difference
from zoo.outputs.tokens import Tokenizer
from zoo.outputs.transducer import transducer_search
from zoo.tasks.transcribe.listener import Listener
from zoo.weights import load_checkpoint


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tokenizer", [LETTERS, PIECES], ids=["characters", "pieces"])
def test_listener_in_pieces_of_any_size(tokenizer: Tokenizer, kind: str):
    model, waveform = talkative(tokenizer, kind), sound(2.0)
    wanted = spelt(tokenizer, tokens_of(model, waveform)[0])
    generator = torch.Generator().manual_seed(0)
    for most in (400, 4000, 50_000):
        listener, said, start = Listener(model, PREPROCESS, tokenizer), [], 0
        while start < len(waveform):
            end = start + int(torch.randint(most, (), generator=generator))
            said.append(listener.push(waveform[start:end]))
            start = end
        rest = listener.finish()
        assert "".join(said) + rest == wanted
        assert most > 400 or sum(map(bool, said)) > 5 and len(rest) < len(wanted) // 2
    with pytest.raises(ValueError, match="stream has ended"):
        listener.push(waveform)


def test_memory_does_not_grow():
    listener, sizes = Listener(talkative(LETTERS, "ctc"), PREPROCESS, LETTERS, rate=44100), set()
    for piece in sound(6.0).split(500):
        listener.push(piece)
        assert listener.resample.waiting.numel() + listener.features.waiting.numel() < 3000
        assert listener.stream.waiting.shape[1] < 16 and not listener.pending
        sizes.add(sum(value.numel() for value in listener.stream.cache.values()))
    assert len(sizes) == 1


def test_times_of_a_transducer(capsys: pytest.CaptureFixture[str]):
    listener = Listener(talkative(LETTERS, "transducer"), PREPROCESS, LETTERS, times=True)
    said = "".join(map(listener.push, sound().split(777))) + listener.finish()
    made, lengths = listener.model(PREPROCESS(sound())[None])
    (found,), _ = transducer_search(listener.model.head, made, lengths, listener.model.head.start(1))
    wanted: list[str] = []
    space = True
    for letter, frame in ((LETTERS.pieces[token], frame) for token, frame in found):
        if letter != " ":
            wanted += [f"{frame * 0.04:8.2f}  {letter}"] if space else [wanted.pop() + letter]
        space = letter == " "
    assert said.splitlines() == wanted and len(wanted) > 5


class Bytes(Tokenizer):
    """Letters, a space, the bytes of others, as sentencepiece's byte fallback has them, and a piece between spaces."""

    values = (b"a", b"b", b" ", *(bytes([each]) for each in "€é".encode()), b" x y ")
    pieces = tuple(map(repr, values))

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(" x y ")
        ids = [self.values.index(bytes([each])) for each in first.encode()]
        return ids + [self.blank - 1, *self.encode(" x y ".join(rest))] if rest else ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.values[id] for id in ids).decode(errors="replace")

    def starts_word(self, id: int) -> bool:
        return id == 2

    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("text", ["ab€ éa  €é b", " €", "€€a", "a ", "a x y b x y  x y €a"])
def test_a_character_of_several_tokens_comes_whole(text: str):
    tokenizer = Bytes()
    model = zoo.create_model(**TINY, vocabulary=tokenizer.vocabulary).eval()
    listener = Listener(model, PREPROCESS, tokenizer)
    ids = tokenizer.encode(text)
    said = [listener._add(token, frame) for frame, token in enumerate(ids)]
    assert "".join(said) == " ".join(text.split()) and listener._spell() == ""
    assert [listener._add(token, 0) for token in tokenizer.encode("€")[:2]] == ["", ""]
    assert listener._spell() == ("" if text[-1] != " " else " ") + "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"look_ahead": -1}, "look_ahead must be >= 0"),
        ({"tokenizer": PIECES}, r"\(18, 80\) tokens and mel bands, but the model has \(11, 80\)"),
        ({}, "no chunk"),
    ],
    ids=str,
)
def test_listener_refuses(options: dict[str, Any], words: str):
    choices = TINY if options else TINY | {"chunk": None, "left": 70}
    model = zoo.create_model(**choices, vocabulary=LETTERS.vocabulary).eval()
    with pytest.raises(ValueError, match=words):
        Listener(model, PREPROCESS, **{"tokenizer": LETTERS, **options})


def test_an_answer_that_is_not_a_number(ctc: Path):
    model: Any = load_checkpoint(ctc).model
    model.head.bias.data[0] = float("nan")
    listener = Listener(model, PREPROCESS, LETTERS)
    with pytest.raises(ValueError, match="the model's output is NaN or infinite"):
        listener.push(sound(1.0))


def test_two_listeners_of_one_model_do_not_hear_each_other(ctc: Path):
    model = load_checkpoint(ctc).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    waveforms = (sound(1.0), sound(2.0)[16000:])
    pairs = [(Listener(model, PREPROCESS, LETTERS), waveform, list[str]()) for waveform in waveforms]
    for place in range(0, 16000, 1000):
        for listener, waveform, said in pairs:
            said.append(listener.push(waveform[place : place + 1000]))
    for listener, waveform, said in pairs:
        alone = Listener(model, PREPROCESS, LETTERS)
        assert "".join(said) + listener.finish() == alone.push(waveform) + alone.finish()
    assert difference(before, model.state_dict()) is None
