"""Configs in YAML from elsewhere, read with limits: a small text cannot cause large use of memory or time, and no code
is run."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from zoo.text import one_line

BYTES, NODES, SCALAR = 2**20, 200_000, 2**16
"""The most bytes of a config, values with its aliases written out, and characters of one value."""


def config_of(text: bytes, where: str) -> Mapping[str, Any]:
    """A config in YAML; ValueError if it is not one, repeats a key, or grows too large with its aliases written out."""
    import yaml

    if len(text) > BYTES:
        raise ValueError(f"{where} has {len(text):,} bytes; at most {BYTES:,} are read")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _count(node, {}, where)
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(one_line(f"{where} cannot be read as YAML: {error}")) from error
    except ValueError as error:  # our own, or from a number or date that Python rejects
        message = str(error)
        raise ValueError(
            message if message.startswith(where) else one_line(f"{where} cannot be read as YAML: {error}")
        ) from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is not the config of a model")
    return values


def _count(node: Any, known: dict[int, int], where: str) -> int:
    """How many values a node has with its aliases written out; ValueError if there are too many."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"{where}: a value contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node.value, str):
        if len(node.value) > SCALAR:
            raise ValueError(f"{where}: a value has more than {SCALAR:,} characters")
        total = 1
    elif node.id == "mapping":
        keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if keys and max(keys.values()) > 1:
            raise ValueError(one_line(f"{where}: the key {keys.most_common(1)[0][0]!r} appears twice"))
        total = 1 + sum(_count(each, known, where) for pair in node.value for each in pair)
    else:
        total = 1 + sum(_count(each, known, where) for each in node.value)
    if total > NODES:
        raise ValueError(f"{where} has more than {NODES:,} values; repeated aliases are not supported")
    known[id(node)] = total
    return total
