"""CTC: best path and prefix beam search."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.outputs.lm import LanguageModel


class Hypothesis(NamedTuple):
    """A result of a search: `score = acoustic + alpha · log P(language model) + beta · units`."""

    tokens: list[int]
    score: float
    acoustic: float  # log of the summed probability of the alignments that the search kept


def frames_for(tokens: Sequence[int]) -> int:
    """How many frames CTC needs: one per token, and a blank between equal ones."""
    return len(tokens) + sum(one == other for one, other in itertools.pairwise(tokens))


def greedy(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    """Best path: the likeliest token of each frame, repeats collapsed, blanks dropped (Graves et al. 2006).

    Args:
        logits: [B, T, V], or log-probabilities.
        lengths: [B], the valid frames of each clip.

    Returns:
        The tokens of each clip.
    """
    paths = logits.argmax(-1).tolist()
    blank = logits.shape[-1] - 1
    found = []
    for path, length in zip(paths, lengths.tolist(), strict=True):
        path = path[:length]
        found.append([new for old, new in zip([blank, *path], path, strict=False) if new != old and new != blank])
    return found


def beam(
    logits: Tensor,
    size: int = 16,
    *,
    prune: float = 1e-4,
    lm: LanguageModel | None = None,
    alpha: float = 0.5,
    beta: float = 0.0,
) -> list[Hypothesis]:
    """CTC prefix beam search, with a language model or without one.

    Each frame keeps the `size` best prefixes. The alignments of a prefix are summed: those that end in blank, and
    separately those that end in its last token (Graves 2008; Hannun et al., arXiv 1408.2873). With `size` large and
    `prune` 0 the scores are exact.

    Args:
        logits: [T, V], or log-probabilities; the valid frames of one clip.
        size: prefixes kept.
        prune: a token less probable than this in a frame extends no prefix there, unless it is the frame's likeliest.
        lm: a language model, see `LanguageModel`; without one every token is a unit of probability 1.
        alpha: weight of the language model's log-probability, at least 0.
        beta: bonus of each unit in the score; above 0 it favours long answers.

    Returns:
        At least 1 and at most `size` hypotheses, the best first.

    Raises:
        ValueError: an argument is out of range, a logit is NaN, or the language model breaks its contract.
    """
    _check_weights(size, prune, alpha)
    rows = log_probabilities(logits)
    floor = math.log(prune) if prune else -math.inf
    scorer = _Scorer(lm or _Uniform(), alpha, beta)
    prefixes = [scorer.root()]
    in_blank, in_token = np.zeros(1), np.full(1, -np.inf)
    for row in rows:
        tokens = np.flatnonzero(row[:-1] >= min(floor, row.max()))
        last = np.array([prefix.token for prefix in prefixes])  # -1 before any token, where in_token is -inf
        total = np.logaddexp(in_blank, in_token)
        grown = np.where(last[:, None] == tokens, in_blank[:, None], total[:, None]) + row[tokens]
        in_blank, in_token = total + row[-1], in_token + row[last]
        _join(prefixes, tokens, grown, in_token)
        prefixes, in_blank, in_token = _select(prefixes, tokens, grown, in_blank, in_token, size, scorer)

    found = []
    for prefix, acoustic in zip(prefixes, np.logaddexp(in_blank, in_token).tolist(), strict=True):
        found.append(Hypothesis(prefix.spell(), acoustic + scorer.total(prefix), acoustic))
    return sorted(found, key=lambda each: (-each.score, each.tokens))


class _Prefix:
    """A node in the tree of prefixes; one object per prefix, so that nothing is scored twice."""

    __slots__ = ("bonus", "children", "parent", "state", "token")

    def __init__(self, parent: _Prefix | None, token: int, state: Any, bonus: float) -> None:
        self.parent, self.token, self.state, self.bonus = parent, token, state, bonus
        self.children: dict[int, _Prefix] = {}

    def spell(self) -> list[int]:
        tokens, node = [], self
        while node.parent is not None:
            tokens.append(node.token)
            node = node.parent
        return tokens[::-1]


class _Scorer:
    def __init__(self, lm: LanguageModel, alpha: float, beta: float) -> None:
        self.lm, self.alpha, self.beta = lm, alpha, beta
        self.most = beta if isinstance(lm, _Uniform) else max(beta, 0.0)  # the most that one token can add to a score

    def weigh(self, log_probability: float, units: int) -> float:
        if not log_probability <= 0 or units not in (0, 1):
            raise ValueError(
                f"a language model must give log-probabilities <= 0 and 0 or 1 unit, got {log_probability} and {units}"
            )
        return (self.alpha * log_probability if self.alpha else 0.0) + self.beta * units

    def root(self) -> _Prefix:
        return _Prefix(None, -1, self.lm.start(), 0.0)

    def child(self, prefix: _Prefix, token: int) -> _Prefix:
        if token not in prefix.children:
            state, log_probability, units = self.lm.extend(prefix.state, token)
            bonus = prefix.bonus + self.weigh(log_probability, units)
            prefix.children[token] = _Prefix(prefix, token, state, bonus)
        return prefix.children[token]

    def total(self, prefix: _Prefix) -> float:
        """The language model's part of the score of a whole utterance."""
        return prefix.bonus + self.weigh(*self.lm.finish(prefix.state))


class _Uniform:
    def start(self) -> None:
        return None

    def extend(self, state: None, token: int) -> tuple[None, float, int]:
        return None, 0.0, 1

    def finish(self, state: None) -> tuple[float, int]:
        return 0.0, 0


def _join(prefixes: list[_Prefix], tokens: np.ndarray, grown: np.ndarray, in_token: np.ndarray) -> None:
    """Adds an extension to the equal prefix that is already in the beam."""
    rows = {id(prefix): row for row, prefix in enumerate(prefixes)}
    columns = {token: column for column, token in enumerate(tokens.tolist())}
    for place, prefix in enumerate(prefixes):
        row, column = rows.get(id(prefix.parent)), columns.get(prefix.token)
        if row is not None and column is not None:
            in_token[place] = np.logaddexp(in_token[place], grown[row, column])
            grown[row, column] = -np.inf


def _select(
    prefixes: list[_Prefix],
    tokens: np.ndarray,
    grown: np.ndarray,
    in_blank: np.ndarray,
    in_token: np.ndarray,
    size: int,
    scorer: _Scorer,
) -> tuple[list[_Prefix], np.ndarray, np.ndarray]:
    """The `size` best of the prefixes as they are and of their extensions.

    Extensions are scored in the order of an upper bound (a log-probability is at most 0), until none of the others
    can be among the best; so the language model scores only a few, and the choice is exact.
    """
    bonus = np.array([prefix.bonus for prefix in prefixes])
    stays = np.logaddexp(in_blank, in_token) + bonus
    # (score, order among equals, prefix, blank, token); the worst on top
    best = [
        (score, -place, prefixes[place], in_blank[place], in_token[place])
        for place, score in enumerate(stays.tolist())
        if score > -math.inf
    ]
    heapq.heapify(best)
    bounds = (grown + (bonus + scorer.most)[:, None]).ravel()
    hopeful = np.flatnonzero(bounds > (best[0][0] if len(best) >= size else -math.inf))
    for place in hopeful[np.argsort(-bounds[hopeful], kind="stable")].tolist():
        if len(best) >= size and bounds[place] <= best[0][0]:
            break
        row, column = divmod(place, len(tokens))
        prefix = scorer.child(prefixes[row], int(tokens[column]))
        score = grown[row, column] + prefix.bonus
        if score > -math.inf:
            entry = (score, -len(prefixes) - place, prefix, -np.inf, grown[row, column])
            (heapq.heappush if len(best) < size else heapq.heappushpop)(best, entry)
    return [each[2] for each in best], np.array([each[3] for each in best]), np.array([each[4] for each in best])


def flashlight(
    logits: Tensor,
    size: int = 16,
    *,
    prune: float = 1e-4,
    lm: LanguageModel | None = None,
    alpha: float = 0.5,
    beta: float = 0.0,
) -> list[Hypothesis]:
    """`beam`, computed by flashlight-text's lexicon-free decoder through torchaudio (Kahn et al., arXiv 2201.12465).

    Arguments, result and errors as in `beam`, except that `acoustic` is the score without the language
    model, and that tokens are pruned by their number: as many as the frame with the most tokens above `prune` has.

    Raises:
        ValueError: flashlight-text is not installed.
    """
    _check_weights(size, prune, alpha)
    try:
        from torchaudio.models.decoder import CTCDecoderLM, CTCDecoderLMState, ctc_decoder
    except (ImportError, RuntimeError) as error:
        needs = "the flashlight decoder needs flashlight-text, which is not installed"
        raise ValueError(f"{needs}: pip install flashlight-text, or use the beam decoder") from error
    scorer = _Scorer(lm or _Uniform(), alpha, beta)
    root = scorer.root()

    class Bonus(CTCDecoderLM):
        """The scorer's part of the score, with the decoder's states as names of prefixes."""

        def start(self, start_with_nothing: bool) -> CTCDecoderLMState:
            state = CTCDecoderLMState()
            self.prefixes = {state: root}
            return state

        def score(self, state: CTCDecoderLMState, usr_token_idx: int) -> tuple[CTCDecoderLMState, float]:
            prefix, after = self.prefixes[state], state.child(usr_token_idx)
            child = self.prefixes[after] = scorer.child(prefix, usr_token_idx)
            return after, child.bonus - prefix.bonus

        def finish(self, state: CTCDecoderLMState) -> tuple[CTCDecoderLMState, float]:
            return state, scorer.weigh(*scorer.lm.finish(self.prefixes[state].state))

    rows = torch.from_numpy(log_probabilities(logits)).float()
    names = [str(index) for index in range(rows.shape[1])]
    decoder = ctc_decoder(
        lexicon=None,
        tokens=names,
        lm=Bonus() if lm or beta else None,
        nbest=size,
        beam_size=size,
        beam_size_token=max(1, int((rows.exp() >= prune).sum(-1).max())),
        beam_threshold=1e9,
        lm_weight=1.0,
        log_add=True,
        blank_token=names[-1],
        sil_token=names[-1],
    )
    found = []
    for each in decoder(rows[None])[0]:
        prefix = functools.reduce(scorer.child, each.tokens.tolist(), root)
        found.append(Hypothesis(prefix.spell(), each.score, each.score - scorer.total(prefix)))
    return found


def _check_weights(size: int, prune: float, alpha: float) -> None:
    if size < 1 or not 0 <= prune <= 1 or not alpha >= 0:
        given = f"size={size}, prune={prune}, alpha={alpha}"
        raise ValueError(f"size must be >= 1, prune from 0 to 1 and alpha >= 0, got {given}")


def log_probabilities(logits: Tensor) -> np.ndarray:
    """Natural logarithms of the probabilities, float64 [T, V]; ValueError if one is NaN."""
    rows = logits.detach().double().log_softmax(-1).cpu().numpy()
    if np.isnan(rows).any():
        raise ValueError("the model's output has NaN or infinite values")
    return rows
