"""The `zoo` command: `zoo TASK fit|validate|test|predict`, `zoo transcribe stream`, `zoo list`, `zoo info`."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module

from zoo.text import one_line

# What each task trains and on what, and what does its other verbs; imported when asked for.
TASKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "classify": (
        "zoo.tasks.classify.train:Classify",
        "zoo.data.images:Images",
        {"predict": "zoo.tasks.classify.predict:main"},
    ),
    "transcribe": (
        "zoo.tasks.transcribe.train:Transcribe",
        "zoo.data.speech:Speech",
        {"predict": "zoo.tasks.transcribe.predict:main", "stream": "zoo.tasks.transcribe.stream:main"},
    ),
}
TRAINING = ("fit", "validate", "test")

EPILOG = """examples:
  zoo list 'vit_*'
  zoo info vit_tiny
  zoo classify fit --config configs/classify/vit_micro_digits.yaml
  zoo classify fit --config configs/classify/vit_micro_digits.yaml --model.backbone.mixer=sla
  zoo classify validate --config configs/classify/vit_micro_digits.yaml --model.weights=runs/vit_micro_digits/best
  zoo classify predict runs/vit_micro_digits/best pictures/ photo.jpg
  zoo transcribe fit --config configs/transcribe/squeezeformer_micro_fsdd.yaml --data.root DIR
  zoo transcribe predict runs/squeezeformer_micro_fsdd/best recordings/"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="zoo",
        description="Vision and speech models whose parts are chosen by name.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listed = commands.add_parser("list", help="list the models that can be built")
    listed.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'vit_*'")
    info = commands.add_parser("info", help="show a model's config and size")
    info.add_argument("name")
    for task, (_, _, others) in TASKS.items():
        each = commands.add_parser(task, help="train, measure or use a model")
        each.add_argument("verb", choices=(*TRAINING, *others), help=f"`zoo {task} VERB --help` lists its options")
    return top


def target(path: str) -> Callable[..., None]:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def run(arguments: list[str]) -> None:
    if len(arguments) > 1 and arguments[0] in TASKS:
        task, data, others = TASKS[arguments[0]]
        if arguments[1] in others:
            return target(others[arguments[1]])(arguments[2:])
        if arguments[1] in TRAINING:
            command = import_module("zoo.tasks.cli")
            return command.main(target(task), target(data), arguments[0], arguments[1:])
    given = parser().parse_args(arguments)
    from zoo import models

    if given.command == "list":
        names = models.list_models(given.pattern)
        if not names:
            raise ValueError(f"no model matches '{given.pattern}'; `zoo list` lists them all")
        print("\n".join(names))
    elif given.command == "info":
        print(models.describe(given.name))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What is wrong with the input ends in one line on standard error and exit status 1."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"zoo: error: {one_line(error, most=2000)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
