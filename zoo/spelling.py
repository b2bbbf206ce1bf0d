"""Mistakes in the options of a command that are found before PyTorch is imported: names and files."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zoo.quick import facts, stored, task_of
from zoo.spec import parse
from zoo.text import near, reason, unknown

# The table of the names in a field of a model's config, if its name differs.
TABLE_OF = {"conv_norm": ("norm",), "final_norm": ("norm",), "head": ("head (images)", "head (speech)")}
FORMER = ("modulate", "mixers")  # fields of earlier versions that are still accepted


def check(task: str, verb: str, arguments: list[str]) -> None:
    """ValueError for a misspelt option, field or name, with similar names; uncertain cases pass."""
    found = facts()["tasks"][task]
    options = found["options"] | found["own"][verb]
    given = [*expanded(arguments, options)]
    names = [value for _, key, value in given if key == "model.backbone.name" and value in facts()["models"]]
    families = [family for family in facts()["families"].values() if family["task"] == task]
    for where, name, value in given:
        check_option(where, name, options)
        if name.startswith("model.backbone."):
            field = name.removeprefix("model.backbone.")
            check_field(f"{where}: ", field, value, names[-1] if names else None, families)


def check_files(task: str, verb: str, arguments: list[str]) -> None:
    """ValueError if a config is not a file, or if the checkpoint or the run that is given belongs to another task."""
    for _, name, value in expanded(arguments):
        if name == "config":
            check_config(str(value))
        elif name in ("model.weights", "ckpt_path") and isinstance(value, str):
            path = Path(value).expanduser()
            run = path if path.is_dir() else path.parent.parent
            folders = (path, Path("checkpoints", value)) if name == "model.weights" else (run / "last", run / "best")
            kept = next((folder for folder in folders if (folder / "config.json").is_file()), None)
            if kept is not None and (other := task_of_folder(kept)) not in (None, task):
                raise ValueError(f"`zoo {task}` cannot use {value}; use `zoo {other} {verb}`")


def check_config(given: str) -> None:
    """ValueError if the value of --config is a path, but not that of a YAML file with options."""
    import yaml

    path = Path(given).expanduser()
    if "{" in given or "\n" in given:
        return
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"--config: {given} cannot be read as YAML: {reason(error)}") from None
        if not isinstance(found, dict | None):
            raise ValueError(f"--config: {given} must hold options by name, got a {type(found).__name__}")
        return
    if path.is_dir():
        raise ValueError(f"--config must be a YAML file, but {given} is a folder")
    files = {file.stem: file for file in (*Path("configs").glob("*/*.yaml"), *path.parent.glob("*.y*ml"))}
    similar = near(path.stem, files, 0.75)
    hint = f"; did you mean {files[similar[0]]}?" if similar else ""
    raise ValueError(f"--config: file not found: {given}{hint}")


def task_of_folder(folder: Path) -> str | None:
    """The task of a checkpoint; None if it is unknown or its config.json cannot be read."""
    try:
        return task_of(stored(folder))
    except ValueError:
        return None


def expanded(arguments: list[str], options: Mapping[str, Any] = MappingProxyType({})) -> Iterator[tuple[str, str, Any]]:
    """The options among arguments and in the files of --config, in their order, so that the last one of a name holds:
    where each was found, its name and its value. The values of `options` are not divided further."""
    for name, value in settings(arguments):
        yield f"--{name}", name, value
        if name == "config":
            yield from ((f"{value}: {key}", key, entry) for key, entry in contents(value, options))


def settings(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """The options among arguments, and their values as text."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            following = arguments[index + 1 : index + 2]
            yield name.removesuffix("+"), value if equals or not following else following[0]
        elif argument == "-c" or argument.startswith("-c="):
            yield "config", argument[3:] or "".join(arguments[index + 1 : index + 2])


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
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
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


def check_field(where: str, field: str, value: Any, model: str | None, families: Iterable[Any] = ()) -> None:
    """ValueError if a model has no such field, or if the value is a choice that does not exist.

    Args:
        where: the beginning of the message.
        field: a field of the model's config.
        value: its value.
        model: the name of the model; None if it is unknown, and then only fields with a similar name are refused.
        families: the possible families of an unknown model, whose choices are offered; by default all.
    """
    if field == "name":
        if isinstance(value, str) and value not in facts()["models"]:
            raise ValueError(f"{where}{unknown('model', value, facts()['models'])}")
        return
    known = facts()["families"]
    families = [known[facts()["models"][model]["family"]]] if model else [*families] or [*known.values()]
    fields = {each: None for family in (families if model else known.values()) for each in family["fields"]}
    if field not in fields and field not in FORMER and (model or near(field, fields)):
        raise ValueError(f"{where}{unknown(f'field of {model}' if model else 'field', field, fields)}")
    tables = TABLE_OF.get(field, (field,))
    rows = {name: row for table in tables for name, row in facts()["tables"].get(table, {"rows": {}})["rows"].items()}
    axes = {family["axes"] for family in families}
    offered = [name for name, row in rows.items() if axes & {*row.get("axes", axes)}]
    for spec in specs(value) if rows else ():
        try:
            name, options = parse(spec)
        except ValueError:
            continue
        if name not in rows:
            raise ValueError(f"{where}{unknown(tables[0].split()[0], name, offered)}")
        for option, _ in options:
            if option not in rows[name]["options"]:
                raise ValueError(f"{where}{unknown(f'option of {name}', option, rows[name]['options'])}")


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
