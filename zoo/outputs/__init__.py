"""How a model's output becomes an answer: labels by kind, a detector's best boxes, and from a speech model's frames to
text (best path, prefix beam search, RNN-T greedy search, the times of words).

Frames are logits over the vocabulary; its last index is the blank. Scores are natural logarithms of probabilities.
"""

from zoo.outputs.align import Word, words
from zoo.outputs.answers import Detection, Guess
from zoo.outputs.ctc import Hypothesis, beam, flashlight, frames_for, greedy
from zoo.outputs.label_map import LabelMap
from zoo.outputs.labels import LABELS
from zoo.outputs.lm import KenLM, LanguageModel
from zoo.outputs.transducer import Transducer, transducer_greedy

__all__ = [
    "LABELS",
    "Detection",
    "Guess",
    "Hypothesis",
    "KenLM",
    "LabelMap",
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
