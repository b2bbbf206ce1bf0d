import base64
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.outputs.tokens import (
    Characters,
    Tokenizer,
    WordPieces,
    read_tokenizer,
    tokenizer_from_dict,
    train_characters,
    train_words,
)
from zoo.outputs.tokens import train_pieces as train

TEXTS = [
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "HE HOPED THERE WOULD BE STEW FOR DINNER",
    "NUMBER TEN FRESH NELLY IS WAITING ON YOU GOOD NIGHT HUSBAND",
    "THE MUSIC CAME NEARER AND HE RECALLED THE WORDS",
    "IT'S A  ODD   SPACING TEXT",
    "THE THE THE THERE THEN",
]


@pytest.fixture(scope="module")
def pieces() -> WordPieces:
    return train(TEXTS, 50)


@pytest.fixture(params=["characters", "pieces"])
def tokenizer(request: pytest.FixtureRequest, pieces: WordPieces) -> Tokenizer:
    return pieces if request.param == "pieces" else train_characters(TEXTS)


def test_text_survives(tokenizer: Tokenizer):
    for text in [*TEXTS, "", "A", " A", "A ", "  ", "DOG'S QUIZ", "TH\u0045"]:
        ids = tokenizer.encode(text)
        assert all(0 <= id < len(tokenizer.pieces) for id in ids)
        assert tokenizer.decode(ids) == text


def test_ids_may_be_a_tensor(tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    for given in (torch.tensor(ids), np.array(ids), [*np.array(ids)], tuple(torch.tensor(ids))):
        assert tokenizer.decode(given) == TEXTS[0]
    for wrong in (torch.tensor([ids]), torch.tensor(ids) + 0.5, [0.5], "A", torch.tensor(0)):
        with pytest.raises(ValueError, match="must be a list of integers or a 1-D tensor of them"):
            tokenizer.decode(wrong)


def test_blank_is_the_last(tokenizer: Tokenizer):
    assert tokenizer.blank == len(tokenizer.pieces) == tokenizer.vocabulary - 1
    for id in (tokenizer.blank, -1):
        with pytest.raises(ValueError, match=f"from 0 to {tokenizer.blank - 1}, without blanks, got {id}$"):
            tokenizer.decode([0, id])


@pytest.mark.parametrize(
    "text", ["the", "É", "A\tB", "A\nB", "A\u2581B", "\u2581", "A\xa0B", "ﬁ", "A\u0301", "Ａ", "\0"]
)
def test_unknown_characters_are_named(tokenizer: Tokenizer, text: str):
    unknown = sorted(set(text) - set("".join(TEXTS)))
    named = ", ".join(repr(character) for character in unknown)
    with pytest.raises(ValueError) as error:
        tokenizer.encode(text)
    assert str(error.value) == f"the vocabulary has no {named}, which is in {text!r}"
    with pytest.raises(ValueError, match=r"\.\.\.'$"):
        tokenizer.encode(text + "A" * 100)


def test_words_begin(tokenizer: Tokenizer):
    ids = tokenizer.encode("THE FOX JUMPS")
    starts = [tokenizer.starts_word(id) for id in ids]
    assert sum(starts) == (3 if isinstance(tokenizer, WordPieces) else 2)
    words, word = [], []
    for id, start in zip(ids, starts, strict=True):
        if start and word:
            words.append(word)
            word = []
        word.append(id)
    assert [tokenizer.decode(one).strip() for one in [*words, word]] == ["THE", "FOX", "JUMPS"]
    assert not tokenizer.starts_word(tokenizer.blank)


def test_dict_round_trip(tokenizer: Tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer and hash(again) == hash(tokenizer) and type(again) is type(tokenizer)
    assert again.pieces == tokenizer.pieces and again.encode("THE DOG") == tokenizer.encode("THE DOG")
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other == tokenizer and other.encode("THE DOG") == tokenizer.encode("THE DOG")
    assert tokenizer != Characters("AB") and tokenizer != "text"


def test_equality_is_of_content(pieces: WordPieces):
    assert train(TEXTS, 50) == pieces  # the same bytes from the same texts
    assert train(TEXTS, 49) != pieces
    assert Characters("AB") == Characters(["A", "B"]) != Characters("BA")


def test_characters_are_those_of_the_texts():
    assert train_characters(["BA", " 'C"]).pieces == (" ", "'", "A", "B", "C")
    with pytest.raises(ValueError, match="no text to take characters from"):
        train_characters(["", ""])


def test_pieces_have_every_character(pieces: WordPieces):
    assert len(pieces.pieces) == 50 and pieces.pieces[0] == "<unk>"
    assert set("".join(TEXTS)) - {" "} <= set(pieces.pieces)
    assert any(len(piece) > 3 for piece in pieces.pieces[1:])
    assert len(pieces.encode("THE THE")) < 7
    assert 0 not in pieces.encode(" ".join(TEXTS))
    assert "A" in pieces.decode([0, pieces.pieces.index("A")])


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 10, "no text to train word pieces on"),
        (["", ""], 10, "no text to train word pieces on"),
        (["AB BA"], 3, "3 word pieces are too few for the characters of these texts; at least 4 are needed"),
        (["AB BA"], 100, r"100 word pieces are too many for these texts; at most \d+ can be made"),
        (["A\u2581B"], 4, "'\u2581', which stands for a space in word pieces, is in 'A\u2581B'"),
    ],
)
def test_what_cannot_be_trained(texts: list[str], size: int, message: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(texts, size)
    assert capfd.readouterr() == ("", "")


def test_the_sizes_that_are_named_do():
    for size in (3, 100):
        with pytest.raises(ValueError) as error:
            train(["AB BA ABBA"], size)
        named = next(int(word) for word in reversed(str(error.value).split()) if word.isdigit())
        assert len(train(["AB BA ABBA"], named).pieces) == named


def test_words_are_pieces(pieces: WordPieces, capfd: pytest.CaptureFixture[str]):
    words = train_words([*TEXTS, ""])
    assert words.whole_words and not pieces.whole_words
    assert sorted(words.pieces[1:]) == sorted({"\u2581" + word for text in TEXTS for word in text.split()})
    assert words.pieces[1] == "\u2581THE"
    for text in TEXTS:
        ids = words.encode(text)
        assert len(ids) == len(text.split()) and all(words.starts_word(id) for id in ids)
        assert words.decode(ids) == " ".join(text.split())
    assert words.encode("  FOX  DOG ") == words.encode("FOX DOG") and words.encode("") == words.encode(" ") == []
    assert tokenizer_from_dict(json.loads(json.dumps(words.to_dict()))) == words == train_words(TEXTS)
    with pytest.raises(ValueError, match="^the vocabulary has no 'CAT', 'É', which is in 'THE CAT É DOG'$"):
        words.encode("THE CAT É DOG")
    with pytest.raises(ValueError, match="^no text to train word pieces on$"):
        train_words([" ", ""])
    assert capfd.readouterr() == ("", "")


def test_training_is_quiet(capfd: pytest.CaptureFixture[str]):
    train(TEXTS, 50)
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_not_left_out():
    text = "A" * 10000 + " Z"
    assert train(["AB", text], 6).decode(train(["AB", text], 6).encode("Z")) == "Z"


def test_model_files(tmp_path: Path, pieces: WordPieces):
    (tmp_path / "a.model").write_bytes(pieces.model)
    assert read_tokenizer(tmp_path / "a.model") == pieces
    with pytest.raises(ValueError, match=r"missing.model: No such file"):
        read_tokenizer(tmp_path / "missing.model")
    for content in (b"", b"junk" * 100, pieces.model[:300]):
        (tmp_path / "b.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.model: not a sentencepiece model$"):
            read_tokenizer(tmp_path / "b.model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "tokenizer must be a mapping, got NoneType"),
        ({}, "unknown kind of tokenizer None; allowed: characters, pieces"),
        ({"kind": "bytes"}, "unknown kind of tokenizer 'bytes'"),
        ({"kind": "characters"}, "must have the keys kind and pieces, got kind$"),
        ({"kind": "characters", "pieces": ["A"], "model": ""}, "got kind, pieces, model"),
        ({"kind": "characters", "pieces": "AB"}, "pieces must be a list of characters, got str"),
        ({"kind": "characters", "pieces": []}, "at least one character"),
        ({"kind": "characters", "pieces": ["A", "BC"]}, "single characters, got 'BC'"),
        ({"kind": "characters", "pieces": ["A", 3]}, "single characters, got 3"),
        ({"kind": "characters", "pieces": ["A", "B", "A"]}, "the piece 'A' appears twice"),
        ({"kind": "pieces", "model": "?"}, "not valid base64"),
        ({"kind": "pieces", "model": 3}, "not valid base64"),
        ({"kind": "pieces", "model": ""}, "not a sentencepiece model"),
        ({"kind": "pieces", "model": base64.b64encode(b"junk" * 10).decode()}, "not a sentencepiece model"),
    ],
    ids=str,
)
def test_wrong_dicts(values: Any, message: str):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_dict(values)
    assert "\n" not in str(error.value)
