"""Labels of a model's outputs: the names of classes, the pieces of a tokenizer, or the categories of objects."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

from zoo.outputs.answers import best_boxes, best_classes, best_text
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Tokenizer, tokenizer_from_dict


class LabelKind(NamedTuple):
    """One kind of labels: how they are checked, stored as JSON and read again, and turned into an answer."""

    what: str  # name in an error
    misfit: str  # error for another number than the model's
    fits: Callable[[Any], bool]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]
    number: Callable[[Any], int]  # outputs that have a label
    names: Callable[[Any], Sequence[str]]  # the name of each output, for those that have one
    variable: str  # the name of such labels in a line of code
    answer: Callable[[Any, Iterable[Any], Any], Any]  # from a model, the parts of its prepared input and the labels


def _are_names(labels: Any) -> bool:
    several = isinstance(labels, Iterable) and isinstance(labels, Sized)
    ordered = several and not isinstance(labels, str | Mapping | set | frozenset)
    return ordered and all(isinstance(each, str) for each in labels)


def _read_names(stored: object) -> tuple[str, ...]:
    if not _are_names(stored):
        raise ValueError("labels must be a list of names")
    return tuple(stored)  # pyright: ignore[reportArgumentType]


LABELS: dict[str, LabelKind] = {
    "classes": LabelKind(
        "a list of names, one for each class",
        "labels has {given} names, but the model has {wanted} classes",
        _are_names,
        lambda labels: [str(label) for label in labels],
        _read_names,
        len,
        tuple,
        "labels",
        best_classes,
    ),
    "tokenizer": LabelKind(
        "a tokenizer",
        "the tokenizer has {given} pieces with the blank, but the model {wanted}",
        lambda labels: isinstance(labels, Tokenizer),
        lambda tokenizer: tokenizer.to_dict(),
        tokenizer_from_dict,
        lambda tokenizer: tokenizer.vocabulary,
        lambda tokenizer: tokenizer.pieces,
        "tokenizer",
        best_text,
    ),
    "categories": LabelKind(
        "a LabelMap",
        "labels has {given} categories, but the model has {wanted} classes",
        lambda labels: isinstance(labels, LabelMap),
        lambda labels: labels.to_dict(),
        LabelMap.from_dict,
        len,
        lambda labels: labels.names,
        "labels",
        best_boxes,
    ),
}
