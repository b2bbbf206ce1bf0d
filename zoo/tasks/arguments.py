"""Arguments of `zoo TASK fit|validate|test`: what is completed before they are parsed, and what is wrong with them."""

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from zoo.spelling import expanded
from zoo.tasks.runs import STATE


def option(arguments: list[str], name: str) -> Any:
    """The value of an option, the last one given, in the files of --config too; None if there is none."""
    return next((value for _, key, value in reversed([*expanded(arguments)]) if key == name), None)


def usual_folder(task: str, model: str | None) -> str:
    """The folder of a run for which none is given."""
    return f"runs/{task}_{model or 'model'}"


def completed(task: str, arguments: list[str]) -> list[str]:
    """The arguments, completed from a run's folder: its config, if --ckpt_path or --model.weights is in it and no
    --config was given; and the path of its state, if --ckpt_path is the folder, or `last`. With `last`, a run without a
    state starts, so that one command serves a job that is started again and again."""
    verb, rest = arguments[0], arguments[1:]
    resumed, weights = option(rest, "ckpt_path"), option(rest, "model.weights")
    if resumed == "last":
        model = option(rest, "model.backbone.name")
        folder = option(rest, "trainer.default_root_dir") or (usual_folder(task, model) if model else ".")
        resumed = Path(folder).expanduser() / STATE
        if verb == "fit" and not resumed.exists():
            if getattr(rank_zero_only, "rank", 0) == 0:
                print(f"starting  {resumed.parent.parent} has no state to resume from", file=sys.stderr)
            return [*arguments, "--ckpt_path=null"]
    if resumed is not None:
        path = Path(resumed).expanduser()
        path = path / STATE if path.is_dir() else path
        rest.append(f"--ckpt_path={path}")
        folder = path.parent.parent
    elif verb != "fit" and weights is not None:
        folder = Path(weights).expanduser().parent
    else:
        return arguments
    config = folder / "config.yaml"
    if option(rest, "config") is None and config.is_file():
        whole = [] if verb == "fit" else ["--trainer.limit_val_batches=1.0", "--trainer.limit_test_batches=1.0"]
        rest = ["--config", str(config), f"--trainer.default_root_dir={folder}", *whole, *rest]
    return [verb, *rest]


KINDS = {"NoneType": "null", "int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
KINDS |= {"dict": "a mapping", "list": "a list", "tuple": "a list", "Iterable": "a list"}
PLURALS = {"int": "integers", "float": "numbers", "str": "texts", "bool": "true or false"}


def kinds_of(text: str) -> list[str]:
    """A type as jsonargparse writes it, in words; or the values of a literal one."""
    if values := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return values[1].replace("'", "").split(", ")
    outer, _, inner = text.removeprefix("<class '").removesuffix("'>").removesuffix("]").partition("[")
    items, outer = inner.split(", "), outer.rpartition(".")[2]
    if outer in ("list", "tuple", "Iterable") and items[0]:
        number = f"{len(items)} " if outer == "tuple" and items[-1] != "..." else ""
        return [f"a list of {number}{PLURALS.get(items[0], items[0].rpartition('.')[2])}"]
    return [KINDS.get(outer, f"a {outer}")]


def translated(message: str) -> str:
    """An error of jsonargparse in plain words: which option, what it must be, and what it is."""
    text = " ".join(message.split())
    if unknown := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        return f"unknown option --{unknown[1]}"
    text = re.sub(r"Expected a tuple with (\d+) elements", r"Expected a list of \1 values", text)
    found = re.match(
        r'Parser key "([^"]+)":.*?(?:Expected an? ([^:]*?)\. Got value: |Subtypes: \[(.*)\] Errors: )', text
    )
    if found is None:
        return re.sub(r'^(?:Parser key "([^"]+)"|argument --([\w.]+)):', lambda key: f"--{key[1] or key[2]}:", text)
    name, single, several = found.groups()
    value = text.rpartition("Given value: ")[2] if several else text[found.end() :]
    types = re.findall(r"<class '[\w.]+'>|typing\.Literal\[[^\]]*\]|[\w.]+\[[^\[\]]*\]", several or single)
    kinds = dict.fromkeys(kind for each in types for kind in kinds_of(each)) or {f"a {single}": None}
    *others, last = sorted(kinds, key=lambda kind: kind == "null")
    allowed = f"{', '.join(others)} or {last}" if others else last
    return f"--{name} must be {allowed}, got {value}"


def check_path(path: Path) -> None:
    """ValueError if a path is not the state of a run; the message names the option that fits what is there."""
    folder = path.parent.parent if path.parts[-2:] == Path(STATE).parts else path.parent
    if (folder / "model.safetensors").exists():
        run = f"; to resume its run: --ckpt_path={folder.parent}" if (folder.parent / STATE).exists() else ""
        raise ValueError(
            f"--ckpt_path: {folder} is a checkpoint, not the state of a run; "
            f"to use its weights: --model.weights={folder}{run}"
        )
    if not path.exists() and path == folder / STATE:
        raise ValueError(f"--ckpt_path: nothing to resume in {folder}; it has no {STATE}")
    if not path.exists():
        raise ValueError(f"--ckpt_path: file not found: {path}")
    if (folder / STATE).exists() and not zipfile.is_zipfile(path) and path != folder / STATE:
        raise ValueError(f"--ckpt_path: {path} is not the state of a run; to resume the run: --ckpt_path={folder}")
