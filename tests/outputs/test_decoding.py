"""Decoding: the best path, beam search against all alignments and flashlight, and transducers."""

import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speech_cases import collapse
from zoo.heads import TransducerHead
from zoo.outputs import beam, flashlight, greedy, transducer_greedy
from zoo.outputs.ctc import Hypothesis

try:
    from torchaudio.models.decoder import ctc_decoder

    FLASHLIGHT = ctc_decoder is not None
except RuntimeError:
    FLASHLIGHT = False


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
