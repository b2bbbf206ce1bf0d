"""From a model and its prepared input to a readable answer."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.outputs.boxes import best
from zoo.outputs.ctc import greedy
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Tokenizer
from zoo.outputs.transducer import transducer_greedy


class Guess(NamedTuple):
    """A class and its probability, 0..1."""

    label: str
    probability: float


class Detection(NamedTuple):
    """An object: its class, its score in 0..1, and its box, (left, top, right, bottom) in pixels of the image."""

    label: str
    score: float
    box: tuple[float, float, float, float]


@torch.inference_mode()
def best_classes(model: Any, parts: Iterable[Tensor], labels: Sequence[str] | None) -> list[Guess]:
    """The classes of one image [C, H, W], the most probable first; without labels they are called "class 0" and so on.

    Raises:
        ValueError: the model's output is NaN or infinite.
    """
    (image,) = parts
    logits = model(image[None].to(next(model.parameters()).device))[0].float()
    found = checked(logits).softmax(-1).sort(descending=True, stable=True)
    names = class_names(labels, len(logits))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [Guess(names[index], probability) for index, probability in pairs]


@torch.inference_mode()
def best_text(model: Any, parts: Iterable[Any], tokenizer: Tokenizer | None) -> str:
    """The greedy transcript of audio in parts, each with features [T, mels], or None for silence.

    Raises:
        ValueError: the tokenizer is missing, or the model's output is NaN or infinite.
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so its output cannot be turned into text")
    device = next(model.parameters()).device
    texts = []
    for part in parts:
        if part.features is None:
            continue
        lengths = torch.tensor([len(part.features)], device=device)
        made, lengths = model(part.features[None].to(device), lengths)
        made = checked(made.float())
        transducer = model.config.transducer
        (tokens,) = transducer_greedy(model.head, made, lengths) if transducer else greedy(made, lengths)
        texts += tokenizer.decode(tokens).split()
    return " ".join(texts)


@torch.inference_mode()
def best_boxes(model: Any, parts: Iterable[Any], labels: LabelMap | None) -> list[Detection]:
    """The objects of one image, at most 100, the highest score first; without labels the classes are called "class 0"
    and so on.

    `parts` has one part, with `image` [C, H, W] and the `size` (height, width) of the original image.

    Raises:
        ValueError: the model's output is NaN or infinite.
    """
    (part,) = parts
    device = next(model.parameters()).device
    output = model(part.image[None].to(device))
    classes = model.config.labelled
    sizes, overlap = torch.tensor([part.size], device=device), model.config.detection_nms
    found = best(output["logits"], output["boxes"], sizes, classes, overlap=overlap)
    names = class_names(None if labels is None else labels.names, classes)
    columns = (each[found.scores >= 0].tolist() for each in found)
    return [Detection(names[label], score, tuple(box)) for label, score, box in zip(*columns, strict=True)]


def checked(output: Tensor) -> Tensor:
    """The output; ValueError if it is NaN or infinite."""
    if not bool(output.isfinite().all()):
        raise ValueError("the model's output is NaN or infinite")
    return output


def class_names(labels: Sequence[str] | None, count: int) -> list[str]:
    """The names of the classes, generated if there are none."""
    return [f"class {index}" for index in range(count)] if labels is None else list(labels)
