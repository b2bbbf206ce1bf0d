"""The `zoo` command: `zoo TASK fit|validate|test|predict`, `zoo detect export`, `zoo transcribe stream`, `zoo list`,
`zoo info`, `zoo app`, `zoo convert`, `zoo evaluate`, `zoo page`, `zoo publish`, `zoo runs`, `zoo shard`."""

import argparse
import ast
import os
import select
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import zoo
from zoo import quick, spelling, usage
from zoo.text import one_line, unknown

# The task, the data and the other verbs of each command; imported when needed.
TASKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "classify": (
        "zoo.tasks.classify.train:Classify",
        "zoo.data.images:Images",
        {"predict": "zoo.tasks.classify.predict:main"},
    ),
    "detect": (
        "zoo.tasks.detect.train:Detect",
        "zoo.data.boxes:Boxes",
        {"predict": "zoo.tasks.detect.predict:main", "export": "zoo.tasks.detect.export:main"},
    ),
    "generate": (
        "zoo.tasks.generate.train:Generate",
        "zoo.data.generation:WholeImages",
        {
            "sample": "zoo.tasks.generate.sample:main",
            "predict": "zoo.tasks.generate.predict:main",
            "encode": "zoo.tasks.generate.encode:main",
        },
    ),
    "transcribe": (
        "zoo.tasks.transcribe.train:Transcribe",
        "zoo.data.speech:Speech",
        {"predict": "zoo.tasks.transcribe.predict:main", "stream": "zoo.tasks.transcribe.stream:main"},
    ),
}
TRAINING = ("fit", "validate", "test")
# Commands that are no task: what they do, and the function that takes their arguments.
COMMANDS = {
    "app": ("try checkpoints in a browser, on this machine", "zoo.tasks.app.command:main"),
    "convert": ("change a checkpoint: its norm, heads, mixer or dtype", "zoo.tasks.convert:main"),
    "evaluate": ("measure checkpoints on data, as JSON", "zoo.tasks.evaluate.command:main"),
    "page": ("write a web page that runs a checkpoint in a browser", "zoo.tasks.page.command:main"),
    "publish": ("upload a checkpoint to the Hugging Face Hub", "zoo.tasks.publish:main"),
    "runs": ("list training runs and how to resume them", "zoo.tasks.runs:main"),
    "shard": ("pack a data set into tars, to train on", "zoo.tasks.shard:main"),
}

EPILOG = """example:
  zoo classify fit --config configs/classify/vit_micro_digits.yaml"""


LISTS = """examples:
  zoo list                 all kinds, and the models
  zoo list 'vit_*'         models by a shell pattern
  zoo list mixers          a kind of choice
  zoo list mixers 'd*'     some of them
  zoo list checkpoints"""

INFOS = """examples:
  zoo info vit_tiny              a model: its size, the fields of its config
  zoo info vit_tiny mixer=sla    with some fields replaced
  zoo info sla                   a choice: formula, paper, options, cost
  zoo info vit_micro.digits      a checkpoint: its scores"""


class _Shape(argparse.RawDescriptionHelpFormatter):
    """The commands without a line for the argument that they are."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.dest == "command" else text


def parser() -> argparse.ArgumentParser:
    made: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    top = argparse.ArgumentParser(
        prog="zoo",
        description="Vision and speech models whose parts are chosen by name.",
        epilog=EPILOG,
        usage="zoo [-h] [-V] COMMAND ...",
        formatter_class=_Shape,
        allow_abbrev=False,
        add_help=False,
    )
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    top.add_argument("-V", "--version", action="version", version=f"zoo {zoo.__version__}")
    commands = top.add_subparsers(title="commands", prog="zoo", dest="command", metavar="COMMAND", required=True)
    listed = commands.add_parser("list", help="list models, choices or checkpoints", epilog=LISTS, **made)
    listed.add_argument("what", nargs="?", metavar="KIND", help=f"{', '.join(quick.kinds())}, models or checkpoints")
    listed.add_argument("pattern", nargs="?", metavar="PATTERN", help="a shell pattern, such as 'vit_*'")
    listed.add_argument("--json", action="store_true", help="print JSON")
    info = commands.add_parser("info", help="describe a model, a choice or a checkpoint", epilog=INFOS, **made)
    info.add_argument("name", metavar="NAME")
    info.add_argument("fields", nargs="*", metavar="FIELD=VALUE", default=[], help="fields of the model to replace")
    info.add_argument("--json", action="store_true", help="print JSON")
    for task, (_, _, others) in TASKS.items():
        about = quick.facts()["tasks"][task]["about"].lower()
        each = commands.add_parser(task, help=f"{about}: train, measure or use a model", **made)
        each.add_argument("verb", metavar="VERB", help=f"{', '.join((*TRAINING, *others))}; see `zoo {task} --help`")
    for command, (about, _) in COMMANDS.items():
        commands.add_parser(command, help=about, **made)
    return top


def stop(what: str, name: str, allowed: list[str], usage: str) -> NoReturn:
    """Exits like argparse for an unknown command."""
    print(f"usage: {usage}", file=sys.stderr)
    print(f"zoo: error: {unknown(what, name, allowed)}", file=sys.stderr)
    sys.exit(2)


def target(path: str) -> Callable[..., None]:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def tasks() -> dict[str, tuple[Any, Any]]:
    """The task and the data module of each command."""
    return {name: (target(task), target(data)) for name, (task, data, _) in TASKS.items()}


def run(arguments: list[str]) -> None:
    known = ["list", "info", *COMMANDS, *TASKS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        stop("command", arguments[0], known, "zoo COMMAND ...")
    if arguments and arguments[0] in COMMANDS:
        more = [tasks] if arguments[0] == "evaluate" else []
        return target(COMMANDS[arguments[0]][1])(arguments[1:], *more)
    if len(arguments) > 1 and arguments[0] in TASKS:
        return run_task(arguments[0], arguments[1], arguments[2:])
    given = parser().parse_args(arguments)
    if given.command == "list":
        print((quick.listing_json if given.json else quick.listing)(given.what, given.pattern))
    elif given.fields:
        print(info(given.name, given.fields))
    else:
        print((quick.info_json if given.json else quick.info)(given.name))


def run_task(task: str, verb: str, arguments: list[str]) -> None:
    model, data, others = TASKS[task]
    if verb in others:
        return target(others[verb])(arguments)
    if verb in ("-h", "--help"):
        return print(usage.task_help(task))
    if verb not in TRAINING:
        stop("verb", verb, [*TRAINING, *others], f"zoo {task} VERB ...")
    if {"-h", "--help"} & {*arguments}:
        return print(usage.verb_help(task, verb))
    spelling.check_files(task, verb, arguments)
    if "torch" not in sys.modules:  # else everything is fast, and rows may have been added to the tables
        spelling.check(task, verb, arguments)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    import_module("zoo.tasks.cli").main(target(model), target(data), task, [verb, *arguments])


def info(name: str, fields: list[str]) -> str:
    """A model with some fields replaced; ValueError if one is invalid."""
    choices: dict[str, Any] = {}
    for field, equals, text in (each.partition("=") for each in fields):
        if not equals:
            raise ValueError(f"'{field}' must be FIELD=VALUE, as in mixer=sla")
        try:
            choices[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            choices[field] = text
    for field, value in {"name": name, **choices}.items():
        spelling.check_field("", field, value, name)
    from zoo import models

    replaced = "".join(f", {field}={quick.literal(value)}" for field, value in choices.items())
    return quick.model_page(name, models.describe(name, **choices), replaced)


def reader_is_gone() -> bool:
    """Whether standard output is a pipe closed by its reader, as after `| head`."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. An error in the input gives one line on standard error and exit status 1."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not reader_is_gone():
            sys.exit(f"zoo: error: {one_line(error)}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own flush at the end has somewhere to go
        sys.exit(141)
    except (ValueError, OSError) as error:
        sys.exit(f"zoo: error: {one_line(error, most=2000)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
