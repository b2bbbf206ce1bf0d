"""Images with objects in shards."""

import numpy as np

from zoo.data.box_entries import BoxSource
from zoo.data.shards import IMAGES, OBJECTS, Shards
from zoo.inputs.images import UnreadableImage
from zoo.outputs.label_map import LabelMap


class Packed(BoxSource):
    """A data set of objects in any format, as `zoo shard` packed it; what was wrong with it was reported then."""

    def __init__(self, root: str, split: str) -> None:
        self.place, self.shards = f"{root} ({split})", Shards(root, split, "boxes", UnreadableImage)
        self.fingerprint, self.groups = self.shards.fingerprint, self.shards.groups
        index, arrays, kept = self.shards.index, self.shards.arrays, self.shards.kept
        self.labels = LabelMap(tuple(index.classes), tuple(index.ids))
        self.ids, self.sizes = (arrays[name][kept] for name in IMAGES)
        counts, there = np.diff(arrays["starts"]), np.zeros(self.shards.first[-1], dtype=bool)
        there[kept] = True
        objects = np.repeat(there, counts)
        self.labels_of, self.boxes, self.areas, self.object_ids, self.crowd = (
            arrays[name][objects] for name in OBJECTS
        )
        self.starts = np.concatenate([[0], counts[kept].cumsum()])

    def name(self, index: int) -> str:
        return self.shards.name(int(self.shards.kept[index]))

    def content(self, index: int) -> bytes:
        return self.shards.read(int(self.shards.kept[index]))
