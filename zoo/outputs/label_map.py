"""The categories of a detector: names, the ids that a data set gives them, and the indices that a model gives them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from zoo.text import one_line, unknown


@dataclass(frozen=True)
class LabelMap:
    """An ordered list of categories. A model's output `index` is category `names[index]`, which its data set calls
    `ids[index]`.

    Args:
        names: of the categories, each once.
        ids: of the categories in the data set, each once: integers >= 0, in any order and with holes.

    Raises:
        ValueError: the list is empty, or a name or an id is invalid or appears twice.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "ids", tuple(self.ids))
        if not self.names:
            raise ValueError("there must be at least one category")
        if len(self.names) != len(self.ids):
            raise ValueError(f"there are {len(self.names)} names of categories, but {len(self.ids)} ids")
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"the name of a category must be a string that is not blank, got {_shown(name)}")
        for id in self.ids:
            if not is_id(id):
                raise ValueError(f"the id of a category must be an integer >= 0, got {_shown(id)}")
        for what, values in (("name", self.names), ("id", self.ids)):
            value, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{times} categories have the same {what} {_shown(value)}")

    @classmethod
    def from_coco(cls, categories: object, used: Collection[int]) -> LabelMap:
        """The categories of a COCO json, ordered by id.

        A parent without objects is omitted, as exports have them: a category that no annotation uses, and that other
        categories name as their supercategory.

        Args:
            categories: the json's list of `{"id": ..., "name": ..., "supercategory": ...}`.
            used: the category ids of the annotations.
        """
        if not isinstance(categories, list) or not all(isinstance(each, Mapping) for each in categories):
            raise ValueError("categories must be a list of JSON objects with an id and a name")
        parents = {
            other.get("supercategory")
            for other in categories
            if isinstance(other.get("supercategory"), str) and other.get("supercategory") != other.get("name")
        }
        kept = []
        for each in categories:
            if lacking := [key for key in ("id", "name") if key not in each]:
                raise ValueError(f"a category lacks its {lacking[0]}: {one_line(dict(each), 100)}")
            if not is_id(each["id"]):
                raise ValueError(f"the id of a category must be an integer >= 0, got {_shown(each['id'])}")
            if each["id"] in used or not isinstance(each["name"], str) or each["name"] not in parents:
                kept.append(each)
        kept.sort(key=lambda each: each["id"])
        return cls(tuple(each["name"] for each in kept), tuple(each["id"] for each in kept))

    @classmethod
    def from_names(cls, names: object, first: int = 0) -> LabelMap:
        """Categories from their names in order, with ids from `first` on; or from a mapping of ids to names, by id."""
        if isinstance(names, Mapping):
            if odd := [id for id in names if not is_id(id)]:
                raise ValueError(f"the id of a category must be an integer >= 0, got {_shown(odd[0])}")
            ids = sorted(names)
            return cls(tuple(names[id] for id in ids), tuple(ids))
        if not isinstance(names, Iterable) or isinstance(names, str):
            raise ValueError(f"the names of categories must be a list or a mapping, got {_shown(names)}")
        listed = tuple(names)
        return cls(listed, tuple(range(first, first + len(listed))))

    def index_of_id(self, id: int) -> int:
        """The index of the category with this id in the data set; ValueError if there is none."""
        if not is_id(id) or id not in self._by_id:
            raise ValueError(f"unknown category id {_shown(id)}; known: {_few(self.ids)}")
        return self._by_id[id]

    def index_of_name(self, name: str) -> int:
        """The index of the category with this name; ValueError if there is none."""
        if name not in self._by_name:
            raise ValueError(unknown("category", name, self.names))
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """The (name, id) pairs, by index."""
        return iter(zip(self.names, self.ids, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The argument of `from_dict`, in JSON's types."""
        return {"categories": [{"id": id, "name": name} for name, id in self]}

    @classmethod
    def from_dict(cls, stored: object) -> LabelMap:
        """The inverse of `to_dict`; ValueError if `stored` is anything else."""
        categories = stored.get("categories") if isinstance(stored, Mapping) and len(stored) == 1 else None
        fields = {"id", "name"}
        if not isinstance(categories, list) or not all(
            isinstance(each, Mapping) and each.keys() == fields for each in categories
        ):
            raise ValueError('labels must be {"categories": [{"id": ..., "name": ...}, ...]}')
        return cls(tuple(each["name"] for each in categories), tuple(each["id"] for each in categories))

    @functools.cached_property
    def _by_id(self) -> dict[int, int]:
        return {id: index for index, id in enumerate(self.ids)}

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value from a file can be an id: an integer >= 0 that fits in int64."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _shown(value: object) -> str:
    return one_line(repr(value), 60)


def _few(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return ", ".join(map(str, ids[:10])) + more
