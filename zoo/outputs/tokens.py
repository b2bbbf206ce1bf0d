"""Between text and the tokens that a speech model emits: characters, or sentencepiece's word pieces or words."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from zoo.text import one_line, reason

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from torch import Tensor

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece writes a space within a piece."""


class Tokenizer(ABC):
    """From text to token ids and back. The blank of CTC and RNN-T is not a piece; its id comes after the last piece."""

    pieces: tuple[str, ...]

    @property
    def blank(self) -> int:
        """Id of the blank, the last one."""
        return len(self.pieces)

    @property
    def vocabulary(self) -> int:
        """Number of pieces and the blank: the outputs of a model."""
        return len(self.pieces) + 1

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text's pieces; ValueError lists characters that are in no piece."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids, a list or a 1-D tensor, which are collapsed and free of blanks; ValueError if one is out of
        range."""

    @abstractmethod
    def starts_word(self, id: int) -> bool:
        """Whether a word begins at this piece, or right after it if it is a space."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The argument of `tokenizer_from_dict`, in JSON's types."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.pieces)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.pieces)} pieces)"

    def _checked(self, ids: Sequence[int] | Tensor) -> list[int]:
        """The ids as a list; ValueError if one is out of range."""
        try:
            found = [index(id) for id in (ids if isinstance(ids, Sequence) else ids.tolist())]
        except TypeError:
            raise ValueError("token ids must be a list of integers or a 1-D tensor of them") from None
        if outside := [id for id in found if not 0 <= id < self.blank]:
            raise ValueError(f"token ids must be from 0 to {self.blank - 1}, without blanks, got {outside[0]}")
        return found


class Characters(Tokenizer):
    """Each character is a piece.

    Args:
        pieces: the characters, in the order of their ids.

    Raises:
        ValueError: the list is empty, a piece appears twice, or one is not a single character.
    """

    def __init__(self, pieces: Iterable[str]):
        self.pieces = tuple(pieces)
        if not self.pieces:
            raise ValueError("a tokenizer needs at least one character")
        odd = [piece for piece in self.pieces if not isinstance(piece, str) or len(piece) != 1]
        if odd:
            raise ValueError(f"pieces must be single characters, got {odd[0]!r}")
        self._ids = {piece: id for id, piece in enumerate(self.pieces)}
        if len(self._ids) < len(self.pieces):
            twice = next(piece for piece in self.pieces if self.pieces.count(piece) > 1)
            raise ValueError(f"the piece {twice!r} appears twice")

    def encode(self, text: str) -> list[int]:
        unknown = set(text) - self._ids.keys()
        if unknown:
            raise ValueError(_unknown(unknown, text))
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return "".join(self.pieces[id] for id in self._checked(ids))

    def starts_word(self, id: int) -> bool:
        return id < self.blank and self.pieces[id] == " "

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "characters", "pieces": list(self.pieces)}


class WordPieces(Tokenizer):
    """Pieces of a sentencepiece model, which may be whole words, with their ids there (Kudo and Richardson 2018,
    arXiv:1808.06226).

    Args:
        model: the bytes of a `.model` file.

    Raises:
        ValueError: they are not a sentencepiece model.
    """

    def __init__(self, model: bytes):
        self.model = bytes(model)
        self._processor = _load(self.model)
        self.pieces = tuple(self._processor.id_to_piece(id) for id in range(self._processor.get_piece_size()))

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(text)
        none = self._processor.unk_id()
        if none in ids or SPACE in text:
            parts = text.split() if self.whole_words else text
            unknown = {part for part in parts if none in self._processor.encode(part)}
            raise ValueError(_unknown(unknown | ({SPACE} & set(text)), text))
        return ids

    @property
    def whole_words(self) -> bool:
        """Whether each piece except `<unk>` is a word with the space before it."""
        return all(piece.startswith(SPACE) for id, piece in enumerate(self.pieces) if id != self._processor.unk_id())

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return self._processor.decode(self._checked(ids))

    def starts_word(self, id: int) -> bool:
        return id < self.blank and self.pieces[id].startswith(SPACE)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "pieces", "model": base64.b64encode(self.model).decode("ascii")}


def tokenizer_from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_dict`.

    Raises:
        ValueError: `values` is not a mapping as made by `to_dict`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"tokenizer must be a mapping, got {type(values).__name__}")
    kind = values.get("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tokenizer {kind!r}; allowed: {', '.join(KINDS)}")
    content = KINDS[kind]
    if set(values) != {"kind", content}:
        found = ", ".join(map(str, values))
        raise ValueError(f"a tokenizer of kind {kind!r} must have the keys kind and {content}, got {found}")
    value = values[content]
    if kind == "characters":
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"pieces must be a list of characters, got {type(value).__name__}")
        return Characters(value)
    try:
        return WordPieces(base64.b64decode(value, validate=True))
    except (TypeError, binascii.Error):
        raise ValueError("the tokenizer's model is not valid base64") from None


def train_characters(texts: Iterable[str]) -> Characters:
    """A tokenizer of the characters that texts have, in order of their code points.

    Raises:
        ValueError: the texts have no characters.
    """
    characters = sorted(set().union(*map(set, texts)))
    if not characters:
        raise ValueError("no text to take characters from")
    return Characters(characters)


def train_pieces(texts: Iterable[str], size: int = 128) -> WordPieces:
    """A unigram model of sentencepiece (Kudo 2018, arXiv:1804.10959), the same for the same texts.

    Texts are not normalised, and every character of the texts becomes a piece, so that any text of these characters
    is decoded to itself. Piece 0 is sentencepiece's `<unk>`, which `encode` never gives.

    Args:
        texts: the training texts.
        size: pieces, `<unk>` included.

    Raises:
        ValueError: the texts are empty, or have too few or too many distinct pieces for the size.
    """
    lines = _lines(texts)
    try:
        return _train(lines, "unigram", size)
    except (RuntimeError, OSError) as error:
        raise ValueError(_misfit(str(error), size)) from error


def train_words(texts: Iterable[str]) -> WordPieces:
    """A tokenizer of the words that texts have, each a piece, the most frequent first: for small vocabularies, such as
    digits and commands. Piece 0 is sentencepiece's `<unk>`, which `encode` never gives.

    Raises:
        ValueError: the texts are empty.
    """
    lines = _lines(texts)
    return _train(lines, "word", 1 + len({word for line in lines for word in line.split()}))


def _lines(texts: Iterable[str]) -> list[str]:
    lines = [text for text in texts if text.strip()]
    if not lines:
        raise ValueError("no text to train word pieces on")
    marked = next((line for line in lines if SPACE in line), None)
    if marked is not None:
        raise ValueError(f"{SPACE!r}, which stands for a space in word pieces, is in {_shortened(marked)}")
    return lines


def _train(lines: Iterable[str], kind: str, size: int) -> WordPieces:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=kind == "word",
        max_sentence_length=1 << 30,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return WordPieces(model.getvalue())


def read_tokenizer(path: str | os.PathLike[str]) -> WordPieces:
    """The tokenizer of a sentencepiece `.model` file.

    Raises:
        ValueError: the file cannot be read, or is not a sentencepiece model.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return WordPieces(file.read())
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: {reason(error)}") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _load(model: bytes) -> SentencePieceProcessor:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        if model and processor.LoadFromSerializedProto(model) and processor.get_piece_size():
            return processor
    except RuntimeError:
        pass
    raise ValueError("not a sentencepiece model")


def _misfit(said: str, size: int) -> str:
    if found := re.search(r"too high .* value <= (\d+)", said):
        return f"{size} word pieces are too many for these texts; at most {found[1]} can be made"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", said):
        return f"{size} word pieces are too few for the characters of these texts; at least {found[1]} are needed"
    return f"sentencepiece cannot train {size} word pieces: {one_line(said)}"


def _unknown(characters: set[str], text: str) -> str:
    named = ", ".join(repr(character) for character in sorted(characters))
    return f"the vocabulary has no {named}, which is in {_shortened(text)}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


KINDS = {"characters": "pieces", "pieces": "model"}
