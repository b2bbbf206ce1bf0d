"""`zoo evaluate`: measures checkpoints; prints JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.tasks.predicting import NAME, Parser, add_device, count
from zoo.text import one_line

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


def parser() -> Parser:
    made = Parser(
        "zoo evaluate",
        "Measures checkpoints on data prepared as they need it. Prints JSON: a list with\nthe figures of each, with "
        "95 % intervals. Without --root: digits, or shapes.",
        "zoo evaluate vit_micro.digits\n  zoo evaluate RUN/best --root imagenet --split val\n"
        "  zoo evaluate RUN/best --root LibriSpeech --splits test-clean test-other",
    )
    add, rare = made.add_argument, made.add_rare
    add("checkpoints", metavar="NAME", nargs="+", help=NAME)
    add("--root", metavar="DIR", help="folder of the data")
    add("--split", choices=("val", "test"), help="of images and boxes (default: val)")
    add("--splits", metavar="DIR", nargs="+", help="folders of speech below root")
    add("--labels", metavar="FILE", help="labels of images in one folder, or real.json")
    add("--output", metavar="CSV", help="a table to which a row for each figure is added")
    add_device(made)
    rare("--names", metavar="FILE", help="further names of the classes, such as synset_words.txt")
    rare("--skip-unknown", action="store_true", default=None, help="omit classes that a checkpoint does not know")
    rare("--data", metavar="NAME", help="name of the data in the result (default: that of the folder)")
    rare("--batch", metavar="N", type=count, help="samples in a batch")
    rare("--workers", metavar="N", type=int, help="processes that read files")
    rare("--precision", metavar="P", choices=PRECISIONS, default="32-true", help=", ".join(PRECISIONS))
    rare("--samples", metavar="N", type=count, help="samples that a generator draws to be measured")
    rare("--features", metavar="NAME", help="model whose features compare samples with images")
    rare("--classifier", metavar="NAME", help="model that reads the classes of samples")
    rare("--guidance", metavar="G", type=float, help="guidance of samples")
    rare("--steps", metavar="N", type=count, help="steps of the sampler")
    return made


def main(arguments: list[str], tasks: Callable[[], dict[str, tuple[Any, Any]]]) -> None:
    """Measures checkpoints as given by the arguments. One that fails does not stop the others.

    Args:
        arguments: of the command.
        tasks: gives the task and the data module of each command.

    Raises:
        ValueError: an argument is invalid, or a checkpoint failed; the others' figures have been printed.
    """
    given = {
        name: value for name, value in vars(parser().parse_intermixed_args(arguments)).items() if value is not None
    }
    names, output = given.pop("checkpoints"), given.pop("output", None)
    if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise ValueError(f"{twice} is given twice")
    from zoo.tasks.evaluate.measure import evaluate
    from zoo.tasks.evaluate.results import add_rows, check_table

    table = None if output is None else Path(output).expanduser()
    if table is not None:
        check_table(table)  # before the work
    found, failed = list[dict[str, Any]](), list[str]()
    for name in names:
        try:
            found.append(evaluate(tasks(), name, **given))
            if table is not None:
                add_rows(table, found[-1])
        except (ValueError, OSError) as error:
            failed.append(one_line(f"{name}: {error}" if len(names) > 1 else error, 1000))
    if found:
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
    for line in failed[:-1]:
        print(f"zoo: error: {line}", file=sys.stderr)
    if failed:
        raise ValueError(failed[-1])
