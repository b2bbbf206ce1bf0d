"""config.json: its fields, its format, and how older formats are read."""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import zoo
from zoo.config import Config
from zoo.inputs import Preprocess, kinds_of
from zoo.models import FAMILIES
from zoo.outputs import LABELS
from zoo.quick import card
from zoo.text import from_json, one_line, reason, unknown
from zoo.weights.figures import checked_figures
from zoo.weights.files import TENSORS, CheckpointError

FORMAT = 4
FIELDS = {"format": int, "zoo": str, "family": str, "preset": str | None, "model": dict, "preprocess": dict | None}
FIELDS |= {"labels": list | dict | None, "fused": bool, "source": str, "card": str, "license": str, "datasets": list}
FIELDS |= {"figures": list, "base": dict | None, "dtype": str, "files": dict, "parameters": int, "cost": dict | None}
ABOUT: dict[str, Any] = {"source": "", "card": "", "license": "unknown", "datasets": [], "figures": [], "base": None}
"""The fields that say where a model comes from and what it does, and their values where nothing is known."""
DTYPES = ("float32", "float16", "bfloat16")
BASE = ("address", "commit", "layout")  # the fields of `base`, the model that this one was made from


def _one_field_of_labels(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Format 2 had the names of classes and the tokenizer in two fields. Families migrate their own fields."""
    if missing := [name for name in ("labels", "tokenizer") if name not in written]:
        raise CheckpointError(f"lacks field {missing[0]!r}")
    labels, tokenizer = written.pop("labels"), written.pop("tokenizer")
    if tokenizer is not None and labels is not None:
        raise CheckpointError("it has both labels and a tokenizer")
    family = FAMILIES.get(str(written.get("family")))
    model = written.get("model")
    if family is not None and isinstance(model, dict):
        written["model"] = family.migrated(model)
    return written | {"format": 3, "labels": labels if tokenizer is None else tokenizer}


def _what_the_card_said(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Format 3 had the license, the text and the figures in README.md alone, and no hashes."""
    license, text, rows = card(folder)
    names = [*rows]
    measured = names[names.index("fused") + 1 :] if "fused" in names else []
    n = rows.get("n", "0")
    figures = []
    for name in measured:
        with suppress(ValueError):  # not every row was a number
            if name not in ("parameters", "n") and math.isfinite(value := float(rows[name])):
                common = {"data": "", "split": "", "n": int(n) if n.isdecimal() else 0, "interval": None, "command": ""}
                figures.append({"metric": name, "value": value} | common)
    parameters = rows.get("parameters", "").replace(",", "")
    known = {"license": license or "unknown", "card": text, "figures": figures, "dtype": "float32", "cost": None}
    known |= {"parameters": int(parameters) if parameters.isdecimal() else 0}
    return written | {"format": 4, "datasets": [], "base": None, "files": {}} | known


# From a format to the next: takes a config.json of that format and its folder, returns it in the next format.
MIGRATIONS: dict[int, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    1: lambda written, _: written | {"format": 2, "tokenizer": None},
    2: _one_field_of_labels,
    3: _what_the_card_said,
}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json in the newest format; CheckpointError if it is invalid or from a newer zoo."""
    try:
        written = from_json(path.read_bytes(), finite=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(written, dict) or type(written.get("format")) is not int:
        raise CheckpointError(f"{path} is not the config of a checkpoint: format must be an integer")
    writer = f"zoo {written.get('zoo')}"
    if written["format"] > FORMAT:
        news = f"format {written['format']} of {writer}; zoo {zoo.__version__} reads up to {FORMAT}: upgrade zoo"
        raise CheckpointError(f"{path} has {one_line(news)}")
    while written["format"] < FORMAT:
        if written["format"] not in MIGRATIONS:
            raise CheckpointError(f"{path} has format {written['format']}, which zoo {zoo.__version__} does not know")
        try:
            written = MIGRATIONS[written["format"]](written, path.parent)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if odd := sorted(FIELDS.keys() ^ written.keys()):
        verb = "lacks" if odd[0] in FIELDS else "has an unknown"
        raise CheckpointError(f"{path} {verb} field {one_line(odd[0], 100)!r}")
    if wrong := [key for key, kind in FIELDS.items() if not isinstance(written[key], kind)]:
        raise CheckpointError(f"{path}: {wrong[0]} has the wrong type, {type(written[wrong[0]]).__name__}")
    try:
        check_about(written)
        _check_files(written["files"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if written["family"] not in FAMILIES:
        raise CheckpointError(
            f"{path}: unknown family {one_line(written['family'], 100)!r}; zoo has: {', '.join(FAMILIES)}"
        )
    known = {field.name for field in fields(FAMILIES[written["family"]])}
    if unknown := [field for field in written["model"] if field not in known]:
        field = one_line(unknown[0], 100)
        age = f"{one_line(writer)} wrote the model field {field!r}, which zoo {zoo.__version__} does not know"
        raise CheckpointError(f"{path}: {age}")
    return written


def check_about(written: Mapping[str, Any]) -> None:
    """ValueError if one of the fields of ABOUT is invalid."""
    for name in ("source", "card", "license"):
        if not isinstance(written[name], str):
            raise ValueError(f"{name} must be a string, got {type(written[name]).__name__}")
    if not re.fullmatch(r"[\w.+-]{1,100}", written["license"]):
        raise ValueError(f"license must be a name such as apache-2.0, got {one_line(written['license'], 40)!r}")
    if written.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {one_line(written['dtype'], 40)!r}")
    cost = written.get("cost")
    if cost is not None and not (
        {*cost} == {"multiply_adds", "input"} and type(cost["multiply_adds"]) is int and isinstance(cost["input"], list)
    ):
        raise ValueError("cost must have the fields multiply_adds and input, an integer and a shape")
    datasets = written["datasets"]
    if not isinstance(datasets, list | tuple) or not all(isinstance(each, str) for each in datasets):
        raise ValueError("datasets must be a list of names")
    checked_figures(written["figures"])
    base = written["base"]
    if base is not None and not (
        isinstance(base, Mapping) and {*base} == {*BASE} and all(isinstance(each, str | None) for each in base.values())
    ):
        raise ValueError(f"base must have the fields {', '.join(BASE)}, each a string or null")


def _check_files(files: Mapping[str, Any]) -> None:
    """ValueError if the sizes and hashes of the files of tensors are invalid; only old formats have none."""
    if files and {*files} != {*TENSORS}:
        raise ValueError(f"files must describe {' and '.join(TENSORS)}")
    for name, each in files.items():
        size, sha256 = (each.get("size"), each.get("sha256")) if isinstance(each, dict) else (None, None)
        hashed = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        if type(size) is not int or not 0 <= size < 1 << 50 or not hashed or len(each) != 2:
            raise ValueError(f"files: {name} must have a size in bytes and a sha256 in hexadecimal")


def write_preprocess(config: Config, preprocess: Preprocess) -> dict[str, Any]:
    """The field `preprocess` of config.json. It names the kind of preprocessing only if that differs from the input
    kind of the config."""
    name = next(name for name, kind in kinds_of(config.input).items() if isinstance(preprocess, kind))
    return ({} if name == config.input else {"kind": name}) | preprocess.to_dict()


def read_preprocess(config: Config, written: dict[str, Any]) -> Preprocess:
    """The inverse of `write_preprocess`; ValueError if the kind does not fit the config or a field is invalid."""
    if config.input is None:
        raise ValueError("this model takes no preprocess")
    kinds, fields = kinds_of(config.input), dict(written)
    if (name := fields.pop("kind", config.input)) not in kinds:
        raise ValueError(unknown("kind of preprocess", str(name), kinds))
    return kinds[name].from_dict(fields)


def check_fit(config: Config, preprocess: Preprocess | None, labels: Any) -> None:
    """ValueError if the preprocessing or the labels do not fit such a model."""
    if preprocess is not None:
        kinds = (*kinds_of(config.input).values(),)
        if not isinstance(preprocess, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds) or "None"
            raise ValueError(f"preprocess must be {wanted}, got {type(preprocess).__name__}")
        for name in preprocess.shared:
            if (given := getattr(preprocess, name)) != (taken := getattr(config, name)):
                raise ValueError(f"preprocess makes {given} {name}, but the model takes {taken}")
    if labels is None:
        return
    if config.labels is None:
        raise ValueError("this model's outputs take no labels")
    kind = LABELS[config.labels]
    if not kind.fits(labels):
        raise ValueError(f"labels must be {kind.what}, got {type(labels).__name__}")
    if (given := kind.number(labels)) != config.labelled:
        raise ValueError(kind.misfit.format(given=given, wanted=config.labelled))
