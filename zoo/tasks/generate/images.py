"""Samples as 8-bit images, and grids of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.inputs import Preprocess
from zoo.inputs.images import ImagePreprocess
from zoo.inputs.latents import Autoencoder, LatentPreprocess, is_installed
from zoo.outputs.answers import checked
from zoo.outputs.samplers import Noise, sample, times_of
from zoo.schedules import SCHEDULES
from zoo.tasks.generate.objectives import mix
from zoo.text import counted

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = r"\d{5,}[\w.]*\.png"  # of images that a run writes


def decoder_for(preprocess: Preprocess, name: str | None = None) -> Autoencoder | None:
    """What decodes a model's samples: the autoencoder `name`, by default the one that its preprocessing names. None for
    a model of pixels.

    ValueError if it cannot be loaded, its latents are others, or a model of pixels is given a name.
    """
    if not isinstance(preprocess, LatentPreprocess):
        if name is not None:
            raise ValueError("--decoder: this model gives pixels, which need no decoder")
        return None
    try:
        found = Autoencoder(name or preprocess.decoder)
    except ValueError as error:
        hint = "; `zoo generate sample` takes another one with --decoder" if name is None and is_installed() else ""
        raise ValueError(f"{error}{hint}") from error
    for field, what in (("channels", "channels of latents"), ("factor", "pixels per side of a latent")):
        if (theirs := getattr(found, field)) != (ours := getattr(preprocess, field)):
            raise ValueError(f"decoder {found.name} has {theirs} {what}, but the model has {ours}")
    return found


def sides_of(size: tuple[int, int] | None, preprocess: Any) -> tuple[int, int]:
    """Height and width of a model's samples from those of images in pixels; ValueError if they are not multiples of a
    latent's."""
    if size is None or not isinstance(preprocess, LatentPreprocess):
        return size or preprocess.shape
    if any(side % preprocess.factor for side in size):
        raise ValueError(f"--size must be multiples of {preprocess.factor}, got {size[0]}x{size[1]}")
    return size[0] // preprocess.factor, size[1] // preprocess.factor


def reader_of(preprocess: Any, decoder: Autoencoder | None) -> Callable[[Any], Tensor]:
    """What makes a model's input [channels, H, W] of an image: its preprocessing, or the mean latents of an
    autoencoder."""
    if decoder is None:
        return preprocess
    half = (0.5,) * decoder.colours
    pixels = ImagePreprocess(
        size=preprocess.size * preprocess.factor, channels=decoder.colours, mean=half, std=half, crop=1.0
    )
    return lambda image: preprocess(decoder.encode(pixels(image)[None])[0][0].cpu())


def to_bytes(x: Tensor, preprocess: Any, decoder: Autoencoder | None = None) -> Tensor:
    """uint8 [B, H, W, channels] from a model's samples [B, channels, H, W]: the inverse of its preprocessing, and the
    images that a decoder makes of latents."""
    if decoder is None:
        mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
        values = x.float().cpu() * std + mean
    else:
        values = decoder.decode(preprocess.inverse(x.float())).cpu() / 2 + 0.5
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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


@contextmanager
def in_memory(number: int, size: tuple[int, int]) -> Iterator[None]:
    """Turns the error that memory is full into a ValueError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        what = f"{counted(number, 'sample')} of {size[0]}x{size[1]}"
        raise ValueError(f"not enough memory for {what} at once; lower the batch or the size") from error


def drawn(
    model: Any,
    preprocess: Any,
    labels: Sequence[int] | None,
    number: int,
    size: tuple[int, int],
    batch: int,
    watch: Callable[[], Any],
    decoder: Autoencoder | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """So many samples as 8-bit images, uint8 [number, H, W, channels], and the evaluations of the model for each.

    Args:
        labels: a class for each sample; None for no class.
        batch: samples that are drawn at once.
        watch: called after each step.
        decoder: of latents.
        options: further arguments of `zoo.outputs.samplers.sample`.

    Raises:
        ValueError: the samples are NaN or infinite, or as in `sample`.
    """
    device, values, evaluations = next(model.parameters()).device, list[Tensor](), 0
    for first in range(0, number, batch):
        indices = range(first, min(first + batch, number))
        asked = None if labels is None else torch.tensor(labels[first : indices.stop], device=device)
        with in_memory(len(indices), size):
            x, evaluations = sample(model, asked, indices, size, watch=watch, **options)
            values.append(to_bytes(checked(x), preprocess, decoder))
    return torch.cat(values), evaluations


def restored(
    model: Any,
    preprocess: Any,
    x: Tensor,
    labels: Sequence[int] | None,
    indices: Sequence[int],
    time: float,
    decoder: Autoencoder | None = None,
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
        decoder: of latents.
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
    size = (x.shape[2], x.shape[3])
    with in_memory(len(x), size):
        made = sample(model, asked, indices, size, **more, **options)
        noised, found = (to_bytes(each, preprocess, decoder) for each in (noised, checked(made.x)))
    return noised, found, made.evaluations


def save_image(image: Image, path: Path, facts: dict[str, Any]) -> None:
    """Writes a PNG with the facts as JSON in its text `zoo`."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("zoo", json.dumps(facts))
    image.save(path, pnginfo=text)


def replace(folder: Path, output: Path, record: str) -> None:
    """Moves the files of a folder, among them the JSON `record`, to `output`, and removes those that the record of an
    earlier run lists there and this one has not.

    The record is moved after these are removed and before any image, so that at every moment it lists all images
    there, and the next run removes what one that was killed here has left.
    """
    made = sorted(os.listdir(folder), key=lambda file: (file != record, file))
    for file in sorted(listed(output / record).difference(made)):
        (output / file).unlink(missing_ok=True)
    for file in made:
        os.replace(folder / file, output / file)


def listed(record: Path) -> set[str]:
    """The names of the images that the JSON of an earlier run lists beside itself; none if it cannot be read."""
    try:
        entries = json.loads(record.read_text(encoding="utf-8"))["samples"]
        parts = [each for entry in entries for each in (entry, *entry.get("restored", ()))]
        found = [part[key] for part in parts for key in ("file", "noised") if key in part]
        return {file for file in found if re.fullmatch(NAMES, file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
