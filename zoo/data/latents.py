"""Latents of images in files: a folder of safetensors shards and an index, as `zoo generate encode` writes it."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.data.images import Batch
from zoo.data.sampling import hashed
from zoo.inputs.latents import LatentPreprocess
from zoo.text import from_json, one_line, reason

INDEX = "index.json"
AGAIN = "delete the file and run `zoo generate encode` again"


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What is written into a shard, to recognise it: the fingerprint of the autoencoder, the side of the images in
    pixels, the type of the numbers, and a hash of the names of the images."""

    autoencoder: str
    image: int
    dtype: str
    names: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of index.json.

    `decoder` is the autoencoder's name, `autoencoder` its fingerprint and `scaling` its own scale and shift, which are
    not applied; `image` is the side of the images in pixels, `factor` the pixels per side of a latent, `channels` those
    of the latents, `mean` and `std` their statistics per channel, `shards` the number of images in each file and a hash
    of their names.
    """

    format: int = 1
    decoder: str
    autoencoder: str
    scaling: dict[str, float]
    image: int
    factor: int
    channels: int
    dtype: str
    mean: list[float]
    std: list[float]
    classes: list[str]
    shards: dict[str, dict[str, Any]]

    def preprocess(self) -> LatentPreprocess:
        """The preprocessing of its latents."""
        return LatentPreprocess(
            size=self.image // self.factor,
            channels=self.channels,
            mean=tuple(self.mean),
            std=tuple(self.std),
            decoder=self.decoder,
            factor=self.factor,
        )

    def tag(self, name: str) -> Tag:
        """That of a shard."""
        return Tag(autoencoder=self.autoencoder, image=self.image, dtype=self.dtype, names=self.shards[name]["names"])


def read_index(root: str | os.PathLike[str]) -> Index:
    """The index of a folder; ValueError, in one line, if it is missing or invalid."""
    path = Path(root).expanduser() / INDEX
    try:
        found = from_json(path.read_bytes())
    except FileNotFoundError:
        text = f"{path.parent} has no {INDEX}; write latents with `zoo generate encode --output {path.parent}`"
        raise ValueError(text) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {reason(error)}; {AGAIN}") from error
    try:
        check_index(found)
        index = Index(**found)
        index.preprocess()
    except (ValueError, TypeError) as error:
        raise ValueError(one_line(f"{path} is not the index of latents: {reason(error)}; {AGAIN}")) from error
    return index


KINDS: dict[str, tuple[type, str]] = {
    "format": (int, "1"),
    "decoder": (str, "a string"),
    "autoencoder": (str, "a string"),
    "scaling": (dict, "a mapping"),
    "image": (int, "an integer >= 1"),
    "factor": (int, "an integer >= 1"),
    "channels": (int, "an integer >= 1"),
    "dtype": (str, "a string"),
    "mean": (list, "a list of numbers"),
    "std": (list, "a list of numbers"),
    "classes": (list, "a list of names"),
    "shards": (dict, "a mapping"),
}


def check_index(found: Any) -> None:
    """ValueError if a value of JSON is not the content of an index."""
    if not isinstance(found, dict):
        raise ValueError(f"it must be a mapping, got {type(found).__name__}")
    if (fields := set(found)) != set(KINDS):
        kind, names = ("lacks", set(KINDS) - fields) if set(KINDS) - fields else ("has an unknown", fields - set(KINDS))
        raise ValueError(f"it {kind} field {min(names)!r}")
    for name, (kind, text) in KINDS.items():
        value = found[name]
        low = kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        if not isinstance(value, kind) or low or (name == "format" and value != 1):
            raise ValueError(f"{name} must be {text}, got {one_line(value, 100)}")
    if not all(isinstance(each, str) for each in found["classes"]):
        raise ValueError(f"classes must be a list of names, got {one_line(found['classes'], 100)}")
    for name, shard in found["shards"].items():
        count = shard.get("count") if isinstance(shard, dict) else None
        if (
            not isinstance(count, int)
            or isinstance(count, bool)
            or count < 0
            or not isinstance(shard.get("names"), str)
        ):
            raise ValueError(f"shard {name!r} must have a count and a hash of names")
        if Path(name).name != name:
            raise ValueError(f"shard {name!r} must be the name of a file")


def write_index(folder: Path, index: Index) -> None:
    text = json.dumps(asdict(index), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write(folder / INDEX, text.encode("utf-8", "backslashreplace"))


def _write(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it once it is on the disk."""
    aside = path.with_name(f".{path.name}.new")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# Shards


@dataclass(frozen=True)
class Sums:
    """Sums over images and mirror images: the number of values of a channel, and per channel of a drawn latent its sum
    and that of its square, as expected over the draws."""

    number: int
    first: Tensor
    second: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.number + other.number, self.first + other.first, self.second + other.second)

    def statistics(self) -> tuple[list[float], list[float]]:
        """The mean and the standard deviation of each channel."""
        mean = self.first / self.number
        return mean.tolist(), (self.second / self.number - mean**2).clamp(min=1e-12).sqrt().tolist()


def digest(names: Sequence[str]) -> str:
    """A hash of names of images."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def write_shard(path: Path, tag: Tag, mean: Tensor, std: Tensor, labels: Tensor) -> None:
    """Writes a shard: means and standard deviations [N, 2, channels, H, W] of images and of their mirror images, and
    labels [N]. It is written aside and renamed."""
    from safetensors.torch import save

    dtype = getattr(torch, tag.dtype)
    wide = mean.double()
    tensors = {
        "mean": mean.to(dtype),
        "std": std.to(dtype),
        "labels": labels,
        "first": wide.sum((0, 1, 3, 4)),
        "second": (wide.square() + std.double().square()).sum((0, 1, 3, 4)),
    }
    content = save({name: each.contiguous() for name, each in tensors.items()}, {"zoo": json.dumps(asdict(tag))})
    _write(path, content)


class Shard:
    """An open shard, as a context manager; ValueError, in one line, if the file is missing or truncated, or if its tag
    is another one."""

    def __init__(self, path: Path, tag: Tag | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self.file: Any = safe_open(path, "pt")
        except FileNotFoundError:
            raise ValueError(f"{path} not found; run `zoo generate encode` again") from None
        except (SafetensorError, OSError) as error:
            why = f"is truncated or not a safetensors file; {AGAIN}"
            raise ValueError(one_line(f"{path} {why}: {reason(error)}")) from error
        if tag is None:
            return
        try:
            found = from_json((self.file.metadata() or {})["zoo"])
        except (KeyError, ValueError, RecursionError):
            raise ValueError(f"{path} does not hold latents of zoo; move it away or choose another folder") from None
        wanted = asdict(tag)
        if found != wanted:
            differ = [name for name in wanted if not isinstance(found, Mapping) or found.get(name) != wanted[name]]
            what = ", ".join(differ) or "fields"
            raise ValueError(f"{path} holds other latents (they differ in {what}); delete it or choose another folder")

    def __enter__(self) -> "Shard":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def tensor(self, name: str) -> Any:
        """A tensor of the file, which is read when it is indexed."""
        if name not in self.file.keys():  # noqa: SIM118 (safe_open has no `in`)
            raise ValueError(f"{self.path} has no tensor '{name}'; {AGAIN}")
        return self.file.get_slice(name)

    def labels(self) -> Tensor:
        return self.tensor("labels")[:]

    def check(self, shape: list[int], classes: int) -> None:
        """ValueError if the moments do not have this shape, or a label is none of so many classes."""
        for name in ("mean", "std"):
            if (found := self.tensor(name).get_shape()) != shape:
                raise ValueError(f"{self.path} must hold latents {shape}, got {found}; {AGAIN}")
        labels = self.labels()
        if labels.shape != (shape[0],) or labels.dtype != torch.int64:
            raise ValueError(f"{self.path} must hold {shape[0]} labels, got {labels.dtype} {[*labels.shape]}; {AGAIN}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"the labels of {self.path} must be from 0 to {classes - 1}; {AGAIN}")

    def sums(self) -> Sums:
        count, twice, _, height, width = self.tensor("mean").get_shape()
        return Sums(count * twice * height * width, self.tensor("first")[:], self.tensor("second")[:])

    def moments(self, row: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation [channels, H, W] of an image or of its mirror image."""
        mean, std = (self.file.get_slice(name)[row, int(mirrored)].float() for name in ("mean", "std"))
        return mean, std


class Latents:
    """The latents of a split; its shards are checked when it is made.

    Raises:
        ValueError: the folder has no such split, or a shard is missing, truncated or another one.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        self.root, self.index = Path(root).expanduser(), read_index(root)
        self.names = [name for name in sorted(self.index.shards) if name.startswith(f"{split}-")]
        if not self.names:
            held = sorted({name.partition("-")[0] for name in self.index.shards})
            raise ValueError(f"{self.root} has no {split} latents; it has {', '.join(held) or 'none'}")
        self.classes, size = list(self.index.classes), self.index.image // self.index.factor
        labels: list[Tensor] = []
        for name in self.names:
            with Shard(self.root / name, self.index.tag(name)) as shard:
                shape = [self.index.shards[name]["count"], 2, self.index.channels, size, size]
                shard.check(shape, len(self.classes))
                labels.append(shard.labels())
        self.labels = torch.cat(labels).numpy()
        self.starts = np.cumsum([0, *map(len, labels)])

    def name(self, index: int) -> str:
        """The name of a latent in a message."""
        return f"{self.root / self._at(index)[0]}, row {self._at(index)[1]}"

    def moments(self, index: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation [channels, H, W] of the latents of an image or of its mirror image."""
        name, row = self._at(index)
        with Shard(self.root / name) as shard:
            mean, std = shard.moments(row, mirrored)
        if not bool((mean + std).isfinite().all()):
            raise ValueError(f"{self.name(index)}: the latents are NaN or infinite; {AGAIN}")
        return mean, std

    def _at(self, index: int) -> tuple[str, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.names[shard], index - int(self.starts[shard])


class LatentDataset(Dataset[Batch]):
    """Normalised latents; a key is (epoch, index), and several keys make a batch.

    With a seed, the image or its mirror image is chosen and a latent is drawn, as a function of seed, epoch and index
    alone; without one it is the mean of the image's.

    Args:
        source: the latents.
        preprocess: normalises them.
        flip: probability of the mirror image.
        seed: seed of the draws; None if there are none.
    """

    def __init__(self, source: Latents, preprocess: LatentPreprocess, flip: float = 0.0, seed: int | None = None):
        self.source, self.preprocess, self.flip, self.seed = source, preprocess, flip, seed

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        size = self.preprocess.size
        found = [self.preprocess(self.drawn(epoch, index)) for epoch, index in keys]
        images = torch.stack(found) if found else torch.empty(0, self.preprocess.channels, size, size)
        labels = [int(self.source.labels[index]) for _, index in keys]
        return Batch(images, torch.tensor(labels, dtype=torch.int64), ())

    def drawn(self, epoch: int, index: int) -> Tensor:
        """A latent of an image [channels, H, W]."""
        if self.seed is None:
            return self.source.moments(index, False)[0]
        generator = torch.Generator().manual_seed(hashed(self.seed, epoch, index))
        mirrored = bool(torch.rand((), generator=generator) < self.flip)
        mean, std = self.source.moments(index, mirrored)
        return mean + std * torch.randn(mean.shape, generator=generator)
