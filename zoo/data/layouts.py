"""Layouts of data folders that `zoo shard` packs: finds the kind of data, the splits, and their files, shuffled."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.box_entries import SPLITS, BoxSource, MissingSplit
from zoo.data.box_sources import SOURCES, recognised
from zoo.data.boxes import check_equal
from zoo.data.image_sources import imagefolder, is_image
from zoo.data.packing import Layout, Split
from zoo.data.shards import IMAGES, OBJECTS, is_packed
from zoo.data.speech_sources import CORPORA
from zoo.data.strings import Strings
from zoo.inputs.images import ImagePreprocess
from zoo.outputs.label_map import LabelMap
from zoo.text import one_line

SEED = 0  # of the order
LAYOUTS = (
    "train/CLASS/*.jpg; COCO's annotations/*.json, */_annotations.coco.json, YOLO's data.yaml or Pascal VOC's "
    "Annotations; LibriSpeech's SPLIT/**/*.trans.txt; or NeMo's *.json with an audio_filepath in each line"
)


def layout(folder: Path, wanted: Iterable[str] | None = None) -> Layout:
    """The data in a folder, all splits or the wanted ones.

    Raises:
        ValueError: the folder has none of the known layouts, a split is missing, or the data is invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder} is empty")
    if is_packed(folder):
        raise ValueError(f"{folder} holds shards already")
    try:
        kind = recognised(str(folder))
    except ValueError:
        pass
    else:
        return _boxes(folder, kind, wanted)
    if names := _folders_with(folder, is_image, ("train", "val", "test")):
        return _images(folder, _chosen(folder, names, wanted))
    base = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
    if names := _folders_with(base, lambda name: name.endswith(".trans.txt")):
        return _speech(base, "librispeech", _chosen(folder, names, wanted))
    if names := sorted(path.name for path in folder.glob("*.json*") if _is_manifest(path)):
        return _speech(folder, "manifest", _chosen(folder, names, wanted))
    raise ValueError(f"nothing to pack was found in {folder}; it needs {LAYOUTS}")


def _folders_with(folder: Path, fits: Callable[[str], bool], names: Sequence[str] | None = None) -> list[str]:
    """The folders in a folder, or those of these names, that have a file somewhere below whose name fits."""
    found = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    walks = {name: os.walk(folder / name) for name in found if names is None or name in names}
    return [name for name, walk in walks.items() if any(map(fits, (file for _, _, files in walk for file in files)))]


def _is_manifest(path: Path) -> bool:
    with open(path, "rb") as file:
        return b'"audio_filepath"' in file.readline(1 << 16)


def _chosen(folder: Path, found: list[str], wanted: Iterable[str] | None) -> list[str]:
    chosen = found if wanted is None else list(dict.fromkeys(wanted))
    if missing := [name for name in chosen if name not in found]:
        raise ValueError(f"{folder} has no split {one_line(repr(missing[0]), 60)}; it has {', '.join(found)}")
    return chosen


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(count)


def _split(name: str, folder: Path, paths: Iterable[str], arrays: dict[str, np.ndarray], beside: Any) -> Split:
    listed, start = Strings(paths), os.path.join(folder, "")
    names = Strings(listed[number].removeprefix(start) for number in range(len(listed)))
    return Split(name, listed, names, arrays, beside)


def _images(folder: Path, names: list[str]) -> Layout:
    splits, classes = [], []
    for name in names:
        source: Any = imagefolder(name, ImagePreprocess(), str(folder), 0.0)
        order = _shuffled(len(source.labels))
        labels, classes = source.labels[order], source.classes
        splits.append(_split(name, folder, map(os.fsdecode, source.paths[order]), {"label": labels}, Classes(labels)))
    return Layout("images", classes, [], splits)


class Classes:
    """Beside an image, its class as WebDataset writes it."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def __call__(self, number: int) -> dict[str, bytes]:
        return {"cls": b"%d" % self.labels[number]}


def _speech(folder: Path, kind: str, names: list[str]) -> Layout:
    splits = []
    for name in names:
        corpus: Any = CORPORA[kind](name, [name], str(folder), False, None)
        rows: dict[str, list[int]] = {}  # a file may have several utterances
        for row in range(len(corpus)):
            rows.setdefault(corpus.paths[row], []).append(row)
        paths = [*rows]
        paths = [paths[place] for place in _shuffled(len(paths))]
        ordered = [row for path in paths for row in rows[path]]
        texts, utterances = (Strings(map(each.__getitem__, ordered)) for each in (corpus.texts, corpus.names))
        arrays = {"file": np.repeat(np.arange(len(paths)), [len(rows[path]) for path in paths])}
        arrays |= {"start": corpus.starts[ordered], "seconds": corpus.seconds[ordered]}
        arrays |= {"duration": corpus.durations[ordered], "text": texts.bytes, "text_ends": texts.ends}
        arrays |= {"utterance": utterances.bytes, "utterance_ends": utterances.ends}
        splits.append(_split(name, folder, paths, arrays, Transcripts(arrays, texts, utterances)))
    return Layout("speech", [], [], splits)


class Transcripts:
    """Beside an audio file, its text; and where only parts of it are used, these parts with their texts."""

    def __init__(self, arrays: dict[str, np.ndarray], texts: Strings, names: Strings):
        self.arrays, self.texts, self.names = arrays, texts, names
        self.first = np.searchsorted(arrays["file"], np.arange(arrays["file"][-1] + 2))

    def __call__(self, number: int) -> dict[str, bytes]:
        rows = range(*self.first[number : number + 2].tolist())
        found = {"txt": "\n".join(self.texts[row] for row in rows).encode(errors="surrogatepass")}
        starts, seconds = (self.arrays[name][rows.start : rows.stop] for name in ("start", "seconds"))
        if not np.isnan(seconds).all():
            parts = [
                {"name": self.names[row], "text": self.texts[row], "offset": start}
                | ({} if math.isnan(lasting) else {"duration": lasting})
                for row, start, lasting in zip(rows, starts.tolist(), seconds.tolist(), strict=True)
            ]
            found["json"] = json.dumps({"utterances": parts}).encode()
        return found


def _boxes(folder: Path, kind: str, wanted: Iterable[str] | None) -> Layout:
    found: dict[str, BoxSource] = {}
    for name in SPLITS:
        try:
            found[name] = SOURCES[kind](str(folder), name)
        except MissingSplit:
            continue
        check_equal(next(iter(found.values())), found[name])
    names = _chosen(folder, [*found], wanted)
    if not names:
        raise ValueError(f"{folder} has none of the splits {', '.join(SPLITS)}")
    splits = []
    for name in names:
        source = found[name]
        order = _shuffled(len(source))
        counts = np.diff(source.starts)[order]
        starts = np.concatenate([[0], counts.cumsum()])
        # The place in the source of each object, image by image in the new order.
        objects = np.repeat(source.starts[order] - starts[:-1], counts) + np.arange(starts[-1])
        arrays = {each: getattr(source, each)[order] for each in IMAGES}
        arrays |= {each: getattr(source, each)[objects] for each in OBJECTS} | {"starts": starts}
        beside = Annotations(arrays, source.labels)
        splits.append(_split(name, folder, map(source.name, order.tolist()), arrays, beside))
    labels = found[names[0]].labels
    return Layout("boxes", labels.names, labels.ids, splits)


class Annotations:
    """Beside an image, its objects as COCO writes them."""

    def __init__(self, arrays: dict[str, np.ndarray], labels: LabelMap):
        self.arrays, self.labels = arrays, labels

    def __call__(self, number: int) -> dict[str, bytes]:
        first, last = self.arrays["starts"][number : number + 2].tolist()
        labels, boxes, areas, ids, crowd = (self.arrays[name][first:last].tolist() for name in OBJECTS)
        objects = [
            {
                "id": id,
                "category_id": self.labels.ids[label],
                "category": self.labels.names[label],
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
                "iscrowd": int(many),
            }
            for label, (left, top, right, bottom), area, id, many in zip(labels, boxes, areas, ids, crowd, strict=True)
        ]
        height, width = self.arrays["sizes"][number].tolist()
        image = {"id": int(self.arrays["ids"][number]), "height": height, "width": width}
        return {"json": json.dumps(image | {"annotations": objects}).encode()}
