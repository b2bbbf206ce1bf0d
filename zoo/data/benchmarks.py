"""Images to evaluate a classifier on, whose classes are matched with the checkpoint's by name."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from zoo.data.class_names import Classes, imagenet, read_names
from zoo.data.image_sources import SOURCES, Files, Packed, is_fashion_mnist, is_image
from zoo.data.images import Images
from zoo.data.label_files import Given, LabelFile, read_labels
from zoo.data.shards import is_packed
from zoo.inputs.folders import files_below
from zoo.text import counted, one_line, plain

SPLITS = {"val": ("val", "valid", "validation"), "test": ("test",)}


class Benchmark(Images):
    """Images and their classes as a checkpoint numbers them: from class folders, from a label file, or a
    data set of its own: Fashion-MNIST or the digits.

    Where class folders are fewer than the checkpoint's classes, logits of the others do not count, as is usual for
    ImageNet-A and -R. With ImageNet ReaL's sets of labels, a prediction is right if it is in the set.

    Args:
        known: the labels of the checkpoint; None if it has none.
        root: a folder with class folders, or with images if there is a label file, or with those of `split`, or with
            Fashion-MNIST's files, or with shards; None for the digits.
        split: `val` or `test`; None for the folder val, or root itself.
        labels: a file as of `read_labels`.
        names: a file as of `read_names`, with further names of the classes.
        skip_unknown: omits images of classes that the checkpoint does not know.
        batch: images in a batch.
        workers: as for Images.

    Attributes:
        part: the split that was found, or `all`.

    Raises:
        ValueError: files are missing or invalid, or a class is unknown.
    """

    def __init__(
        self,
        known: Sequence[str] | None,
        root: str | None = None,
        split: str | None = None,
        labels: str | None = None,
        names: str | None = None,
        skip_unknown: bool = False,
        batch: int = 64,
        workers: int | None = None,
    ) -> None:
        base = None if root is None else Path(root).expanduser()
        kind = "digits"
        if root is not None and base is not None:
            kind = "shards" if is_packed(root) else "fashion_mnist" if is_fashion_mnist(base) else "imagefolder"
        super().__init__(kind, root, batch=batch, workers=workers)
        if root is None and (labels or names):
            raise ValueError("--labels and --names need --root, the folder of the images")
        self.skip_unknown = skip_unknown
        self.allowed: Tensor | None = None  # [outputs], those that count
        self.accepted: Tensor | None = None  # [sets, outputs], the right ones; labels are then places of sets
        named = read_names(Path(names).expanduser()) if names else None
        if known is None:
            if named is None or named.ids:
                raise ValueError("the checkpoint has no class names; --names FILE must list those of its outputs")
            known = [each[0] for each in named.classes]
        self.known = Classes(known, [*([named] if named else []), *([] if named and not named.ids else [imagenet()])])
        if kind in ("fashion_mnist", "shards") and labels:
            what = "Fashion-MNIST" if kind == "fashion_mnist" else "shards"
            raise ValueError(f"{base} holds {what} with its labels, so omit --labels")
        self.folder, self.part = None, split or "val"
        if base is not None and kind == "imagefolder":
            self.folder, self.part = _folder(base, split)
        self.file = read_labels(Path(labels).expanduser()) if labels else None
        self.found: Any = None

    @property
    def classes(self) -> list[str]:
        return list(self.known.labels)

    def source(self, split: str) -> Any:
        if self.found is None:
            self.found = self._data_set() if self.folder is None else self._files(self.folder)
        return self.found

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.allowed is not None:
            self.allowed = self.allowed.to(logits.device)
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        if self.accepted is not None:
            self.accepted = self.accepted.to(logits.device)
            right, best = self.accepted[labels], logits.argmax(1)
            labels = torch.where(right.gather(1, best[:, None])[:, 0], best, right.int().argmax(1))
        return logits, labels

    def named(self, metric: str) -> str | None:
        """What a metric of the task is called here; None if it has no meaning."""
        if self.accepted is not None:
            return "ReaL accuracy" if metric == "top-1 accuracy" else None
        if self.allowed is None:
            return metric
        return f"{metric} among {int(self.allowed.sum()):,} of {len(self.allowed):,} classes"

    def _data_set(self) -> Any:
        source = SOURCES[self.dataset](self.part, self.preprocess, self.root, self.fraction)
        outputs = self._outputs(source.classes, [f"{self.root or self.dataset}"] * len(source.classes))
        self._allow(outputs)
        source.classes, source.labels = self.classes, np.array(outputs)[source.labels]
        if isinstance(source, Packed) and (source.labels < 0).any():
            known = source.labels >= 0
            omitted = counted(int((~known).sum()), "image")
            rank_zero_warn(f"skipped {omitted} of classes that the checkpoint does not know")
            source.labels, source.numbers = source.labels[known], source.numbers[known]
        return source

    def _allow(self, outputs: Sequence[int]) -> None:
        """Where classes are fewer than those of the checkpoint, only their logits count."""
        if len(outputs) < len(self.known.labels):
            self.allowed = torch.zeros(len(self.known.labels), dtype=torch.bool)
            self.allowed[[each for each in outputs if each >= 0]] = True

    def _files(self, folder: Path) -> Files:
        listed, omitted = files_below(folder, is_image)
        if omitted:
            links = counted(len(omitted), "link")
            rank_zero_warn(plain(f"{folder}: omitted {links} to files already used (such as {omitted[0]})"))
        paths = [os.path.join(place, name) for place, names in listed.items() for name in names]
        if not paths:
            raise ValueError(f"{folder} has no images")
        paths.sort(key=lambda path: os.path.split(path))
        samples = self._of_folders(folder, listed, paths) if self.file is None else self._of_file(self.file, paths)
        if not samples:
            raise ValueError(f"{folder} has no image of a class that the checkpoint knows")
        return Files(self.classes, samples, self.preprocess.channels)

    def _of_folders(self, folder: Path, listed: Iterable[str], paths: list[str]) -> list[tuple[str, int]]:
        insides = [Path(path).relative_to(folder).parts for path in paths]
        if loose := next((path for path, inside in zip(paths, insides, strict=True) if len(inside) == 1), None):
            raise ValueError(
                plain(f"{loose} is in no class folder; --labels FILE gives the labels of images in one folder")
            )
        names = sorted({inside[0] for inside in insides})
        folders = {Path(place).relative_to(folder).parts[0] for place in listed if place != str(folder)}
        if empty := sorted(folders - set(names)):
            raise ValueError(plain(f"{folder} has class folders without images: {one_line(', '.join(empty), 100)}"))
        places = self._outputs(names, [str(folder / name) for name in names])
        outputs = dict(zip(names, places, strict=True))
        self._allow(places)
        found = [(path, outputs[inside[0]]) for path, inside in zip(paths, insides, strict=True)]
        return self._kept(found)

    def _outputs(self, names: Sequence[str], places: Sequence[str]) -> list[int]:
        """The output of each class, -1 for an unknown one that is skipped."""
        found = [self._output(name, place) for name, place in zip(names, places, strict=True)]
        output, times = Counter(each for each in found if each >= 0).most_common(1)[0] if max(found) >= 0 else (0, 0)
        if times > 1:
            same = [name for name, each in zip(names, found, strict=True) if each == output][:2]
            label = self.known.labels[output]
            raise ValueError(plain(f"classes '{same[0]}' and '{same[1]}' are both '{label}' of the checkpoint"))
        return found

    def _output(self, name: str, place: str) -> int:
        found = self.known.find(name)
        if found is None and name.isdecimal():
            found = self.known.numbers.get(int(name))
        if found is None and not self.skip_unknown:
            hint = self.known.hint(name)
            raise ValueError(
                plain(f"{place}: the checkpoint knows no class '{name}'; {hint}; --names FILE or --skip-unknown")
            )
        return -1 if found is None else found

    def _of_file(self, file: LabelFile, paths: list[str]) -> list[tuple[str, int]]:
        given = file.of(paths)
        if lacking := [path for path, each in zip(paths, given, strict=True) if each is None]:
            raise ValueError(
                plain(f"{file.path} has no label of {lacking[0]} ({counted(len(lacking), 'image')} in all)")
            )
        if (more := max(len(file.by_name), len(file.in_order)) - len(paths)) > 0:
            rank_zero_warn(plain(f"{file.path} has labels of {counted(more, 'image')} more than {self.folder}"))
        outputs: dict[str, int] = {}
        for each in given:
            for label in each.labels if each else ():
                if label not in outputs:
                    assert each is not None
                    outputs[label] = self._labelled(label, f"{file.path}, {each.line}")
        if not file.sets:
            return self._kept(
                [(path, outputs[each.labels[0]]) for path, each in zip(paths, given, strict=True) if each]
            )
        return self._sets(paths, given, outputs)

    def _labelled(self, label: str, place: str) -> int:
        """The output of a label in a file, which may be a number."""
        if not label.isdecimal() or self.known.find(label) is not None:
            return self._output(label, place)
        numbers = self.known.numbers
        if not numbers:
            raise ValueError(f"{place}: label {label} is a number; --names FILE must list the classes in their order")
        if "ground_truth" in place and min(numbers) == 0:
            raise ValueError(
                f"{place}: numbers of the development kit; --names must give its meta.mat or map_clsloc.txt"
            )
        if int(label) not in numbers:
            raise ValueError(f"{place}: label {label} is not from {min(numbers)} to {max(numbers)}")
        return self._output(label, place)

    def _sets(self, paths: list[str], given: Sequence[Given | None], outputs: dict[str, int]) -> list[tuple[str, int]]:
        sets: dict[tuple[int, ...], int] = {}
        samples = []
        for path, each in zip(paths, given, strict=True):
            if found := tuple(sorted({outputs[label] for label in each.labels if outputs[label] >= 0} if each else ())):
                samples.append((path, sets.setdefault(found, len(sets))))
        if omitted := len(paths) - len(samples):
            rank_zero_info(f"skipped   {counted(omitted, 'image')} without labels")
        self.accepted = torch.zeros(len(sets), len(self.known.labels), dtype=torch.bool)
        for found, place in sets.items():
            self.accepted[place, list(found)] = True
        return samples

    def _kept(self, samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
        kept = [sample for sample in samples if sample[1] >= 0]
        if omitted := len(samples) - len(kept):
            rank_zero_warn(f"skipped {counted(omitted, 'image')} of classes that the checkpoint does not know")
        return kept


def _folder(base: Path, split: str | None) -> tuple[Path, str]:
    """The folder of the images, and the name of the split."""
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder")
    places = SPLITS[split or "val"]
    if found := next((base / name for name in places if (base / name).is_dir()), None):
        return found, split or "val"
    if split is not None or (base / "train").is_dir():
        raise ValueError(f"{base} has no folder {' or '.join(places)}")
    return base, "all"
