"""From a speech model's frames to text: best path, prefix beam search, RNN-T greedy search, and the times of words.

Frames are logits over the vocabulary; its last index is the blank. Scores are natural logarithms of probabilities.
"""

from zoo.decoding.align import Word, words
from zoo.decoding.ctc import Hypothesis, beam, flashlight, frames_for, greedy
from zoo.decoding.lm import KenLM, LanguageModel
from zoo.decoding.transducer import Transducer, transducer_greedy

__all__ = [
    "Hypothesis",
    "KenLM",
    "LanguageModel",
    "Transducer",
    "Word",
    "beam",
    "flashlight",
    "frames_for",
    "greedy",
    "transducer_greedy",
    "words",
]
