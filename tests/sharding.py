"""What the tests of shards share: small data sets, packed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
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


def write_tone(path: Path, seconds: float, seed: int, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, noise.clip(-1, 1), rate)


def librispeech(folder: Path) -> Path:
    """Two splits of a few utterances; the text of one is empty."""
    for split, count in (("train-clean-100", 7), ("dev-clean", 4)):
        lines = []
        for number in range(count):
            name = f"19-198-{number:04d}"
            write_tone(folder / split / f"19/198/{name}.flac", 0.2 + 0.05 * number, number + len(split))
            lines.append(f"{name} {'' if number == 2 else f'W{number} Ä'}\n")
        (folder / split / "19/198/19-198.trans.txt").write_text("".join(lines))
    return folder


def manifest(folder: Path) -> Path:
    """A manifest of a whole file and of two parts of another, and of a wave file whose header is wrong."""
    for number, name in enumerate(("a.wav", "b.flac", "c.wav")):
        write_tone(folder / name, 1.0 + number, number)
    content = bytearray((folder / "c.wav").read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    (folder / "c.wav").write_bytes(content)
    lines: list[dict[str, Any]] = [{"audio_filepath": "a.wav", "text": "whole"}]
    lines += [{"audio_filepath": "b.flac", "text": f"part {at}", "offset": at, "duration": 0.5} for at in (0.25, 1.0)]
    lines.append({"audio_filepath": str(folder / "c.wav"), "text": "unknown length"})
    (folder / "list.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder
