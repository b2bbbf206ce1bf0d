"""Messages in one line."""

import pytest

from zoo.text import counted, from_json, listed, near, one_line, plain, reason, unknown


def test_an_unknown_name_says_what_is_near_and_what_is_allowed():
    few, many = ["softmax", "sla", "pool"], [f"model_{number}" for number in range(30)]
    assert unknown("mixer", "slaa", few) == "unknown mixer 'slaa'; did you mean sla? choose from: softmax, sla, pool"
    assert unknown("mixer", "x", few) == "unknown mixer 'x'; choose from: softmax, sla, pool"
    assert unknown("model", "modl_7", many).startswith("unknown model 'modl_7'; did you mean model_7")
    assert "choose from" not in unknown("model", "modl_7", many)
    assert unknown("model", "x", many).endswith(", ".join(many))
    assert unknown("option", "x", []) == "unknown option 'x'; choose from: none"
    assert near("slaa", few) == ["sla"] and near("slaa", few, 0.9) == []


def test_one_printable_line():
    assert one_line("two\nlines\tand  \x1b[31mred\x07") == r"two lines and \x1b[31mred\x07"
    assert one_line(KeyError()) == "KeyError" and one_line("x" * 400) == "x" * 300
    assert plain("ä 猫\n\udcff") == r"ä 猫\n\udcff"
    assert reason(FileNotFoundError(2, "No such file\x1b", "a.wav")) == r"No such file\x1b"


def test_json_with_a_key_twice():
    assert from_json('{"a": [{"a": 1}, {"a": 2}]}') == {"a": [{"a": 1}, {"a": 2}]}
    for text in ('{"a": 1, "b": 2, "a": 1}', '[{"x": {"a": 1, "a": 2}}]', b'{"a": null, "a": null}'):
        with pytest.raises(ValueError, match="^key 'a' appears twice$"):
            from_json(text)
    with pytest.raises(ValueError):
        from_json("{")


def test_numbers_with_nouns():
    found = [counted(number, *noun) for noun in (["image"], ["batch", "batches"]) for number in (0, 1, 1234)]
    assert found == ["0 images", "1 image", "1,234 images", "0 batches", "1 batch", "1,234 batches"]


def test_long_lists_are_cut():
    names = [f"row{index}" for index in range(20)]
    assert listed(names[:15]) == ", ".join(names[:15])
    assert listed(names) == ", ".join(names[:14]) + " and 6 more"
    assert listed([]) == ""
