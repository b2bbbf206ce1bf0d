"""Samples as 8-bit images, and grids of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.outputs.answers import checked
from zoo.outputs.samplers import Noise, sample, times_of
from zoo.schedules import SCHEDULES
from zoo.tasks.generate.objectives import mix

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = r"\d{5,}[\w.]*\.png"  # of images that a run writes


def to_bytes(x: Tensor, preprocess: Any) -> Tensor:
    """uint8 [B, H, W, channels] from a model's samples [B, channels, H, W], the inverse of its preprocessing."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
    values = (x.float().cpu() * std + mean) * 255
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_image(values: Tensor) -> Image:
    """A PIL image from uint8 [H, W, 1 or 3]."""
    from PIL import Image as images

    array = values.numpy()
    return images.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(values: Tensor, columns: int, least: int = 32) -> Image:
    """Images uint8 [B, H, W, channels] row by row, enlarged by a whole number until their sides have `least` pixels."""
    from torchvision.utils import make_grid

    channels, times = values.shape[3], max(1, -(-least // min(values.shape[1:3])))
    large = values.permute(0, 3, 1, 2).repeat_interleave(times, 2).repeat_interleave(times, 3)
    return to_image(make_grid(large, columns, pad_value=255)[:channels].permute(1, 2, 0))


def drawn(
    model: Any,
    preprocess: Any,
    labels: Sequence[int] | None,
    number: int,
    size: tuple[int, int],
    batch: int,
    watch: Callable[[], Any],
    **options: Any,
) -> tuple[Tensor, int]:
    """So many samples as 8-bit images, uint8 [number, H, W, channels], and the evaluations of the model for each.

    Args:
        labels: a class for each sample; None for no class.
        batch: samples that are drawn at once.
        watch: called after each step.
        options: further arguments of `zoo.outputs.samplers.sample`.

    Raises:
        ValueError: the samples are NaN or infinite, or as in `sample`.
    """
    device, values, evaluations = next(model.parameters()).device, list[Tensor](), 0
    for first in range(0, number, batch):
        indices = range(first, min(first + batch, number))
        asked = None if labels is None else torch.tensor(labels[first : indices.stop], device=device)
        x, evaluations = sample(model, asked, indices, size, watch=watch, **options)
        values.append(to_bytes(checked(x), preprocess))
    return torch.cat(values), evaluations


def restored(
    model: Any,
    preprocess: Any,
    x: Tensor,
    labels: Sequence[int] | None,
    indices: Sequence[int],
    time: float,
    *,
    steps: int,
    shift: float,
    seed: int,
    **options: Any,
) -> tuple[Tensor, Tensor, int]:
    """Images with the noise of a time, and what a sampler makes of them from there, both uint8 [B, H, W, channels]; and
    the evaluations of the model for each.

    Args:
        x: prepared images [B, channels, H, W].
        labels: a class for each; None for no class.
        indices: their numbers, which choose their noise.
        time: > 0, and 1 for noise alone.
        options: further arguments of `zoo.outputs.samplers.sample`.

    Raises:
        ValueError: the restored images are NaN or infinite, or as in `sample`.
    """
    config, device = model.config, next(model.parameters()).device
    first = times_of(config, steps, shift, time)[0]  # on a schedule of steps, one of them
    level = SCHEDULES[config.schedule].level(torch.full((1, 1, 1, 1), first))
    noised = mix(x, Noise(seed, indices, x.shape[1:])(), level)
    asked = None if labels is None else torch.tensor(labels, device=device)
    more: dict[str, Any] = {"steps": steps, "shift": shift, "seed": seed, "start": (noised.to(device), first)}
    made = sample(model, asked, indices, (x.shape[2], x.shape[3]), **more, **options)
    return to_bytes(noised, preprocess), to_bytes(checked(made.x), preprocess), made.evaluations


def save_image(image: Image, path: Path, facts: dict[str, Any]) -> None:
    """Writes a PNG with the facts as JSON in its text `zoo`."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("zoo", json.dumps(facts))
    image.save(path, pnginfo=text)


def replace(folder: str, output: Path, record: str) -> None:
    """Moves the files of a folder, among them the JSON `record`, to `output`, and removes those that the record of an
    earlier run lists there and this one has not."""
    earlier = listed(output / record)
    made = sorted(os.listdir(folder))
    for file in made:
        os.replace(Path(folder, file), output / file)
    for file in earlier.difference(made):
        (output / file).unlink(missing_ok=True)


def listed(record: Path) -> set[str]:
    """The names of the images that the JSON of an earlier run lists beside itself; none if it cannot be read."""
    try:
        entries = json.loads(record.read_text(encoding="utf-8"))["samples"]
        parts = [each for entry in entries for each in (entry, *entry.get("restored", ()))]
        found = [part[key] for part in parts for key in ("file", "noised") if key in part]
        return {file for file in found if re.fullmatch(NAMES, file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
