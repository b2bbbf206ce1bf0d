"""`zoo generate sample`: draws images from a diffusion model, and records how."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count
from zoo.text import counted, reason, unknown

if TYPE_CHECKING:
    from torch import Tensor


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
    made.add_argument("--steps", metavar="N", type=count, default=50, help="steps of the sampler (default: 50)")
    made.add_argument("--guidance", metavar="W", type=float, default=1.0, help="1 (default) for none")
    made.add_argument("--output", metavar="DIR", default="runs/sample", help="where files go (default: %(default)s)")
    kinds = "euler, heun, ab2, ddim, dpm, ddpm, euler_maruyama or meanflow"
    made.add_rare("--sampler", metavar="S", help=f"{kinds} (default: what fits the model)")
    made.add_rare("--seed", metavar="N", type=seed, default=0, help="chooses the noise (default: 0)")
    files.add_device(made)
    made.add_rare("--interval", metavar="A,B", type=interval, default=(0.0, 1.0), help="times that are guided")
    made.add_rare("--channels", metavar="N", type=count, default=0, help="guide the first N channels alone")
    made.add_rare("--weak", metavar="NAME", help="guide by this weaker checkpoint instead of no class")
    made.add_rare("--shift", metavar="S", type=float, default=1.0, help="above 1, more steps near the noise")
    made.add_rare(
        "--decoder", metavar="NAME", help="of latents: a folder, or OWNER/NAME on the Hub (default: as stored)"
    )
    made.add_rare("--batch", metavar="N", type=count, default=64, help="images per batch (default: 64)")
    return made


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
    import torch
    from tqdm import tqdm

    from zoo.outputs.answers import class_names
    from zoo.outputs.samplers import Guidance, check_sampler, sample, times_of, usual
    from zoo.outputs.tokens import Tokenizer
    from zoo.tasks.generate.images import decoder_for, sides_of, to_bytes

    model, preprocess, names, _ = files.load_for("generate", given.name)
    assert preprocess is not None and not isinstance(names, Tokenizer)
    config: Any = model.config
    start, end = given.interval
    weak = None if given.weak is None else files.load_for("generate", given.weak).model.to(device)
    guidance = Guidance(scale=given.guidance, start=start, end=end, channels=given.channels, weak=weak)
    sampler = given.sampler or usual(config)
    check_sampler(config, sampler, guidance)
    steps = len(times_of(config, given.steps, given.shift)) - 1
    chosen = chosen_classes(given.classes, class_names(names, config.classes))
    sides, decoder = sides_of(given.size, preprocess), decoder_for(preprocess, given.decoder)
    files.make_output(output)

    wanted = [(index, name) for index, name in chosen for _ in range(given.each)]
    values: list[Tensor] = []
    evaluations = 0
    batches = -(-len(wanted) // given.batch)
    with tqdm(total=batches * steps, unit="step", ncols=79, disable=None) as bar:
        for first in range(0, len(wanted), given.batch):
            part = wanted[first : first + given.batch]
            labels = torch.tensor([index for index, _ in part], device=device) if config.classes else None
            numbers = range(first, first + len(part))
            options: dict[str, Any] = {"seed": given.seed, "steps": given.steps, "sampler": sampler}
            options |= {"shift": given.shift, "guidance": guidance, "watch": bar.update}
            x, evaluations = sample(model.to(device), labels, numbers, sides, **options)
            if not bool(x.isfinite().all()):
                raise ValueError(f"{given.name} gives samples that are NaN or infinite; nothing was written")
            values.append(to_bytes(x, preprocess, decoder))
    facts = {
        "checkpoint": given.name,
        "sampler": sampler,
        "steps": steps,
        "evaluations": evaluations,
        "guidance": given.guidance,
        "interval": [start, end],
        "channels": given.channels,
        "weak": given.weak,
        "shift": given.shift,
        "seed": given.seed,
        "size": list(values[0].shape[1:3]),
        "decoder": decoder and decoder.name,
    }
    write(output, facts, wanted, torch.cat(values), given.each)
    files.report(f"wrote {counted(len(wanted), 'image')}, grid.png, samples.json and samples.npz to {output}")


def chosen_classes(text: str | None, names: list[str]) -> list[tuple[int, str]]:
    """The chosen classes, each with its index; one without a name for a model without classes."""
    if not names:
        if text is not None:
            raise ValueError("--classes: this model has no classes")
        return [(0, "")]
    if text is None:
        return list(enumerate(names))
    wanted = [each.strip() for each in text.split(",")]
    for each in wanted:
        if each not in names:
            raise ValueError(f"--classes: {unknown('class', each, names)}")
    return [(names.index(each), each) for each in dict.fromkeys(wanted)]


def write(output: Path, facts: dict[str, Any], wanted: list[tuple[int, str]], values: Tensor, columns: int) -> None:
    """Writes the images, the grid, the JSON and the npz (`arr_0`, uint8 [N, H, W, 3], as ADM's evaluator reads it).
    All are written aside and renamed; OSError if a file cannot be written."""
    import numpy as np
    from PIL.PngImagePlugin import PngInfo

    from zoo.tasks.generate.images import grid, to_image

    entries = []
    try:
        with tempfile.TemporaryDirectory(prefix=".samples-", dir=output) as folder:
            for number, ((index, name), each) in enumerate(zip(wanted, values, strict=True)):
                own = {"index": number, "class": name or None, "label": index if name else None}
                file, text = f"{number:05d}.png", PngInfo()
                text.add_text("zoo", json.dumps(facts | own))
                to_image(each).save(Path(folder, file), pnginfo=text)
                entries.append(own | {"file": file})
            grid(values, columns).save(Path(folder, "grid.png"))
            colour = values.expand(*values.shape[:3], 3) if values.shape[-1] == 1 else values
            np.savez(Path(folder, "samples.npz"), arr_0=colour.numpy())
            Path(folder, "samples.json").write_text(
                json.dumps(facts | {"samples": entries}, indent=2, ensure_ascii=False), encoding="utf-8"
            )
            for file in sorted(os.listdir(folder)):
                os.replace(Path(folder, file), output / file)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
