"""The times of words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.outputs.ctc import frames_for, log_probabilities

if TYPE_CHECKING:
    from zoo.outputs.tokens import Tokenizer

TAIL = 0.16  # most seconds that a word lasts after its last token


class Word(NamedTuple):
    """A word and its time: `start` and `end` in seconds, `probability` in 0..1."""

    text: str
    start: float
    end: float
    probability: float


def words(logits: Tensor, tokens: Sequence[int], tokenizer: Tokenizer, seconds_per_frame: float) -> list[Word]:
    """The time of each word, by the likeliest alignment of the tokens to the frames.

    CTC gives a token few frames, often one, near where its sound begins. `start` is the first frame of the word's first
    token. `end` is an estimate: the word takes half of the blanks that follow its last token, but at most `TAIL`
    seconds of them. A word's probability is the geometric mean of that of its tokens' frames.

    Args:
        logits: [T, V], or log-probabilities; the valid frames of one clip.
        tokens: the transcript, without blanks.
        tokenizer: decides which tokens start a word and how words are spelt.
        seconds_per_frame: from one frame of `logits` to the next.

    Raises:
        ValueError: a token is not in the vocabulary, or there are more tokens (and blanks between equal neighbours)
            than frames.
    """
    from torchaudio.functional import forced_align, merge_tokens

    if not tokens:
        return []
    frames, blank = logits.shape[0], logits.shape[1] - 1
    if not 0 <= min(tokens) <= max(tokens) < blank:
        raise ValueError(f"tokens must be from 0 to {blank - 1}, got {min(tokens)} to {max(tokens)}")
    needed = frames_for(tokens)
    if needed > frames:
        raise ValueError(f"{len(tokens)} tokens need at least {needed} frames, got {frames}")
    rows = torch.from_numpy(log_probabilities(logits)).float()
    path, scores = forced_align(rows[None], torch.tensor([tokens]), blank=blank)
    grouped: list[list[Any]] = []
    merged = merge_tokens(path[0], scores[0], blank=blank)
    following = {span.start: after.start for span, after in itertools.pairwise(merged)}
    for span in merged:
        if tokenizer.starts_word(span.token) or not grouped:
            grouped.append([])
        grouped[-1].append(span)
    found = []
    for spans in grouped:
        text = tokenizer.decode([span.token for span in spans]).strip()
        spans = [span for span in spans if tokenizer.decode([span.token]).strip()]  # a space is not part of a word
        if text and spans:
            start, last = spans[0].start, spans[-1]
            free = (following.get(last.start, frames) - last.end) * seconds_per_frame
            end = last.end * seconds_per_frame + min(free / 2, TAIL)
            mean = sum(span.score * len(span) for span in spans) / sum(len(span) for span in spans)
            found.append(Word(text, start * seconds_per_frame, end, math.exp(mean)))
    return found
