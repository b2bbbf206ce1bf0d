"""The parts of the `zoo` command that do not import PyTorch: lists, descriptions and short help.

It reads facts.json, which scripts/tables writes from the code.
"""

import functools
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from zoo.text import from_json, near, one_line, plain, unknown

CARD_HEAD = "| choice or figure | value |"  # of cards until format 3
FILES = ("README.md", "config.json", "model.safetensors", "probe.safetensors")
LARGEST = 1 << 20  # bytes of a card
SHOWN = ("mixer", "norm", "position", "ffn", "dim", "depth", "heads", "classes")  # fields of a checkpoint's model


@functools.cache
def facts() -> dict[str, Any]:
    """The contents of facts.json."""
    return json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))


def width() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def columns(pairs: Iterable[tuple[str, str]], left: int | None = None) -> Iterator[str]:
    """Two columns, the second wrapped; a first entry that is too long gets its own line."""
    pairs = [*pairs]
    left = left or min(32, max((len(first) for first, _ in pairs), default=0))
    for first, second in pairs:
        lines = textwrap.wrap(second, max(20, width() - left - 4)) or [""]
        if len(first) > left:
            yield f"  {first}"
            first = ""
        yield f"  {first:<{left}}  {lines[0]}".rstrip()
        yield from (f"  {'':<{left}}  {line}" for line in lines[1:])


# Lists


def kinds() -> dict[str, list[str]]:
    """The kinds of choices as `zoo list` names them, and the tables of each."""
    found: dict[str, list[str]] = {}
    for kind in facts()["tables"]:
        word = kind.split()[0]
        found.setdefault(f"{word}es" if word.endswith("s") else f"{word}s", []).append(kind)
    return found


def listing(what: str | None = None, pattern: str | None = None) -> str:
    """What `zoo list` prints: a kind of choices, models or checkpoints, those whose name matches a shell pattern.

    ValueError if nothing matches.
    """
    known, lists = [*kinds(), "models", "checkpoints"], list[str]()
    what = f"{what}s" if f"{what}s" in known else what
    if what is not None and what not in known:
        if pattern is not None:
            raise ValueError(unknown("kind", what, known))
        lists, what, pattern = [f"`zoo list {kind}`" for kind in near(what, known)], "models", what
    if what is None:
        counts = [(f"zoo list {kind}", f"{len(entries(kind)):3}  {said}") for kind, said in overview()]
        return "\n".join([*columns(counts), "", *columns(entries("models").items())])
    found = entries(what)
    chosen = {name: said for name, said in found.items() if fnmatchcase(name, pattern or "*")}
    if not chosen:
        if pattern is None:
            raise ValueError("no checkpoints in ./checkpoints")
        found = lists or similar(pattern)
        hint = f"did you mean {' or '.join(found)}?" if found else f"`zoo list {what}` shows all"
        raise ValueError(f"no {what} match '{pattern}'; {hint}")
    left = max(map(len, chosen))
    most = width() - left - 4 if sys.stdout.isatty() else None
    return "\n".join(plain(f"  {name:<{left}}  {cut(said, most)}") for name, said in chosen.items())


def listing_json(what: str | None, pattern: str | None) -> str:
    """What `zoo list --json` prints: of each model, choice or checkpoint, its facts by name. ValueError if there are
    none."""
    listing(what, pattern)
    what = f"{what}s" if f"{what}s" in [*kinds(), "models", "checkpoints"] else what or "models"
    if what == "models":
        found = facts()["models"]
    elif what == "checkpoints":
        found = known_checkpoints()
    elif what in kinds():
        found = {name: row for table in kinds()[what] for name, row in facts()["tables"][table]["rows"].items()}
    else:
        what, pattern, found = "models", what, facts()["models"]
    chosen = {name: each for name, each in found.items() if fnmatchcase(name, pattern or "*")}
    return json.dumps(chosen, indent=2)


def info_json(name: str) -> str:
    """What `zoo info --json` prints: the facts of the model, the choices and the checkpoint of this name."""
    found: dict[str, Any] = {"model": facts()["models"][name]} if name in facts()["models"] else {}
    found |= {kind: table["rows"][name] for kind, table in facts()["tables"].items() if name in table["rows"]}
    if (folder := checkpoint_folder(name)) is not None:
        found["checkpoint"] = told(folder)
    elif name in index():
        found["checkpoint"] = index()[name]
    if not found:
        info(name)  # says what is not there
    return json.dumps(found, indent=2)


def checkpoint_folder(name: str) -> Path | None:
    """The folder of a checkpoint: by its path, in ./checkpoints, or the best of a run."""
    path = Path(name).expanduser()
    places = [path, Path("checkpoints", path), path / "best"]
    return next((folder for folder in places if (folder / "config.json").is_file()), None)


def cut(text: str, most: int | None) -> str:
    """The text, cut between words to at most this many characters."""
    return text if most is None or len(text) <= most else text[: most - 3].rsplit(" ", 1)[0] + " ..."


def overview() -> Iterator[tuple[str, str]]:
    yield "models", "models; each is a call of zoo.create_model(NAME)"
    yield "checkpoints", "trained models of the zoo and in ./checkpoints"
    for kind, tables in kinds().items():
        yield kind, "; ".join(facts()["tables"][table]["about"] for table in tables)


def entries(what: str) -> dict[str, str]:
    """The names of a kind and a line about each."""
    if what == "checkpoints":
        return {name: checkpoint_line(found) for name, found in known_checkpoints().items()}
    if what == "models":
        return {name: model_line(model) for name, model in facts()["models"].items()}
    rows = [facts()["tables"][table]["rows"] for table in kinds()[what]]
    return {name: row["summary"] for each in rows for name, row in each.items()}


def model_line(model: Mapping[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:6.1f} M  {model['input']:<24}  {model['about'].partition(' (')[0]}"


def similar(name: str) -> list[str]:
    """Commands that show anything of a similar name."""
    names = {each for kind in (*kinds(), "models", "checkpoints") for each in entries(kind)}
    return [f"`zoo info {each}`" for each in near(name, names)]


# Checkpoints


def index() -> dict[str, Any]:
    """The checkpoints of the zoo by name: the contents of checkpoints.json, which scripts/tables writes."""
    path = Path(__file__).with_name("checkpoints.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def checkpoints() -> list[Path]:
    return sorted(path.parent for path in Path("checkpoints").glob("*/config.json") if path.is_file())


def known_checkpoints() -> dict[str, dict[str, Any]]:
    """The facts of each checkpoint of the zoo and in ./checkpoints, by name; `error` for a broken one."""
    found = dict(index())
    for folder in checkpoints():
        try:
            found[folder.name] = told(folder)
        except ValueError as error:
            found[folder.name] = {"error": str(error)}
    return dict(sorted(found.items()))


def told(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint with what older formats have in the card alone; ValueError if it is broken."""
    config = stored(folder)
    license, text, rows = card(folder)
    old = {"license": license, "card": text, "figures": [], "datasets": [], "base": None, "cost": None}
    old |= {"parameters": rows.get("parameters", 0), "dtype": "", "files": {}}
    return old | config


class Card(NamedTuple):
    """What the README.md of a checkpoint says: its license, its text in Markdown, the rows of its table."""

    license: str
    text: str
    rows: dict[str, str]


def card(folder: Path) -> Card:
    """The card of a checkpoint; empty if it has none."""
    if not (folder / "README.md").is_file() or (folder / "README.md").stat().st_size > LARGEST:
        return Card("", "", {})
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return Card("", "", {})
    start = next((index for index, line in enumerate(lines) if line.startswith("# ")), -1) + 1
    tables = [index for index, line in enumerate(lines) if line.startswith("| ")]
    end = next((index for index in tables if lines[index] == CARD_HEAD), (tables or [len(lines)])[0])
    cells = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines[end:] if line.startswith("| ")]
    pairs = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
    rows = {row[0]: row[1] for row in pairs if len(row) == 2}
    license = next((line.partition(": ")[2] for line in lines[:start] if line.startswith("license: ")), "")
    text = "\n".join(lines[start : max(start, end)]).strip()
    return Card(license.strip("'\""), text, {key: value for key, value in rows.items() if value != "value"})


def stored(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; ValueError if it is broken."""
    try:
        if not (folder / "config.json").is_file():
            raise ValueError("it is not a file")
        found = from_json((folder / "config.json").read_text(encoding="utf-8"), finite=True)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {folder}/config.json: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder}/config.json must hold an object, got {type(found).__name__}")
    return found


def task_of(config: Mapping[str, Any]) -> str | None:
    return facts()["families"].get(str(config.get("family")), {}).get("task")


def figure_line(figure: Mapping[str, Any]) -> str:
    """A figure in a few words: metric, value, interval and n."""
    try:
        interval = "" if figure["interval"] is None else " ({:.3f} to {:.3f})".format(*figure["interval"])
        return f"{figure['metric']} {figure['value']:.4f}{interval}" + (f", n = {figure['n']}" if figure["n"] else "")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return "an invalid figure"


def checkpoint_line(found: Mapping[str, Any]) -> str:
    """The task of a checkpoint, its first figure and what it is."""
    if "error" in found:
        return one_line(found["error"])
    figures = found["figures"] if isinstance(found["figures"], list) else []
    said = [task_of(found) or "", *(figure_line(each) for each in figures[:1])]
    return one_line(f"{', '.join(said)}: {str(found['card']).partition('. ')[0]}")


# Descriptions


def info(name: str) -> str:
    """The output of `zoo info`: everything of this name, a model, rows of tables, a checkpoint. ValueError if there is
    nothing."""
    pages = [model_page(name, facts()["models"][name])] if name in facts()["models"] else []
    for kind, table in facts()["tables"].items():
        if name in table["rows"]:
            pages.append(choice_page(kind, name, table["rows"][name]))
    path = Path(name).expanduser()
    places = [path, Path("checkpoints", path), path / "best"]
    if (folder := checkpoint_folder(name)) is not None:
        try:
            pages.append(checkpoint_page(name if folder in places[:2] else str(folder), folder))
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{folder}/config.json is invalid: {one_line(error)}") from error
    elif name in index():
        pages.append(
            f"{name} (checkpoint)\n\n  {checkpoint_line(index()[name])}\n\nuse:\n  zoo.load_model({literal(name)})"
        )
    if not pages:
        hint = f"did you mean {' or '.join(found)}?" if (found := similar(name)) else "`zoo list` shows the kinds"
        if kind := next((kind for kind in kinds() if name in (kind, kind.removesuffix("s"))), None):
            hint = f"`zoo list {kind}` lists the {kind}"
        looked = " or ".join(dict.fromkeys(str(place.absolute()) for place in places[:2]))
        raise ValueError(f"no model, choice or checkpoint is called '{name}' (nor is there {looked}); {hint}")
    return "\n".join(plain(line) for page in pages for line in [*page.split("\n"), ""])[:-1]


def model_page(name: str, model: Mapping[str, Any], choices: str = "") -> str:
    """A model as zoo.models.describe returns it: its size, and each field of its config with its meaning."""
    family = facts()["families"].get(model["family"], {"task": None, "fields": {}})
    lines = [f"{name}: {model['about'] or model['family']}", ""]
    size = f"{model['parameters']:,} parameters"
    if model.get("input"):
        size += f", input {model['input']}"
    lines += [f"  {size}" + (f", used by `zoo {family['task']}`" if family["task"] else ""), ""]
    pairs = []
    for field, value in model["fields"].items():
        said = family["fields"].get(field, {"default": None, "about": ""})
        other = f" [default: {said['default']}]" if said["default"] not in (None, value) else ""
        pairs.append((f"{field} = {value}", said["about"].rstrip(".") + other))
    call = f'zoo.create_model("{name}"{choices})'
    return "\n".join([*lines, *columns(pairs), "", "in Python:", f"  {call}"])


def literal(value: Any) -> str:
    """A value as Python code, with strings in double quotes."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def choice_page(kind: str, name: str, row: Mapping[str, Any]) -> str:
    """A row of a table: what it computes, its options, and what it works with."""
    lines = [f"{name} ({kind})", ""]
    for paragraph in row["doc"].split("\n\n"):
        lines += [
            *textwrap.wrap(" ".join(paragraph.split()), width() - 2, initial_indent="  ", subsequent_indent="  "),
            "",
        ]
    options = []
    for option, default in row["options"].items():
        options.append(f"{option}={tuple(default) if isinstance(default, list) else default!r}")
    pairs = [("options", ", ".join(options) or "none")]
    pairs += [("paper", f"https://arxiv.org/abs/{paper}") for paper in row["papers"]]
    if "axes" in row:
        pairs.append(
            ("works", " and ".join({1: "along time (1-D)", 2: "on images (2-D)"}[axes] for axes in row["axes"]))
        )
        mixing = ", ".join(row["reads"]) or "only the mask"
        pairs.append(("reads", mixing if row["mixes"] else "nothing from other tokens, so it works in every model"))
    if row.get("mixes"):
        able = "yes" if "prefix" in row["reads"] else "no: refused in a model with a class token or registers"
        pairs.append(("prefix tokens", able))
    if "cost" in row:
        pairs.append(("cost", f"{row['cost']} in the number of tokens"))
    if "folds" in row:
        pairs.append(("zoo.fuse", row["folds"]))
    field = kind.split()[0]
    call = name + (f"({options[0]})" if options else "")
    models = [each for each, model in facts()["models"].items() if any_name(model["fields"].get(field, ""), name)]
    if models:
        pairs.append(("used by", cut(", ".join(models), 200)))
    return "\n".join([*lines, *columns(pairs), "", "example:", f'  --model.backbone.{field}="{call}"'])


def any_name(value: str, name: str) -> bool:
    return name in (each.partition("(")[0] for part in value.split(" / ") for each in part.split(", "))


def checkpoint_page(name: str, folder: Path) -> str:
    """A checkpoint: what it is, its facts and figures, and how to use it."""
    config = told(folder)
    lines, text = [f"{name} (checkpoint)", ""], str(config["card"]).partition("\n\n")[0]
    lines += [*textwrap.wrap(text, width() - 2, initial_indent="  ", subsequent_indent="  "), ""] if text else []
    pairs = [(key, one_line(config[key])) for key in ("family", "preset", "parameters") if config.get(key)]
    if isinstance(cost := config["cost"], dict):
        pairs.append(("multiply-adds", f"{cost.get('multiply_adds'):,} for an input {cost.get('input')}"))
    files = [each for each in FILES if (folder / each).is_file()]
    pairs.append(("size", f"{sum((folder / each).stat().st_size for each in files) / 1e6:.1f} MB"))
    pairs += [(key, one_line(config[key])) for key in ("dtype", "license", "source") if config.get(key)]
    pairs += [("data", one_line(", ".join(map(str, config["datasets"]))))] if config["datasets"] else []
    if isinstance(base := config["base"], dict):
        source = (str(base[key]) for key in ("address", "commit") if base.get(key))
        pairs.append(("made from", one_line(" at ".join(source))))
    if isinstance(config.get("preprocess"), dict):
        pairs.append(
            ("preprocess", one_line(", ".join(f"{key}={value}" for key, value in config["preprocess"].items())))
        )
    if isinstance(config.get("labels"), list):
        pairs.append(("labels", cut(", ".join(map(str, config["labels"])), 200)))
    if isinstance(config.get("model"), dict):
        pairs += [(key, one_line(config["model"][key])) for key in SHOWN if key in config["model"]]
    for figure in config["figures"] if isinstance(config["figures"], list) else []:
        where = " ".join(one_line(figure.get(key) or "") for key in ("data", "split") if figure.get(key))
        pairs.append((f"on {where}" if where else "measured", figure_line(figure)))
    uses, task = [f"zoo.load_checkpoint({literal(name)})(FILE)"], task_of(config)
    if task == "generate":
        uses = [f"zoo generate sample {name}", f"zoo generate predict {name} FILES"]
    elif task:
        uses.insert(0, f"zoo {task} predict {name} FILES")
    return "\n".join([*lines, *columns(pairs), "", "use:", *(f"  {use}" for use in uses)])
