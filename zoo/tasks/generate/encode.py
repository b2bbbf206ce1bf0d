"""`zoo generate encode`: the latents of an image folder, for training a diffusion model on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count
from zoo.text import counted, reason

if TYPE_CHECKING:
    from zoo.data.latents import Sums, Tag
    from zoo.inputs.latents import Autoencoder

SPLITS = ("train", "val", "test")


def parser() -> Parser:
    made = Parser(
        "zoo generate encode",
        "Writes latents of images, to train on. Run it again to resume.",
        "zoo generate encode --root DIR --decoder stabilityai/sd-vae-ft-ema --output L",
    )
    layout = "root/train/<class>/*, root/val/<class>/*"
    made.add_argument("--root", metavar="DIR", required=True, help=f"folder of the images: {layout}")
    decoder = "an AutoencoderKL of diffusers: a folder, or OWNER/NAME on the Hub"
    made.add_argument("--decoder", metavar="NAME", required=True, help=decoder)
    made.add_argument("--output", metavar="DIR", required=True, help="where files go")
    made.add_argument(
        "--size", metavar="N", type=count, default=256, help="side of the images in pixels (default: 256)"
    )
    files.add_device(made)
    made.add_rare("--batch", metavar="N", type=count, default=16, help="images per batch (default: 16)")
    made.add_rare("--shard", metavar="N", type=count, default=1024, help="images per file (default: 1024)")
    made.add_rare("--workers", metavar="N", type=count, help="processes that read images (default: one per core)")
    made.add_rare(
        "--dtype", metavar="T", choices=("float32", "float16"), default="float32", help="float32 (default) or float16"
    )
    return made


class Part(NamedTuple):
    """The images of a shard: its file, its split, their indices, and its tag."""

    path: Path
    split: str
    indices: range
    tag: Tag


def main(arguments: list[str]) -> None:
    """Encodes as given by the arguments. ValueError or OSError if that is not possible."""
    given = parser().parse_args(arguments)
    root, output = Path(given.root).expanduser(), Path(given.output).expanduser()
    device = files.device_for(given.device)
    from filelock import FileLock, Timeout

    from zoo.data.generation import WholeImages
    from zoo.inputs.latents import Autoencoder

    autoencoder = Autoencoder(given.decoder).to(device)
    if given.size % autoencoder.factor:
        raise ValueError(f"--size must be a multiple of {autoencoder.factor} for this decoder, got {given.size}")
    data = WholeImages("imagefolder", str(root), given.size, autoencoder.colours, workers=given.workers)
    parts = planned(data, root, output, given, autoencoder)
    files.make_output(output)
    try:
        lock = FileLock(output / ".lock").acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another process writes to {output}; wait for it, or choose another --output") from None
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
    with lock:
        encode(data, parts, output, given, autoencoder)


def planned(data: Any, root: Path, output: Path, given: Any, autoencoder: Autoencoder) -> list[Part]:
    """The shards of all splits that the folder has."""
    from zoo.data.latents import Tag, digest

    fingerprint, parts = autoencoder.fingerprint, list[Part]()
    for split in [split for split in SPLITS if (root / split).exists()] or SPLITS[:1]:
        source = data.source(split)
        for number, first in enumerate(range(0, len(source.labels), given.shard)):
            indices = range(first, min(first + given.shard, len(source.labels)))
            names = digest([os.path.relpath(source.name(index), root) for index in indices])
            tag = Tag(autoencoder=fingerprint, image=given.size, dtype=given.dtype, names=names)
            parts.append(Part(output / f"{split}-{number:05d}.safetensors", split, indices, tag))
    return parts


def encode(data: Any, parts: Sequence[Part], output: Path, given: Any, autoencoder: Autoencoder) -> None:
    """Writes the shards that are missing, then the index."""
    from tqdm import tqdm

    from zoo.data.latents import Index, write_index

    known = {part.path.name for part in parts}
    if other := sorted(path.name for path in output.glob("*.safetensors") if path.name not in known):
        raise ValueError(f"{output / other[0]} is not part of these latents; delete it or choose another --output")
    finished = {part.path: held(part) for part in parts if part.path.exists()}
    left = [part for part in parts if part.path not in finished]
    total, skipped = sum(len(part.indices) for part in parts), 0
    try:
        with tqdm(total=total, unit="image", ncols=79, disable=None) as bar:
            bar.update(total - sum(len(part.indices) for part in left))
            for part, faults in written(data, left, given.batch, autoencoder, bar):
                for fault in faults:
                    files.report(f"skipped {fault}: cannot be read as an image")
                skipped += len(faults)
                finished[part.path] = held(part)
        first, *others = [finished[part.path][1] for part in parts if part.split == parts[0].split]
        sums = sum(others, first)
        if sums.number == 0:
            raise ValueError(f"no image of {Path(given.root) / parts[0].split} could be read")
        mean, std = sums.statistics()
        shards = {part.path.name: {"count": finished[part.path][0], "names": part.tag.names} for part in parts}
        index = Index(
            decoder=given.decoder,
            autoencoder=parts[0].tag.autoencoder,
            scaling=autoencoder.scaling,
            image=given.size,
            factor=autoencoder.factor,
            channels=autoencoder.channels,
            dtype=given.dtype,
            mean=mean,
            std=std,
            classes=data.classes,
            shards=shards,
        )
        write_index(output, index)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
    images = sum(shard["count"] for shard in shards.values())
    kept = f", {len(parts) - len(left)} of them from before" if len(left) < len(parts) else ""
    note = f"; skipped {counted(skipped, 'unreadable image')}" if skipped else ""
    files.report(f"wrote {counted(images, 'image')} in {counted(len(parts), 'shard')}{kept} to {output}{note}")


def held(part: Part) -> tuple[int, Sums]:
    """The number of images of a finished shard, and its sums."""
    from zoo.data.latents import Shard

    with Shard(part.path, part.tag) as shard:
        return len(shard.labels()), shard.sums()


def written(
    data: Any, parts: Sequence[Part], batch: int, autoencoder: Autoencoder, bar: Any
) -> Iterator[tuple[Part, list[str]]]:
    """Encodes and writes the shards, each followed by the names of its unreadable images. Batches do not cross shards,
    so that a shard's content does not depend on where the work was resumed."""
    import torch

    from zoo.data.images import ImageDataset, as_it_is
    from zoo.data.latents import write_shard
    from zoo.data.loading import make_loader

    for split in dict.fromkeys(part.split for part in parts):
        own = [part for part in parts if part.split == split]
        batches = [
            [(0, index) for index in part.indices[first : first + batch]]
            for part in own
            for first in range(0, len(part.indices), batch)
        ]
        dataset = ImageDataset(data.source(split), data.preprocess.cut, data.preprocess)
        read = iter(make_loader(dataset, batches, as_it_is, data.processes(files=True)))
        for part in own:
            side = data.preprocess.size // autoencoder.factor
            means = [torch.empty(0, 2, autoencoder.channels, side, side)]
            stds, labels, skipped = [means[0]], [torch.empty(0, dtype=torch.int64)], list[str]()
            for _ in range(0, len(part.indices), batch):
                found = next(read)
                if len(found.images):
                    both = [autoencoder.encode(images) for images in (found.images, found.images.flip(-1))]
                    for kept, values in zip((means, stds), zip(*both, strict=True), strict=True):
                        kept.append(torch.stack(values, 1).cpu())
                labels.append(found.labels)
                skipped += found.skipped
                bar.update(len(found.labels) + len(found.skipped))
            mean, std = torch.cat(means), torch.cat(stds)
            if not bool(mean.isfinite().all() and std.isfinite().all()):
                raise ValueError(f"decoder {autoencoder.name} gives latents that are NaN or infinite")
            write_shard(part.path, part.tag, mean, std, torch.cat(labels))
            yield part, skipped
