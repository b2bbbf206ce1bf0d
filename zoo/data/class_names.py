"""The names of classes: files that list them, those of ImageNet, and which output of a checkpoint a name means."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.text import from_json, near, one_line, plain, reason

WNID = r"n\d{8}"


class Names(NamedTuple):
    """Classes under all their names, by number from 0; or `ids`, numbers that name them in another order."""

    classes: list[tuple[str, ...]]
    ids: dict[int, str] = {}  # noqa: RUF012 (it is never changed)


def imagenet() -> Names:
    """The 1,000 classes of ImageNet by their usual numbers: synset and names."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return Names([(wnid, *_spellings(info.label_name_to_description(wnid))) for wnid in info.label_names()])


def _spellings(text: str) -> list[str]:
    """A list of synonyms as a whole, and each of them."""
    parts = [part.strip() for part in text.split(",")]
    return list(dict.fromkeys([text.strip(), *parts]))


def read_names(path: Path) -> Names:
    """The classes in a file: JSON (a list of names, or names by number as in imagenet_class_index.json), a text with a
    class per line (`NAME`, `SYNSET NAMES`, or `SYNSET NUMBER NAME` as in map_clsloc.txt), or meta.mat of ILSVRC2012.

    Raises:
        ValueError: the file cannot be read, or is none of these.
    """
    suffix = path.suffix.lower()
    try:
        found = _from_mat(path) if suffix == ".mat" else _parsed(path.read_bytes().decode("utf-8-sig"), suffix)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not found.classes:
        raise ValueError(f"{path}: lists no classes")
    return found


def _parsed(text: str, suffix: str) -> Names:
    if suffix == ".json":
        return _from_json(from_json(text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(rf"({WNID})\s+(\d{{1,6}})\s+(\S+)", line) for line in lines]
    if lines and all(numbered):
        parts = [each.groups() for each in numbered if each]
        return Names([(wnid, word.replace("_", " ")) for wnid, _, word in parts], _ids(parts))
    synsets = [re.fullmatch(rf"({WNID})\s+(.+)", line) for line in lines]
    return Names(
        [(each[1], *_spellings(each[2])) if each else (line,) for each, line in zip(synsets, lines, strict=True)]
    )


def _ids(parts: list[Any]) -> dict[int, str]:
    ids = {int(number): wnid for wnid, number, _ in parts}
    if len(ids) < len(parts):
        raise ValueError("a number names two classes")
    return ids


def _from_json(found: Any) -> Names:
    if isinstance(found, dict) and found and all(re.fullmatch(r"\d{1,6}", key) for key in found):
        numbers = sorted(map(int, found))
        if numbers != list(range(len(found))):
            raise ValueError(f"the numbers of {len(found)} classes must be 0 to {len(found) - 1}")
        found = [found[str(number)] for number in numbers]
    elif isinstance(found, dict):
        found = [[name, *([other] if isinstance(other, str) else other)] for name, other in found.items()]
    if not isinstance(found, list):
        raise ValueError("must be a list of names, or names by number")
    classes = []
    for each in found:
        names = [each] if isinstance(each, str) else each
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"the names of class {len(classes)} must be strings, got {one_line(repr(each), 60)}")
        classes.append(tuple(spelling for name in names for spelling in _spellings(name)))
    return Names(classes)


def _from_mat(path: Path) -> Names:
    """The synsets of the development kit of ILSVRC2012, whose numbers are those of its ground truth."""
    from scipy.io import loadmat

    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        parts = [(str(row["WNID"]), int(row["ILSVRC2012_ID"]), str(row["words"])) for row in rows]
    except OSError:
        raise
    except Exception as error:  # SciPy raises errors of many kinds
        raise ValueError(f"not the meta.mat of ILSVRC2012: {one_line(error, 100)}") from None
    parts = [part for part in parts if part[1] <= 1000]  # those behind are parents
    return Names([(wnid, *_spellings(words)) for wnid, _, words in parts], _ids(parts))


class Classes:
    """Finds the output of a checkpoint that the name of a class means: by its own label, or by another name of it in a
    table, without regard to case and underscores.

    A table whose order is that of the checkpoint's outputs decides between classes of the same name, and gives numbers.

    Args:
        labels: of the outputs.
        tables: classes under all their names.
    """

    def __init__(self, labels: Sequence[str], tables: Sequence[Names]) -> None:
        self.labels = tuple(labels)
        self.numbers: dict[int, int | None] = {}  # the output that a number means, None for an unknown class
        self._exact: dict[str, set[int]] = {}
        self._other: dict[str, set[int]] = {}
        for output, label in enumerate(self.labels):
            self._exact.setdefault(_key(label), set()).add(output)
        for table in tables:
            outputs = self._learned(table)
            if outputs and not table.ids and not self.numbers:
                self.numbers = {place: outputs.get(place) for place in range(len(table.classes))}
        if ids := next((table.ids for table in tables if table.ids), None):
            self.numbers = {number: self.find(wnid) for number, wnid in ids.items()}

    def _learned(self, table: Names) -> dict[int, int]:
        """The outputs of the table's classes, by their places; their other names are known from now on."""
        known = [{_key(name) for name in names} for names in table.classes]
        same = sum(_key(label) in names for label, names in zip(self.labels, known, strict=False))
        places: dict[str, set[int]] = {}
        for place, names in enumerate(known):
            for name in names:
                places.setdefault(name, set()).add(place)
        outputs: dict[int, int] = {}
        if len(self.labels) == len(known) and 2 * same > len(known):
            outputs = {place: place for place in range(len(known))}
        else:
            for output, label in enumerate(self.labels):
                if len(found := places.get(_key(label), set())) == 1:
                    outputs[min(found)] = output
        for place, output in outputs.items():
            for name in known[place]:
                self._other.setdefault(name, set()).add(output)
        return outputs

    def find(self, name: str) -> int | None:
        """The output of a class; None if it is unknown.

        Raises:
            ValueError: several outputs have this name.
        """
        key = _key(name)
        found = self._exact.get(key) or self._other.get(key) or set()
        if len(found) > 1:
            first, second, *_ = sorted(found)
            two = f"outputs {first} ({self.labels[first]}) and {second} ({self.labels[second]})"
            raise ValueError(plain(f"class '{name}' may be {two} of the checkpoint; use synsets, or give --names FILE"))
        return min(found, default=None)

    def hint(self, name: str) -> str:
        """Labels like this name, or the first ones, to follow an error."""
        found = near(name, self.labels)
        return f"did you mean {' or '.join(found)}?" if found else f"it knows: {one_line(', '.join(self.labels), 100)}"


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
