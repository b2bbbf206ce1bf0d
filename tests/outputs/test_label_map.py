import json
from typing import Any

import pytest

from zoo.outputs import LABELS, LabelMap


def coco(*pairs: tuple[int, str], parent: str = "none") -> list[dict[str, Any]]:
    return [{"id": id, "name": name, "supercategory": parent} for id, name in pairs]


def test_indices_follow_the_ids_with_holes_and_the_way_back():
    labels = LabelMap.from_coco(coco((90, "toothbrush"), (1, "person"), (13, "stop sign")), ())
    assert labels.names == ("person", "stop sign", "toothbrush") and labels.ids == (1, 13, 90) and len(labels) == 3
    for index, (name, id) in enumerate(labels):
        assert labels.index_of_id(id) == labels.index_of_name(name) == index


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_id_does_not_matter(first: int):
    labels = LabelMap.from_coco(coco((first, "a"), (first + 1, "b")), ())
    assert [labels.index_of_id(first), labels.index_of_id(first + 1)] == [0, 1]
    assert LabelMap.from_names(["a", "b"], first) == LabelMap.from_names({first + 1: "b", first: "a"}) == labels


def test_an_empty_parent_is_omitted():
    exported = [*coco((0, "cells")), *coco((1, "RBC"), (2, "WBC"), parent="cells")]
    assert LabelMap.from_coco(exported, {1, 2}).names == ("RBC", "WBC")
    assert LabelMap.from_coco(exported, {0, 1}).names == ("cells", "RBC", "WBC")  # it has objects
    own = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "dog", "supercategory": "animal"}]
    assert LabelMap.from_coco(own, {2}).names == ("person", "dog")  # a category that is its own parent
    assert LabelMap.from_coco(coco((3, "empty"), (4, "used")), {4}).ids == (3, 4)  # no parent of others


def test_it_is_stored_as_json():
    labels, kind = LabelMap(("b", "a"), (7, 3)), LABELS["categories"]
    stored = json.loads(json.dumps(kind.write(labels)))
    assert stored == {"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
    assert kind.read(stored) == labels and kind.fits(labels) and not kind.fits(["b", "a"]) and kind.number(labels) == 2


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (["a"], "labels must be"),
        ({"categories": ["a"]}, "labels must be"),
        ({"categories": [{"id": 1}]}, "labels must be"),
        ({"categories": [{"id": 1, "name": "a", "more": 1}]}, "labels must be"),
        ({"categories": [], "more": 1}, "labels must be"),
        ({"categories": []}, "at least one category"),
        ({"categories": [{"id": True, "name": "a"}]}, "integer >= 0, got True"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "2 categories have the same id 1"),
    ],
    ids=str,
)
def test_other_json_is_refused(stored: Any, words: str):
    with pytest.raises(ValueError, match=words):
        LabelMap.from_dict(stored)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LabelMap(("a", "b", "a"), (1, 2, 3)), "2 categories have the same name 'a'"),
        (lambda: LabelMap(("a", "b"), (1, 1)), "2 categories have the same id 1"),
        (lambda: LabelMap(("a",), (1, 2)), "1 names of categories, but 2 ids"),
        (lambda: LabelMap(("a",), (-1,)), "integer >= 0, got -1"),
        (lambda: LabelMap(("a",), (2**70,)), "integer >= 0"),
        (lambda: LabelMap((" ",), (1,)), "not blank"),
        (lambda: LabelMap.from_coco({"a": 1}, ()), "must be a list"),
        (lambda: LabelMap.from_coco([{"id": 1}], ()), "lacks its name"),
        (lambda: LabelMap.from_coco([{"id": "1", "name": "a"}], ()), "got '1'"),
        (lambda: LabelMap.from_names("cat"), "must be a list or a mapping"),
        (lambda: LabelMap.from_names({"0": "cat"}), "got '0'"),
        (lambda: LabelMap.from_names([1]), "must be a string"),
        (lambda: LabelMap(("cat", "dog"), (1, 2)).index_of_id(3), "unknown category id 3; known: 1, 2$"),
        (lambda: LabelMap(("cat", "dog"), (1, 2)).index_of_id(True), "unknown category id True"),
        (lambda: LabelMap(("cat", "dog"), (1, 2)).index_of_name("cot"), "did you mean cat"),
        (lambda: LabelMap.from_names(range(30)), "must be a string"),
    ],
)
def test_errors_are_one_line(make: Any, words: str):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_long_list_of_ids_is_cut():
    with pytest.raises(ValueError, match=r"known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more$"):
        LabelMap.from_names([f"c{index}" for index in range(30)]).index_of_id(99)
