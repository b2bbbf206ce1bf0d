"""What the tests of shards share: small data sets, packed."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.__main__ import main
from zoo.data.images import Images


def write_image(path: Path, seed: int, size: tuple[int, int] = (24, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")


def image_folder(folder: Path, train: int = 10, val: int = 3) -> Path:
    """Four classes, of which one has a dot and a space in its name."""
    for number, name in enumerate(("ant", "bee", "cat", "d. og")):
        for index in range(train):
            write_image(folder / "train" / name / f"{index}.x.JPEG", 100 * number + index)
        for index in range(val):
            write_image(folder / "val" / name / f"é{index}.png", 5000 + 100 * number + index)
    return folder


def packed(folder: Path, out: Path, size: str = "30KB", *more: str) -> Path:
    main(["shard", str(folder), str(out), "--size", size, *more])
    return out


def images(root: Path | str, dataset: str = "shards", **options: Any) -> Images:
    return Images(**{"dataset": dataset, "root": str(root), "size": 16, "workers": 0, **options})
