"""`zoo generate sample`: draws images from a diffusion model, and records how."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.aside import aside
from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count
from zoo.text import counted, reason, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.weights import Checkpoint

RECORD = "samples.json"
MOST = 1_000_000  # images


def parser() -> Parser:
    made = Parser(
        "zoo generate sample",
        "Draws images from a diffusion model, and records how in samples.json.",
        "zoo generate sample dit_micro.digits --classes 3,8 --each 8 --guidance 2",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("--classes", metavar="A,B", help="classes by name (default: all)")
    made.add_argument("--each", metavar="N", type=count, default=8, help="images of each class (default: 8)")
    made.add_argument("--size", metavar="HxW", type=size, help="height and width in pixels (default: the model's)")
    made.add_argument("--output", metavar="DIR", default="runs/sample", help="where files go (default: %(default)s)")
    add_options(made, 50)
    return made


def add_options(made: Parser, steps: int) -> None:
    """Adds the options of a sampler, so many steps by default if the model was not made for one, and --device."""
    made.set_defaults(usual_steps=steps)
    made.add_argument(
        "--steps", metavar="N", type=count, help=f"steps of the sampler (default: {steps}; 1 with meanflow)"
    )
    made.add_argument("--guidance", metavar="W", type=float, default=1.0, help="strength, 1 for none (default: 1)")
    kinds = "euler, heun, ab2, ddim, dpm, ddpm, euler_maruyama or meanflow"
    made.add_rare("--sampler", metavar="S", help=f"{kinds} (default: what fits the model)")
    made.add_rare("--seed", metavar="N", type=seed, default=0, help="chooses the noise (default: 0)")
    files.add_device(made)
    made.add_rare(
        "--interval", metavar="A,B", type=interval, default=(0.0, 1.0), help="times that are guided (default: 0,1)"
    )
    made.add_rare("--channels", metavar="N", type=count, default=0, help="guide the first N channels alone")
    made.add_rare("--weak", metavar="NAME", help="guide by this weaker checkpoint instead of no class")
    made.add_rare("--shift", metavar="S", type=float, default=1.0, help="above 1, more steps near the noise")
    made.add_rare(
        "--decoder", metavar="NAME", help="of latents: a folder, or OWNER/NAME on the Hub (default: as stored)"
    )
    made.add_rare("--batch", metavar="N", type=count, default=64, help="images per batch (default: 64)")


def size(text: str) -> tuple[int, int]:
    """Height and width, as an argument's type."""
    if (found := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)) is None or int(found[1]) * int(found[2] or 1) == 0:
        raise argparse.ArgumentTypeError(f"must be HxW, such as 32x48, got '{text}'")
    return int(found[1]), int(found[2] or found[1])


def seed(text: str) -> int:
    """An integer of at least 0, as an argument's type."""
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got '{text}'")
    return int(text)


def interval(text: str) -> tuple[float, float]:
    """Two times, as an argument's type."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two times from 0 to 1, such as 0,0.7, got '{text}'") from None
    return low, high


def main(arguments: list[str]) -> None:
    """Draws samples as given by the arguments. ValueError or OSError if that is not possible."""
    given = parser().parse_args(arguments)
    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    from tqdm import tqdm

    plan = planned(given, files.load_for("generate", given.name), device)
    files.make_output(output)

    with tqdm(total=plan.batches * plan.steps, unit="step", ncols=79, disable=None) as bar:
        values, evaluations = plan.draw(bar.update)
    known = facts(given, plan.options, plan.steps, plan.decoder)
    known |= {"evaluations": evaluations, "size": list(values.shape[1:3])}
    write(output, known, plan.wanted, values, given.each)
    files.report(f"wrote {counted(len(plan.wanted), 'image')}, grid.png, {RECORD} and samples.npz to {output}")


@dataclass
class Plan:
    """The samples that are to be drawn: for each its class, as index and name; the steps of a batch, and what
    `zoo.tasks.generate.images.drawn` takes."""

    model: Any
    preprocess: Any
    wanted: list[tuple[int, str]]
    sides: tuple[int, int]
    steps: int
    batch: int
    decoder: Any
    options: dict[str, Any]

    @property
    def batches(self) -> int:
        return -(-len(self.wanted) // self.batch)

    def draw(self, watch: Callable[[], Any]) -> tuple[Tensor, int]:
        """The samples as 8-bit images, and the evaluations of the model for each; `watch` is called after each step."""
        from zoo.tasks.generate.images import drawn

        labels = [index for index, _ in self.wanted] if self.model.config.classes else None
        given = (self.model, self.preprocess, labels, len(self.wanted), self.sides, self.batch, watch, self.decoder)
        return drawn(*given, **self.options)


def planned(given: argparse.Namespace, found: Checkpoint, device: str) -> Plan:
    """What the arguments ask of a checkpoint; ValueError if they do not fit it."""
    from zoo.outputs.answers import class_names
    from zoo.outputs.samplers import times_of
    from zoo.tasks.generate.images import decoder_for, sides_of

    model, preprocess, names, _ = found
    assert preprocess is not None
    config: Any = model.to(device).config
    options = settings(given, model, preprocess, names, device)
    steps = len(times_of(config, options["steps"], given.shift)) - 1
    chosen = chosen_classes(given.classes, class_names(names, config.classes))  # pyright: ignore[reportArgumentType]
    if (number := len(chosen) * given.each) > MOST:
        raise ValueError(f"--each: at most {MOST:,} images at once, got {number:,}")
    sides, decoder = sides_of(given.size, preprocess), decoder_for(preprocess, given.decoder)
    if decoder is not None:
        decoder.to(device)
    wanted = [(index, name) for index, name in chosen for _ in range(given.each)]
    return Plan(model, preprocess, wanted, sides, steps, given.batch, decoder, options)


def settings(given: argparse.Namespace, model: Any, preprocess: Any, names: Any, device: str) -> dict[str, Any]:
    """The arguments of `zoo.outputs.samplers.sample` that the options of a sampler give; ValueError if one does not fit
    this model."""
    from zoo.outputs.samplers import Guidance, check_sampler, usual

    start, end = given.interval
    if given.guidance == 1.0 and (given.weak or given.channels or given.interval != (0.0, 1.0)):
        raise ValueError("--weak, --interval and --channels would be ignored; give --guidance")
    config, weak = model.config, None
    if given.weak is not None:
        found = files.load_for("generate", given.weak)
        if found.labels != names or found.preprocess != preprocess:
            raise ValueError(f"--weak: {given.weak} was trained on other classes, or with another preprocessing")
        weak = found.model.to(device)
    guidance = Guidance(scale=given.guidance, start=start, end=end, channels=given.channels, weak=weak)
    sampler = given.sampler or usual(config)
    check_sampler(config, sampler, guidance)
    return {
        "seed": given.seed,
        "steps": given.steps or (1 if sampler == "meanflow" else given.usual_steps),
        "sampler": sampler,
        "shift": given.shift,
        "guidance": guidance,
    }


def facts(given: argparse.Namespace, options: dict[str, Any], steps: int, decoder: Any) -> dict[str, Any]:
    """How samples were made, for JSON."""
    return {
        "checkpoint": given.name,
        "sampler": options["sampler"],
        "steps": steps,
        "guidance": given.guidance,
        "interval": list(given.interval),
        "channels": given.channels,
        "weak": given.weak,
        "shift": given.shift,
        "seed": given.seed,
        "decoder": decoder and decoder.name,
    }


def chosen_classes(text: str | None, names: list[str]) -> list[tuple[int, str]]:
    """The chosen classes, each with its index; one without a name for a model without classes."""
    if not names:
        if text is not None:
            raise ValueError("--classes: this model has no classes")
        return [(0, "")]
    if text is None:
        return list(enumerate(names))
    wanted = split_classes(text, names)
    return [(names.index(each), each) for each in dict.fromkeys(wanted)]


def split_classes(text: str, names: list[str]) -> list[str]:
    """The names of classes in a text with commas between them; a name may hold commas itself. ValueError for another
    name."""
    parts, found = text.split(","), list[str]()
    while parts:
        ends = range(len(parts), 0, -1)
        name, end = next(((name, end) for end in ends if (name := ",".join(parts[:end]).strip()) in names), ("", 0))
        if not end:
            raise ValueError(f"--classes: {unknown('class', parts[0].strip(), names)}")
        found.append(name)
        parts = parts[end:]
    return found


def write(output: Path, known: dict[str, Any], wanted: list[tuple[int, str]], values: Tensor, columns: int) -> None:
    """Writes the images, the grid, the JSON and the npz (`arr_0`, uint8 [N, H, W, 3], as ADM's evaluator reads it).
    All are written aside and renamed, and the images of an earlier run that this one has not are removed; OSError if a
    file cannot be written."""
    import numpy as np

    from zoo.tasks.generate.images import grid, replace, save_image, to_image

    entries = []
    try:
        with aside(output) as folder:
            for number, ((index, name), each) in enumerate(zip(wanted, values, strict=True)):
                own = {"index": number, "class": name or None, "label": index if name else None}
                file = f"{number:05d}.png"
                save_image(to_image(each), folder / file, known | own)
                entries.append(own | {"file": file})
            grid(values, columns).save(folder / "grid.png")
            colour = values.expand(*values.shape[:3], 3) if values.shape[-1] == 1 else values
            np.savez(folder / "samples.npz", arr_0=colour.numpy())
            (folder / RECORD).write_text(
                json.dumps(known | {"samples": entries}, indent=2, ensure_ascii=False), encoding="utf-8"
            )
            replace(folder, output, RECORD)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
