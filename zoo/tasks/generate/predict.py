"""`zoo generate predict`: adds noise to images and restores them with a diffusion model."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.aside import aside
from zoo.tasks import predicting as files
from zoo.tasks.generate.sample import add_options, facts, settings, split_classes
from zoo.tasks.predicting import Parser
from zoo.text import plain, reason

if TYPE_CHECKING:
    from torch import Tensor

RECORD, GRID = "restored.json", "restored.png"
SHOWN = 36  # rows of the grid


def parser() -> Parser:
    made = Parser(
        "zoo generate predict",
        f"Adds noise to images and restores them; writes PNGs, a grid and {RECORD}.",
        "zoo generate predict dit_micro.digits scans/ --classes 3 --times 0.3,0.6",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("paths", metavar="PATH", nargs="+", help="an image, or a folder to search for images")
    usual = "times of the noise, > 0 and <= 1 (default: 0.25,0.5,0.75)"
    made.add_argument("--times", metavar="A,B", type=times, default=(0.25, 0.5, 0.75), help=usual)
    made.add_argument("--classes", metavar="A,B", help="one for all images, or one for each (default: none)")
    made.add_argument("--output", metavar="DIR", default="runs/predict", help="where files go (default: %(default)s)")
    add_options(made, 25)
    return made


def times(text: str) -> tuple[float, ...]:
    """Times above 0 of at most four decimals, as an argument's type."""
    try:
        found = tuple(dict.fromkeys(round(float(each), 4) for each in text.split(",")))
    except ValueError:
        found = (0.0,)
    if not all(0.0 < each <= 1.0 for each in found):
        raise argparse.ArgumentTypeError(f"must be numbers > 0 and <= 1, such as 0.25,0.5, got '{text}'")
    return found


def main(arguments: list[str]) -> None:
    """Restores images as given by the arguments. ValueError at the end if one had an error."""
    given = parser().parse_intermixed_args(arguments)
    import torch
    from tqdm import tqdm

    from zoo.outputs.answers import class_names
    from zoo.outputs.samplers import times_of
    from zoo.outputs.tokens import Tokenizer
    from zoo.tasks.generate.images import decoder_for, grid, replace

    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    paths = find(given.paths, output)
    model, preprocess, names, _ = files.load_for("generate", given.name)
    assert preprocess is not None and not isinstance(names, Tokenizer)
    config: Any = model.to(device).config
    decoder = decoder_for(preprocess, given.decoder)
    options = settings(given, model, preprocess, names, device)
    options["decoder"] = decoder and decoder.to(device)
    classes = classes_of(given.classes, class_names(names, config.classes), len(paths))
    if not classes and given.weak is None and given.guidance != 1.0:
        raise ValueError("--guidance needs --classes")
    steps = [len(times_of(config, options["steps"], given.shift, time)) - 1 for time in given.times]
    files.make_output(output)

    entries: list[dict[str, Any]] = [{"path": path, "index": index} for index, path in enumerate(paths)]
    for entry, (label, name) in zip(entries, classes, strict=False):
        entry |= {"class": name, "label": label}
    batches = [entries[first : first + given.batch] for first in range(0, len(entries), given.batch)]
    try:
        with aside(output) as folder:
            rows: list[Tensor] = []
            with tqdm(total=len(batches) * sum(steps), unit="step", ncols=79, disable=None) as bar:
                for batch in batches:
                    made = restore(model, preprocess, batch, given.times, options | {"watch": bar.update})
                    save(made, folder, facts(given, options, options["steps"], decoder))
                    rows += [images for _, images in made[: max(0, SHOWN - len(rows))]]
            if not rows:
                raise files.nothing_done(output, entries, "image")
            grid(torch.cat(rows), 1 + 2 * len(given.times)).save(folder / GRID)
            known = facts(given, options, options["steps"], decoder) | {"samples": entries}
            text = json.dumps(known, indent=2, ensure_ascii=False)
            (folder / RECORD).write_text(text, encoding="utf-8", errors="backslashreplace")
            replace(folder, output, RECORD)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
    files.finish(output, ["the images", GRID, RECORD], entries, "image")


def find(given: Sequence[str], output: Path) -> list[str]:
    """The images among the given paths and below the folders among them, without those that an earlier run wrote to
    `output`; ValueError if such a one is given itself."""
    from zoo.inputs.images import EXTENSIONS
    from zoo.tasks.generate.images import listed

    found = files.find_files(given, EXTENSIONS, "image")
    written = {os.path.realpath(output / name) for name in (GRID, *listed(output / RECORD))}
    named = {os.path.expanduser(path) for path in given}
    if again := [path for path in found if path in named and os.path.realpath(path) in written]:
        raise ValueError(f"{again[0]} was written by an earlier run and would be replaced; choose another --output")
    if not (kept := [path for path in found if os.path.realpath(path) not in written]):
        raise ValueError(f"no image found, except those that an earlier run wrote to {output}")
    return kept


def classes_of(text: str | None, names: list[str], number: int) -> list[tuple[int, str]]:
    """The class of each of so many images, and its name; none if there is no text."""
    if text is None:
        return []
    if not names:
        raise ValueError("--classes: this model has no classes")
    wanted = split_classes(text, names)
    if len(wanted) not in (1, number):
        raise ValueError(
            f"--classes: give one class for all images, or one for each of the {number}, got {len(wanted)}"
        )
    return [(names.index(each), each) for each in (wanted if len(wanted) == number else wanted * number)]


def restore(
    model: Any, preprocess: Any, batch: list[dict[str, Any]], times: Sequence[float], options: dict[str, Any]
) -> list[tuple[dict[str, Any], Tensor]]:
    """Reads the images of a batch of entries, and notes in them what was restored, or the error. Gives each entry that
    has no error with its images, uint8 [1 + 2 * times, H, W, channels]: the original, then for each time the image
    with noise and the restored one."""
    import torch

    from zoo.outputs.samplers import times_of
    from zoo.tasks.generate.images import reader_of, restored, to_bytes

    decoder = options.get("decoder")
    prepare = reader_of(preprocess, decoder)
    read: list[dict[str, Any]] = []
    inputs: list[Tensor] = []
    for entry in batch:
        try:
            inputs.append(prepare(entry["path"]))
        except Exception as error:
            files.fail(entry, error)
            continue
        entry["restored"] = []
        read.append(entry)
    if not read:
        return []
    x, indices = torch.stack(inputs), [entry["index"] for entry in read]
    labels = [entry["label"] for entry in read] if "label" in read[0] else None
    columns = [to_bytes(x, preprocess, decoder)]
    for time in times:
        noised, made, evaluations = restored(model, preprocess, x, labels, indices, time, **options)
        steps = len(times_of(model.config, options["steps"], options["shift"], time)) - 1
        columns += [noised, made]
        differences = (made.float() - columns[0].float()).square().flatten(1).mean(1).sqrt()
        for entry, difference in zip(read, differences.tolist(), strict=True):
            own = {"time": time, "steps": steps, "evaluations": evaluations, "difference": round(difference, 3)}
            entry["restored"].append(own)
    return list(zip(read, torch.stack(columns, 1), strict=True))


def save(made: list[tuple[dict[str, Any], Tensor]], folder: Path, known: dict[str, Any]) -> None:
    """Writes the images with noise and the restored ones of some entries, notes their names, and prints a line for
    each entry."""
    from zoo.tasks.generate.images import save_image, to_image

    for entry, images in made:
        own = {key: value for key, value in entry.items() if key != "restored"}
        for number, each in enumerate(entry["restored"]):
            name = f"{entry['index']:05d}_{each['time']:g}"
            each |= {"noised": f"{name}_noised.png", "file": f"{name}.png"}
            for key, image in (("noised", images[1 + 2 * number]), ("file", images[2 + 2 * number])):
                save_image(to_image(image), folder / each[key], known | own | {"time": each["time"]})
        found = ", ".join(f"{each['difference']:.1f} at {each['time']:g}" for each in entry["restored"])
        files.say(f"{plain(entry['path'])}  rms difference {found}")
