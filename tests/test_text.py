"""Messages in one line."""

import pytest

from zoo.text import from_json, near, one_line, plain, unknown


def test_an_unknown_name_says_what_is_near_and_what_is_allowed():
    few, many = ["softmax", "sla", "pool"], [f"model_{number}" for number in range(30)]
    assert unknown("mixer", "slaa", few) == "unknown mixer 'slaa'; did you mean sla? choose from: softmax, sla, pool"
    assert unknown("mixer", "x", few) == "unknown mixer 'x'; choose from: softmax, sla, pool"
    assert unknown("model", "modl_7", many).startswith("unknown model 'modl_7'; did you mean model_7")
    assert "choose from" not in unknown("model", "modl_7", many)
    assert unknown("model", "x", many).endswith(", ".join(many))
    assert unknown("option", "x", []) == "unknown option 'x'; choose from: none"
    assert near("slaa", few) == ["sla"] and near("slaa", few, 0.9) == []


def test_what_a_terminal_would_obey_is_escaped():
    assert plain("a\x1b[31m\u202e\udcff é") == "a\\x1b[31m\\u202e\\udcff é"
    assert one_line("a\n\tb\x1b", most=4) == "a b\\x1b" and one_line(ValueError()) == "ValueError"


def test_a_key_that_appears_twice_is_refused():
    assert from_json('{"a": {"b": 1}}') == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="key 'b' appears twice"):
        from_json('{"a": {"b": 1, "b": 1}}')
