"""config.json: its fields, its format, and how older formats are read."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import zoo
from zoo.config import Config
from zoo.inputs import Preprocess, kinds_of
from zoo.models import FAMILIES
from zoo.outputs import LABELS
from zoo.text import from_json, one_line, reason, unknown
from zoo.weights.files import CheckpointError

FORMAT = 3
FIELDS = {"format": int, "zoo": str, "family": str, "preset": str | None, "model": dict, "preprocess": dict | None}
FIELDS |= {"labels": list | dict | None, "fused": bool, "source": str}


def _one_field_of_labels(written: dict[str, Any]) -> dict[str, Any]:
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


# From a format to the next: takes a config.json of that format, returns it in the next format.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda written: written | {"format": 2, "tokenizer": None},
    2: _one_field_of_labels,
}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json in the newest format; CheckpointError if it is invalid or from a newer zoo."""
    try:
        written = from_json(path.read_bytes())
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
            written = MIGRATIONS[written["format"]](written)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if odd := sorted(FIELDS.keys() ^ written.keys()):
        verb = "lacks" if odd[0] in FIELDS else "has an unknown"
        raise CheckpointError(f"{path} {verb} field {odd[0]!r}")
    if wrong := [key for key, kind in FIELDS.items() if not isinstance(written[key], kind)]:
        raise CheckpointError(f"{path}: {wrong[0]} has the wrong type, {type(written[wrong[0]]).__name__}")
    if written["family"] not in FAMILIES:
        raise CheckpointError(f"{path}: unknown family {written['family']!r}; zoo has: {', '.join(FAMILIES)}")
    known = {field.name for field in fields(FAMILIES[written["family"]])}
    if unknown := [field for field in written["model"] if field not in known]:
        age = f"{one_line(writer)} wrote the model field {unknown[0]!r}, which zoo {zoo.__version__} does not know"
        raise CheckpointError(f"{path}: {age}")
    return written


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
