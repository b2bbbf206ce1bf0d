"""Fingerprints of data in files: a run is not resumed on other files, even where there are as many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from box_cases import coco, write_coco
from sharding import image_folder, images
from speech_sets import libri, write_sets
from training import fit
from zoo.data.boxes import Boxes
from zoo.data.image_sources import Files

RUN = ["--trainer.max_epochs=2", "--data.batch=8", "--trainer.limit_val_batches=1", "--data.size=16"]


def test_a_run_is_not_resumed_on_other_files(tmp_path: Path):
    root, folder = tmp_path / "run", image_folder(tmp_path / "images")
    fit(root, *RUN, f"--data.root={folder}", "--trainer.max_epochs=1", data="imagefolder")
    folder = folder.rename(tmp_path / "moved")
    again = [*RUN, f"--data.root={folder}", f"--ckpt_path={root}/resume/last.ckpt"]
    (folder / "train/ant/0.x.JPEG").rename(folder / "train/bee/other.JPEG")
    with pytest.raises(SystemExit) as stop:
        fit(root, *again, data="imagefolder")
    assert stop.value.code == (
        f"zoo: error: the data of 'train' in {folder} is not that which the run was started on; "
        "restore it, or resume on this with --data.changed=ok"
    )
    (folder / "train/bee/other.JPEG").rename(folder / "train/ant/0.x.JPEG")
    fit(root, *again, data="imagefolder")


def image_label(folder: Path, changed: bool) -> Any:
    if not changed:
        image_folder(folder)
    else:
        (folder / "train/cat/1.x.JPEG").rename(folder / "train/cat/11.x.JPEG")
    return images(folder, "imagefolder").source("train")


def transcript(folder: Path, changed: bool) -> Any:
    if not changed:
        write_sets(folder)
    else:
        path = folder / "train-clean-100/1/7/1-7.trans.txt"
        path.write_text(path.read_text().replace("CAT", "CAR"))
    return libri(folder).source("train")


def box(folder: Path, changed: bool) -> Any:
    values = coco()
    if changed:
        values["annotations"][0]["bbox"][2] -= 1
    write_coco(folder, values)
    write_coco(folder, values, "val")
    return Boxes(dataset="coco", root=str(folder), workers=0).source("train")


@pytest.mark.parametrize("read", [image_label, transcript, box])
def test_the_fingerprint_changes_with_the_data(read: Callable[[Path, bool], Any], tmp_path: Path):
    first, moved = read(tmp_path / "one", False), read(tmp_path / "two", False)
    assert first.fingerprint == moved.fingerprint != read(tmp_path / "two", True).fingerprint


@pytest.mark.parametrize("labels", [(0, 1, 1), (0, 0, 0)])
def test_the_fingerprint_changes_with_a_label_alone(labels: tuple[int, ...]):
    names = ["a.png", "b.png", "c.png"]
    one, other = (Files(["x", "y"], list(zip(names, given, strict=True)), 3) for given in ((0, 0, 1), labels))
    assert one.fingerprint != other.fingerprint
