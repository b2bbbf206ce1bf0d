import itertools
import math
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads import TransducerHead
from zoo.outputs import KenLM, beam, flashlight, greedy, transducer_greedy, words
from zoo.outputs.align import TAIL
from zoo.outputs.ctc import Hypothesis
from zoo.outputs.tokens import SPACE, Characters, train_pieces

try:
    from torchaudio.models.decoder import ctc_decoder

    FLASHLIGHT = ctc_decoder is not None
except RuntimeError:
    FLASHLIGHT = False


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


class Bigram:
    """A language model over tokens, its probabilities from a table that knows the token before."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = 2 * torch.randn(vocabulary + 1, vocabulary + 1, generator=generator, dtype=torch.float64)
        self.table = rows.log_softmax(-1).tolist()
        self.asked = 0

    def start(self) -> int:
        return -1

    def extend(self, state: int, token: int) -> tuple[int, float, int]:
        self.asked += 1
        return token, self.table[state][token], 1

    def finish(self, state: int) -> tuple[float, int]:
        return self.table[state][-1], 0


def collapse(path: Sequence[int], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def enumerated(logits: Tensor) -> dict[tuple[int, ...], float]:
    """The log-probability of every answer, by adding up all alignments."""
    rows, (frames, vocabulary) = logits.double().softmax(-1), logits.shape
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        answer = collapse(path, vocabulary - 1)
        product = math.prod(rows[frame, token].item() for frame, token in enumerate(path))
        found[answer] = found.get(answer, 0.0) + product
    return {answer: math.log(probability) for answer, probability in found.items()}


def likelihood(logits: Tensor, tokens: Sequence[int]) -> float:
    """log P(tokens | logits), all alignments."""
    rows = logits.double().log_softmax(-1)[:, None]
    lengths = torch.tensor([len(rows)]), torch.tensor([len(tokens)])
    return -F.ctc_loss(rows, torch.tensor([list(tokens)]), *lengths, rows.shape[-1] - 1, "sum").item()


def spoken(frames: int, vocabulary: int, blank: float, seed: int = 0) -> Tensor:
    """Logits that look like a CTC model's: peaks of a few likely tokens between blanks."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(frames, vocabulary, generator=generator)
    logits[:, -1] += blank
    return logits


# Best path


def test_greedy_collapses_repeats_and_drops_blanks():
    paths = [[0, 0, 3, 0, 1, 1], [3, 2, 2, 3, 3, 3], [1, 2, 1, 0, 0, 0]]
    logits = F.one_hot(torch.tensor(paths), 4).float()
    assert greedy(logits, torch.tensor([6, 6, 6])) == [[0, 0, 1], [2], [1, 2, 1, 0]]
    assert greedy(logits, torch.tensor([2, 1, 3])) == [[0], [], [1, 2, 1]]
    assert greedy(logits, torch.tensor([0, 0, 0])) == [[], [], []]


def test_greedy_is_the_likeliest_alignment():
    logits = torch.randn(3, 7, 4)
    for row, found in zip(logits, greedy(logits, torch.tensor([7, 7, 7])), strict=True):
        assert tuple(found) == collapse(row.argmax(-1).tolist(), 3)


# Prefix beam search


@pytest.mark.parametrize(("frames", "vocabulary"), [(1, 2), (4, 2), (5, 4), (6, 3), (7, 3)])
def test_wide_beam_is_exact(frames: int, vocabulary: int):
    logits = 2 * torch.randn(frames, vocabulary)
    wanted = enumerated(logits)
    found = beam(logits, 10**4, prune=0)
    assert {tuple(each.tokens): each.score for each in found} == pytest.approx(wanted, abs=1e-9)
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True) and len(found) == len(wanted)
    assert all(each.acoustic == each.score for each in found)
    assert sum(map(math.exp, scores)) == pytest.approx(1)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1.5), (2.0, -1.0)])
def test_wide_beam_with_a_language_model_is_exact(alpha: float, beta: float):
    logits, lm = 2 * torch.randn(5, 4), Bigram(3)
    wanted = {}
    for answer, acoustic in enumerated(logits).items():
        history = (-1, *answer)
        spoken = sum(lm.table[one][two] for one, two in zip(history, (*answer, -1), strict=True))
        wanted[answer] = acoustic + alpha * spoken + beta * len(answer)
    found = beam(logits, 10**4, prune=0, lm=lm, alpha=alpha, beta=beta)
    assert {tuple(each.tokens): each.score for each in found} == pytest.approx(wanted, abs=1e-9)
    assert tuple(found[0].tokens) == max(wanted, key=lambda answer: wanted[answer])
    acoustic = enumerated(logits)
    assert {tuple(each.tokens): each.acoustic for each in found} == pytest.approx(acoustic, abs=1e-9)


def test_bonus_without_a_language_model_counts_tokens():
    logits = 2 * torch.randn(5, 3)
    wanted = {answer: score + 0.7 * len(answer) for answer, score in enumerated(logits).items()}
    found = beam(logits, 10**4, prune=0, beta=0.7)
    assert {tuple(each.tokens): each.score for each in found} == pytest.approx(wanted, abs=1e-9)
    lengths = [len(beam(spoken(60, 20, 2.0), 8, beta=beta)[0].tokens) for beta in (-3.0, 0.0, 3.0)]
    assert lengths[0] < lengths[1] < lengths[2]


def slow_beam(
    logits: Tensor, size: int, lm: Bigram, alpha: float, beta: float
) -> tuple[dict[tuple[int, ...], float], int]:
    """The same search written with dictionaries of prefixes, every extension scored, and the number of extensions; no
    pruning of tokens."""
    rows, blank = logits.double().log_softmax(-1).tolist(), logits.shape[1] - 1
    none = float("-inf")

    def add(*values: float) -> float:
        top = max(values)
        return top if top == none else top + math.log(sum(math.exp(value - top) for value in values))

    def bonus(prefix: tuple[int, ...]) -> float:
        return sum(alpha * lm.table[a][b] + beta for a, b in itertools.pairwise((-1, *prefix)))

    kept, extensions = {(): (0.0, none)}, set[tuple[int, ...]]()
    for row in rows:
        grown: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (in_blank, in_token) in kept.items():
            for token, score in enumerate(row):
                both = add(in_blank, in_token) + score
                if token == blank:
                    parts = [(prefix, both, none)]
                elif prefix and prefix[-1] == token:
                    parts = [(prefix, none, in_token + score), ((*prefix, token), none, in_blank + score)]
                else:
                    parts = [((*prefix, token), none, both)]
                for key, one, two in parts:
                    before = grown.get(key, (none, none))
                    grown[key] = add(before[0], one), add(before[1], two)
        extensions |= {(*prefix, token) for prefix in kept for token in range(blank)}
        best = sorted(grown, key=lambda prefix: -add(*grown[prefix]) - bonus(prefix))[:size]
        kept = {prefix: grown[prefix] for prefix in best}
    scores = {key: add(*kept[key]) + bonus(key) + alpha * lm.table[(-1, *key)[-1]][-1] for key in kept}
    return scores, len(extensions)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.8, 1.2), (0.8, -0.5)])
def test_narrow_beam_keeps_the_best_prefixes(size: int, alpha: float, beta: float):
    logits, lm = spoken(25, 7, 1.0), Bigram(6)
    wanted, extensions = slow_beam(logits, size, lm, alpha, beta)
    found = beam(logits, size, prune=0, lm=lm, alpha=alpha, beta=beta)
    assert {tuple(each.tokens): each.score for each in found} == pytest.approx(wanted, abs=1e-9)
    assert 0 < lm.asked < 0.67 * extensions


@pytest.mark.parametrize("blank", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("size", [4, 16])
def test_beam_is_never_worse_than_greedy(blank: float, size: int):
    gains = []
    for seed in range(10):
        logits = F.avg_pool1d(spoken(80, 30, blank, seed).T[None], 3, 1, 1)[0].T
        best = beam(logits, size)[0]
        assert best.score <= likelihood(logits, best.tokens) + 1e-9
        (path,) = greedy(logits[None], torch.tensor([80]))
        gains.append(likelihood(logits, best.tokens) - likelihood(logits, path))
    assert min(gains) > -1e-9 and (max(gains) > 0.1 or blank == 8.0)


def test_pruning_drops_only_what_is_improbable():
    logits = spoken(60, 20, 4.0)
    exact, pruned = beam(logits, 8, prune=0), beam(logits, 8, prune=1e-3)
    assert pruned[0].tokens == exact[0].tokens and exact[0].score > pruned[0].score > exact[0].score - 0.1
    (path,) = greedy(logits[None], torch.tensor([60]))
    assert {token for each in beam(logits, 8, prune=1.0) for token in each.tokens} <= set(path)
    assert not {token for each in exact for token in each.tokens} <= set(path)


def test_no_frames_no_tokens():
    assert beam(torch.zeros(0, 5)) == [Hypothesis([], 0.0, 0.0)]
    (only,) = beam(torch.zeros(0, 5), lm=Bigram(4), alpha=2.0)
    assert only.score == pytest.approx(2 * Bigram(4).table[-1][-1])


def test_impossible_tokens_are_no_answer():
    logits = torch.full((4, 3), -math.inf)
    logits[[0, 1, 2, 3], [0, 2, 0, 1]] = 0.0
    assert beam(logits, 99, prune=0) == [Hypothesis([0, 0, 1], 0.0, 0.0)]


class Broken(Bigram):
    def extend(self, state: int, token: int) -> tuple[int, float, int]:
        return token, 0.1, 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be >= 1"),
        ({"prune": 1.5}, "prune from 0 to 1"),
        ({"alpha": -1.0}, "alpha >= 0, got .*alpha=-1.0"),
        ({"lm": Broken(4)}, "log-probabilities <= 0 and 0 or 1 unit, got 0.1 and 1"),
    ],
)
def test_beam_refuses(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        beam(torch.zeros(3, 5), **options)


def test_beam_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        beam(torch.full((3, 5), math.nan))


def test_ten_seconds_take_well_under_a_second():
    logits = spoken(250, 129, 4.0)
    for lm in (None, Bigram(128)):
        seconds = []
        for _ in range(3):  # the best of three: other work on the machine slows all code
            start = time.process_time()
            beam(logits, 16, lm=lm)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.5, seconds


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


# flashlight


@pytest.mark.skipif(not FLASHLIGHT, reason="flashlight-text is not installed")
@pytest.mark.parametrize(("lm", "beta"), [(None, 0.0), (None, 0.6), (Bigram(3), 0.6)])
def test_flashlight_finds_what_beam_finds(lm: Bigram | None, beta: float):
    for seed in range(5):
        logits = spoken(6, 4, 0.5, seed)
        ours = beam(logits, 10**4, prune=0, lm=lm, beta=beta)
        theirs = flashlight(logits, 10**4, prune=0, lm=lm, beta=beta)
        assert theirs[0].tokens == ours[0].tokens
        assert theirs[0].score == pytest.approx(ours[0].score, abs=1e-4)
        assert theirs[0].acoustic == pytest.approx(ours[0].acoustic, abs=1e-4)
        assert len({tuple(each.tokens) for each in theirs}) == len(theirs)


def test_without_flashlight(monkeypatch: pytest.MonkeyPatch):
    import torchaudio.models.decoder as decoder

    for name in ("CTCDecoderLM", "CTCDecoderLMState", "ctc_decoder", "_ctc_decoder"):
        monkeypatch.delitem(vars(decoder), name, raising=False)
    monkeypatch.delitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", raising=False)
    for name in [name for name in sys.modules if name.startswith("flashlight")] + ["flashlight"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="flashlight-text, which is not installed: pip install flashlight-text"):
        flashlight(torch.zeros(3, 4))


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


# RNN-T


class Head:
    """A predictor that remembers a sum of embeddings, and a joint that adds."""

    def __init__(self, vocabulary: int = 6, dim: int = 8) -> None:
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(vocabulary, dim, generator=generator)
        self.out = torch.randn(vocabulary, dim, generator=generator)
        self.vocabulary, self.dim = vocabulary, dim

    def start(self, batch: int) -> Any:
        return torch.zeros(batch, self.dim), (torch.zeros(2, batch, self.dim), torch.zeros(batch, 1))

    def predict(self, tokens: Tensor, state: Any) -> Any:
        _, (memory, steps) = state
        memory = torch.stack([0.7 * memory[0] + self.embedding[tokens], memory[0]])
        return memory.sum(0).tanh() * (steps + 1).rsqrt(), (memory, steps + 1)

    def joint(self, encoded: Tensor, g: Tensor) -> Tensor:
        return (encoded + g).tanh() @ self.out.T


def by_hand(head: Head, encoded: Tensor, most: int) -> list[int]:
    state, found = head.start(1), []
    for frame in encoded:
        for _ in range(most):
            token = int(head.joint(frame[None], state[0]).argmax())
            if token == head.vocabulary - 1:
                break
            found.append(token)
            state = head.predict(torch.tensor([token]), state)
    return found


@pytest.mark.parametrize("most", [1, 2, 10])
def test_transducer_is_the_same_in_any_batch(most: int):
    head, lengths = Head(), [9, 4, 0, 7, 1]
    head.out[-1] *= 1.5
    encoded = 2 * torch.randn(5, 9, 8)
    found = transducer_greedy(head, encoded, torch.tensor(lengths), most)
    assert found == [by_hand(head, row[:length], most) for row, length in zip(encoded, lengths, strict=True)]
    for row, length, tokens in zip(encoded, lengths, found, strict=True):
        assert transducer_greedy(head, row[None], torch.tensor([length]), most) == [tokens]
    assert len({len(tokens) for tokens in found}) > 2
    padded = encoded.clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 99.0
    assert transducer_greedy(head, padded, torch.tensor(lengths), most) == found


@torch.no_grad()
def test_transducer_head_of_the_zoo():
    head: Any = TransducerHead(8, 6, hidden=16, layers=2)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    head.vocabulary = 6
    encoded = 2 * torch.randn(3, 7, 8)
    found = transducer_greedy(head, encoded, torch.tensor([7, 2, 5]), 3)
    assert found == [by_hand(head, row[:length], 3) for row, length in zip(encoded, (7, 2, 5), strict=True)]
    assert len({token for tokens in found for token in tokens}) > 2


def test_transducer_gives_a_frame_at_most_so_many_tokens():
    head = Head()
    head.joint = lambda encoded, g: F.one_hot(torch.full(g.shape[:1], 2), 6).float()  # never the blank
    found = transducer_greedy(head, torch.zeros(2, 3, 8), torch.tensor([3, 2]), most=4)
    assert found == [[2] * 12, [2] * 8]
    with pytest.raises(ValueError, match="most must be >= 1 token per frame, got 0"):
        transducer_greedy(head, torch.zeros(2, 3, 8), torch.tensor([3, 2]), most=0)


def test_transducer_of_nothing():
    assert transducer_greedy(Head(), torch.zeros(2, 0, 8), torch.tensor([0, 0])) == [[], []]
    assert transducer_greedy(Head(), torch.zeros(0, 3, 8), torch.tensor([], dtype=torch.long)) == []
