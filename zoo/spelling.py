"""Spelling mistakes in the options of a command, found before PyTorch is imported."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.quick import facts
from zoo.spec import parse
from zoo.text import near, unknown

# The table of the names in a field of a model's config, if its name differs.
TABLE_OF = {"conv_norm": ("norm",), "final_norm": ("norm",), "head": ("head (images)", "head (speech)")}
FORMER = ("modulate", "mixers")  # fields of earlier versions that are still accepted


def check(task: str, verb: str, arguments: list[str]) -> None:
    """ValueError for a misspelt option, field or name, with similar names; uncertain cases pass."""
    found = facts()["tasks"][task]
    options = found["options"] | found["own"][verb]
    given = [(f"--{name}", name, value) for name, value in settings(arguments)]
    for _, name, value in [*given]:
        if name == "config":
            given += [(f"{value}: {key}", key, entry) for key, entry in contents(value, options)]
    names = [value for _, key, value in given if key == "model.backbone.name" and value in facts()["models"]]
    for where, name, value in given:
        check_option(where, name, options)
        if name.startswith("model.backbone."):
            check_field(where, name.removeprefix("model.backbone."), value, names[0] if names else None)


def settings(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """The options among arguments, and their values as text."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            following = arguments[index + 1 : index + 2]
            yield name.removesuffix("+"), value if equals or not following else following[0]
        elif argument == "-c":
            yield "config", "".join(arguments[index + 1 : index + 2])


def contents(path: str, options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The options that a YAML file sets; none if it cannot be read."""
    import yaml

    def flat(values: Mapping[Any, Any], before: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            name = f"{before}{key}"
            if isinstance(value, dict) and (
                name not in options or name in ("model", "data", "trainer", "model.backbone")
            ):
                yield from flat(value, f"{name}.")
            else:
                yield name, value

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    return [*flat(found, "")] if isinstance(found, dict) else []


def check_option(where: str, name: str, options: Mapping[str, Any]) -> None:
    """ValueError if no option has this name but one is similar."""
    parts = name.split(".")
    if any(".".join(parts[:number]) in options for number in range(2, len(parts) + 1)) or name in options:
        return
    groups = {each.split(".")[0] for each in options}
    if parts[0] not in groups and (group := near(parts[0], groups, 0.7)):
        parts = [group[0], *parts[1:]]
        if ".".join(parts) in options or ".".join(parts[:2]) in options:
            raise ValueError(f"{where}: unknown option; did you mean --{'.'.join(parts)}?")
    ends = [each for each in options if each.split(".")[-1] == parts[-1]]
    fields = {field for family in facts()["families"].values() for field in family["fields"]}
    if not ends and parts[-1] in fields | {"name"}:
        ends = [f"model.backbone.{parts[-1]}"]
    if found := ends or near(".".join(parts), options, 0.75):
        raise ValueError(f"{where}: unknown option; did you mean {' or '.join(f'--{each}' for each in found)}?")


def check_field(where: str, field: str, value: Any, model: str | None) -> None:
    """ValueError if a model has no such field but a similar one, or if the value is a choice that does not
    exist."""
    if field == "name":
        if isinstance(value, str) and value not in facts()["models"]:
            raise ValueError(f"{where}: {unknown('model', value, facts()['models'])}")
        return
    families = facts()["families"]
    chosen = [families[facts()["models"][model]["family"]]] if model else families.values()
    fields = {each for family in chosen for each in family["fields"]}
    if field not in fields and field not in FORMER and near(field, fields):
        raise ValueError(f"{where}: {unknown(f'field of {model}' if model else 'field', field, fields)}")
    tables = TABLE_OF.get(field, (field,))
    rows = {name: row for table in tables for name, row in facts()["tables"].get(table, {"rows": {}})["rows"].items()}
    for spec in specs(value) if rows else ():
        try:
            name, options = parse(spec)
        except ValueError:
            continue
        if name not in rows:
            raise ValueError(f"{where}: {unknown(tables[0].split()[0], name, rows)}")
        for option, _ in options:
            if option not in rows[name]["options"]:
                raise ValueError(f"{where}: {unknown(f'option of {name}', option, rows[name]['options'])}")


def listed(text: str) -> Any:
    """The list in a YAML text, None if it is unreadable."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def specs(value: Any) -> Iterator[str]:
    """The names in a choice: one, or a list of them, which may be written as text."""
    if isinstance(value, str):
        yield from [value] if not value.startswith("[") else specs(listed(value))
    elif isinstance(value, list):
        for each in value:
            yield from specs(each)
