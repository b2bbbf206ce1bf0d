import pytest

from zoo.text import from_json, one_line, plain, reason


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
