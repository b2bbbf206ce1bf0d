"""Language models for beam search."""

from __future__ import annotations

import importlib
import math
import os
from typing import TYPE_CHECKING, Any, Protocol

from zoo.outputs.tokens import SPACE
from zoo.text import one_line

if TYPE_CHECKING:
    from zoo.outputs.tokens import Tokenizer


class LanguageModel(Protocol):
    """A language model that scores token by token; states are never changed in place.

    A log-probability is natural and at most 0. `units` is how many words (or tokens, as the model counts) are complete
    with this token: 0 or 1. A model over words answers (state, 0.0, 0) until a token shows that a word is complete.
    """

    def start(self) -> Any:
        """The state before any token."""
        ...

    def extend(self, state: Any, token: int) -> tuple[Any, float, int]:
        """The state after one more token, the log-probability of the completed units, and their number."""
        ...

    def finish(self, state: Any) -> tuple[float, int]:
        """Log-probability and units completed by the end of the utterance."""
        ...


class KenLM:
    """An n-gram of KenLM as a `LanguageModel` (Heafield 2011).

    A word that is in the n-gram only in upper or only in lower case is looked up that way; an unknown word has the
    probability of the n-gram's unknown word.

    Args:
        path: an ARPA file or a KenLM binary.
        tokenizer: decides how tokens make words.
        unit: "word" if the n-gram is over words, "token" if it is over the tokenizer's pieces (a space in a piece
            is then written as "▁").

    Raises:
        ValueError: kenlm is not installed, or the file is missing or not an n-gram model.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer, unit: str = "word") -> None:
        if unit not in ("word", "token"):
            raise ValueError(f"unit must be 'word' or 'token', got {unit!r}")
        if not os.path.isfile(path):
            raise ValueError(f"language model file not found: '{os.fspath(path)}'")
        try:
            kenlm = importlib.import_module("kenlm")
        except ImportError as error:
            raise ValueError("a language model needs kenlm, which is not installed: pip install kenlm") from error
        quiet = kenlm.Config()
        quiet.show_progress, quiet.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        try:
            self.model = kenlm.Model(os.fspath(path), quiet)
        except (OSError, RuntimeError) as error:
            reason = one_line(error, most=200)
            raise ValueError(f"{os.fspath(path)} cannot be read by kenlm as an n-gram model: {reason}") from error
        self.make, self.tokenizer, self.unit = kenlm.State, tokenizer, unit

    def start(self) -> tuple[Any, tuple[int, ...]]:
        state = self.make()
        self.model.BeginSentenceWrite(state)
        return state, ()

    def extend(self, state: tuple[Any, tuple[int, ...]], token: int) -> tuple[Any, float, int]:
        context, open_word = state
        if self.unit == "token":
            context, log_probability = self._score(context, self.tokenizer.pieces[token].replace(" ", SPACE))
            return (context, ()), log_probability, 1
        if not self.tokenizer.starts_word(token):
            return (context, (*open_word, token)), 0.0, 0
        word = self.tokenizer.decode(open_word).strip()
        if not word:
            return (context, (token,)), 0.0, 0
        context, log_probability = self._score(context, self._spelling(word))
        return (context, (token,)), log_probability, 1

    def finish(self, state: tuple[Any, tuple[int, ...]]) -> tuple[float, int]:
        context, open_word = state
        word = self.tokenizer.decode(open_word).strip()
        log_probability = 0.0
        if word:
            context, log_probability = self._score(context, self._spelling(word))
        return log_probability + self._score(context, "</s>")[1], int(bool(word))

    def _score(self, context: Any, unit: str) -> tuple[Any, float]:
        after = self.make()
        log_probability = self.model.BaseScore(context, unit, after) * math.log(10)
        return after, min(log_probability, 0.0)

    def _spelling(self, word: str) -> str:
        return next((form for form in (word, word.upper(), word.lower()) if form in self.model), word)
