"""Words of decoded speech: language models that score them, and when each was said."""

import itertools
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speech_cases import collapse
from zoo.outputs import KenLM, beam, words
from zoo.outputs.align import TAIL
from zoo.outputs.tokens import SPACE, Characters, train_pieces


class Speller:
    """A tokenizer: a piece that begins with a space starts a word."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[index] for index in ids).strip()

    def starts_word(self, index: int) -> bool:
        return self.pieces[index].startswith(" ")


CHARACTERS = Characters(" abc")
PIECES: Any = Speller(" a", " ba", "b", " ", "c")


# Language models


class State:
    def __init__(self) -> None:
        self.history: tuple[str, ...] = ()


class Model:
    """A unigram with the calls of kenlm.Model; log10, and states that are written into."""

    table = {"ab": -0.5, "BA": -1.0, "c": -0.25, "</s>": -0.125, "▁a": -0.5, "b": -0.75, "▁": -2.0}

    def __init__(self, path: str, config: Any) -> None:
        if "broken" in path:
            raise OSError(f"Cannot read model '{path}'\n(no n-gram)")
        assert not config.show_progress

    def BeginSentenceWrite(self, state: State) -> None:
        state.history = ("<s>",)

    def BaseScore(self, state: State, word: str, after: State) -> float:
        after.history = (*state.history, word)
        return self.table.get(word, -9.0)

    def __contains__(self, word: str) -> bool:
        return word in self.table


@pytest.fixture
def kenlm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake: Any = types.ModuleType("kenlm")
    fake.Model, fake.State, fake.Config = Model, State, types.SimpleNamespace
    fake.ARPALoadComplain = types.SimpleNamespace(NONE=0)
    monkeypatch.setitem(sys.modules, "kenlm", fake)
    path = tmp_path / "words.arpa"
    path.write_text("\\data\\")
    return path


def total(lm: KenLM, tokens: Sequence[int]) -> tuple[float, int, tuple[str, ...]]:
    """log10 of the whole, units, and what the n-gram was asked."""
    state, whole, units = lm.start(), 0.0, 0
    for token in tokens:
        state, score, more = lm.extend(state, token)
        whole, units = whole + score, units + more
    score, more = lm.finish(state)
    asked: list[str] = []
    lm._score = lambda context, unit: (asked.append(unit), (context, 0.0))[1]  # type: ignore[method-assign]
    lm.finish(state)
    return (whole + score) / math.log(10), units + more, (*state[0].history[1:], *asked)


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "wanted"),
    [
        (CHARACTERS, [1, 2, 0, 2, 1, 0, 3], (-1.875, 3, ("ab", "BA", "c", "</s>"))),
        (CHARACTERS, [0, 1, 2, 0, 0], (-0.625, 1, ("ab", "</s>"))),
        (CHARACTERS, [1, 1, 1], (-9.125, 1, ("aaa", "</s>"))),
        (CHARACTERS, [], (-0.125, 0, ("</s>",))),
        (CHARACTERS, [0, 0], (-0.125, 0, ("</s>",))),
        (PIECES, [0, 2, 1], (-1.625, 2, ("ab", "BA", "</s>"))),
        (PIECES, [3, 4, 3], (-0.375, 1, ("c", "</s>"))),
    ],
)
def test_words_are_scored_when_they_end(kenlm: Path, tokenizer: Any, tokens: list[int], wanted: tuple[Any, ...]):
    score, units, asked = total(KenLM(kenlm, tokenizer), tokens)
    assert (pytest.approx(score), units, asked) == wanted


def test_pieces_are_scored_at_once(kenlm: Path):
    score, units, asked = total(KenLM(kenlm, PIECES, unit="token"), [0, 2, 3])
    assert (pytest.approx(score), units, asked) == (-3.375, 3, ("▁a", "b", "▁", "</s>"))


def test_language_model_changes_the_answer(kenlm: Path):
    """ "ac" sounds a little more like it, "ab" is a word."""
    logits = torch.full((2, 5), -9.0)
    logits[0, 1], logits[1, 3], logits[1, 2] = 5.0, 5.0, 4.5
    assert CHARACTERS.decode(beam(logits)[0].tokens) == "ac"
    found = beam(logits, lm=KenLM(kenlm, CHARACTERS), alpha=0.5, beta=1.0)
    assert CHARACTERS.decode(found[0].tokens) == "ab"
    assert found[0].score == pytest.approx(found[0].acoustic + 0.5 * math.log(10) * -0.625 + 1.0)


def test_missing_and_broken_language_models(kenlm: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="^language model file not found: 'nowhere.arpa'$"):
        KenLM("nowhere.arpa", CHARACTERS)
    with pytest.raises(ValueError, match="unit must be 'word' or 'token', got 'letter'"):
        KenLM(kenlm, CHARACTERS, unit="letter")
    broken = kenlm.rename(kenlm.with_name("broken.arpa"))
    with pytest.raises(ValueError, match=r"broken.arpa cannot be read by kenlm as an n-gram model: .*\(no n-gram\)$"):
        KenLM(broken, CHARACTERS)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ValueError, match="needs kenlm, which is not installed: pip install kenlm$"):
        KenLM(broken, CHARACTERS)
    with pytest.raises(ValueError, match="^language model file not found: 'nowhere.arpa'$"):  # the file comes first
        KenLM("nowhere.arpa", CHARACTERS)


ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.25
-0.5\t</s>
-0.75\tAB\t-0.125
-1.25\tba

\\2-grams:
-0.0625\t<s> AB
-0.375\tAB ba

\\end\\
"""


def test_real_kenlm(tmp_path: Path):
    pytest.importorskip("kenlm")
    (tmp_path / "words.arpa").write_text(ARPA)
    lm = KenLM(tmp_path / "words.arpa", CHARACTERS)
    state, whole = lm.start(), 0.0
    for token in [1, 2, 0, 2, 1, 0, 3, 3]:  # "ab ba cc"
        state, score, _ = lm.extend(state, token)
        whole += score
    score, units = lm.finish(state)
    assert (whole + score) / math.log(10) == pytest.approx(-0.0625 - 0.375 - 1.0 - 0.5) and units == 1
    broken = tmp_path / "broken.arpa"
    broken.write_text("text")
    with pytest.raises(ValueError, match="broken.arpa cannot be read by kenlm as an n-gram model"):
        KenLM(broken, CHARACTERS)


# Times of words


def peaks(*path: int, vocabulary: int = 5, height: float = 6.0) -> Tensor:
    return height * F.one_hot(torch.tensor(path), vocabulary).float()


def test_words_have_their_times():
    logits = peaks(4, 1, 1, 4, 2, 4, 0, 0, 4, 3, 4, 4)  # -aa-b-  -c--
    tokens = [1, 2, 0, 3]
    (ab, c) = words(logits, tokens, CHARACTERS, 0.04)
    assert (ab.text, c.text) == ("ab", "c")
    assert [ab.start, ab.end, c.start, c.end] == pytest.approx([0.04, 0.22, 0.36, 0.44])  # with half the blanks behind
    certain = math.exp(6) / (math.exp(6) + 4)
    assert [ab.probability, c.probability] == pytest.approx([certain, certain], abs=1e-6)


def test_a_word_ends_before_the_next_one_and_soon():
    one, two = words(peaks(*[1] + [4] * 4 + [0] + [4] * 2 + [2] + [4] * 50), [1, 0, 2], CHARACTERS, 0.04)
    assert [one.start, one.end] == pytest.approx([0.0, 0.04 + 0.08])  # half way to the space
    assert [two.start, two.end] == pytest.approx([0.32, 0.36 + TAIL])


def test_probability_is_the_mean_over_frames():
    logits = peaks(1, 4, 2)
    logits[2] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    (word,) = words(logits, [1, 2], CHARACTERS, 0.01)
    each = [math.exp(6) / (math.exp(6) + 4), math.e / (math.e + 4)]
    assert word.probability == pytest.approx(math.sqrt(math.prod(each)), abs=1e-6)


def test_pieces_make_words():
    logits = peaks(0, 5, 2, 1, 5, 3, 4, vocabulary=6)
    found = words(logits, [0, 2, 1, 3, 4], PIECES, 1.0)
    assert [(word.text, word.start, word.end) for word in found] == [("ab", 0, 3), ("ba", 3, 4 + TAIL), ("c", 6, 7)]


def test_trained_pieces_make_words():
    text = "the cat and the other cat chatted"
    tokenizer = train_pieces([text, "a cat that ate", "hen on the den"], 21)
    tokens = tokenizer.encode(text)
    path = [index for token in tokens for index in (token, tokenizer.blank)]
    found = words(peaks(*path, vocabulary=tokenizer.vocabulary), tokens, tokenizer, 0.5)
    assert [word.text for word in found] == text.split() and len(tokens) > len(found)
    starts = [index for index, token in enumerate(tokens) if tokenizer.pieces[token].strip(SPACE)]
    assert found[0].start == starts[0] and found[-1].end == len(tokens) - 0.5 + TAIL


def test_alignment_is_the_likeliest():
    """Against all alignments: the frames of the best one are those of the words."""
    logits = torch.randn(6, 5)
    rows = logits.double().log_softmax(-1)
    paths = [path for path in itertools.product(range(5), repeat=6) if collapse(path, 4) == (1, 0, 2)]
    best = max(paths, key=lambda path: sum(rows[frame, token].item() for frame, token in enumerate(path)))
    a, b = words(logits, [1, 0, 2], CHARACTERS, 1.0)
    assert (a.start, int(a.end)) == (best.index(1), 1 + max(i for i, token in enumerate(best) if token == 1))
    assert (b.start, int(b.end)) == (best.index(2), 1 + max(i for i, token in enumerate(best) if token == 2))


def test_nothing_said_has_no_words():
    assert words(peaks(4, 4), [], CHARACTERS, 0.04) == []
    assert words(torch.zeros(0, 5), [], CHARACTERS, 0.04) == []
    assert words(peaks(4, 0, 4), [0], CHARACTERS, 0.04) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 1, 2], "^4 tokens need at least 4 frames, got 3$"),
        ([1, 1, 2], "^3 tokens need at least 4 frames, got 3$"),
        ([4], "^tokens must be from 0 to 3, got 4 to 4$"),
        ([-1, 2], "^tokens must be from 0 to 3, got -1 to 2$"),
    ],
)
def test_tokens_that_do_not_fit(tokens: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        words(peaks(1, 2, 3), tokens, CHARACTERS, 0.04)
