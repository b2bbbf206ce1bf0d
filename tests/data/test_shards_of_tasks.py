"""Shards of speech and of objects hold what the loose files hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from box_cases import write_coco, write_export, write_voc, write_yolo
from sharding import image_folder, librispeech, manifest, packed
from training import refused
from zoo.data.boxes import Boxes
from zoo.data.generation import WholeImages
from zoo.data.speech import Speech
from zoo.inputs.audio import UnreadableAudio


def utterances(data: Speech, split: str) -> list[tuple[str, str, float, bytes]]:
    source = data.source(split)
    waves = [source.waveform(row, 16000).numpy().tobytes() for row in range(len(source))]
    rows = enumerate(waves)
    return sorted((source.name(row), source.text(row), float(source.durations[row]), wave) for row, wave in rows)


def features(data: Speech) -> dict[str, torch.Tensor]:
    batches = [*data.val_dataloader()]
    return {name: row[:20] for batch in batches for name, row in zip(batch.names, batch.features, strict=True)}


def test_utterances_are_those_of_librispeech(tmp_path: Path):
    splits: dict[str, Any] = {"train": "train-clean-100", "val": ["dev-clean", "train-clean-100"], "workers": 0}
    loose = Speech("librispeech", str(librispeech(tmp_path / "loose")), **splits)
    shards = Speech("shards", str(packed(tmp_path / "loose", tmp_path / "out")), **splits)
    with pytest.warns(UserWarning, match="omitted 1 utterances with an empty transcript"):
        assert utterances(loose, "train") == utterances(shards, "train")
    assert len(utterances(shards, "train")) == 6 and len(utterances(shards, "val")) == 11
    assert utterances(loose, "val") == utterances(shards, "val")
    found, wanted = features(shards), features(loose)
    assert len(wanted) == 7 and all(torch.equal(found[name], row) for name, row in wanted.items())
    longest = shards.source("val").take([0, 3, 5])
    assert [longest.text(row) for row in range(3)] == [shards.source("val").text(row) for row in (0, 3, 5)]
    few = Speech("shards", shards.root, val="train-clean-100", limit=3)
    assert len(few.source("val")) == 3
    assert set(utterances(few, "val")) < set(utterances(shards, "val"))


def test_a_nested_librispeech_is_found(tmp_path: Path):
    out = packed(librispeech(tmp_path / "loose" / "LibriSpeech").parent, tmp_path / "out")
    assert len(Speech("shards", str(out), val="dev-clean").source("val")) == 4


def test_utterances_are_those_of_a_manifest(tmp_path: Path):
    folder = manifest(tmp_path / "loose")
    out = packed(folder, tmp_path / "out", "1MB")
    loose = Speech("manifest", str(folder), val="list.json", workers=0)
    shards = Speech("shards", str(out), val="list.json", workers=0)
    found = utterances(shards, "val")
    assert {text for _, text, _, _ in found} == {"unknown length", "whole", "part 0.25", "part 1.0"} and len(found) == 4
    assert found == utterances(loose, "val")
    source: Any = shards.source("val")
    assert len(source.splits[0].kept) == 3  # the file with two parts is stored once


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_texts_and_parts(tmp_path: Path):
    import gc

    from webdataset.compat import WebDataset

    out = packed(manifest(tmp_path / "loose"), tmp_path / "out", "1MB")
    found = [*WebDataset(str(out / "list_json-000000.tar"), shardshuffle=False)]
    assert {each["txt"] for each in found} == {b"whole", b"part 0.25\npart 1.0", b"unknown length"}
    parts = [json.loads(each["json"])["utterances"] for each in found if "json" in each]
    assert [[(part["text"], part["offset"], part["duration"]) for part in each] for each in parts] == [
        [("part 0.25", 0.25, 0.5), ("part 1.0", 1.0, 0.5)]
    ]
    gc.collect()


def test_damaged_audio_is_skipped_by_name(tmp_path: Path):
    out = packed(librispeech(tmp_path / "loose"), tmp_path / "out")
    data = Speech("shards", str(out), val="dev-clean", workers=0)
    source: Any = data.source("val")
    with open(out / "dev-clean-000000.tar", "r+b") as file:
        file.seek(int(source.splits[0].offset[0]) + 100)
        file.write(b"zoo")
    with pytest.raises(UnreadableAudio, match=r"19-198-000\d.flac: damaged, its checksum is wrong$"):
        source.waveform(0, 16000)
    batches = [*data.val_dataloader()]
    assert sum(len(batch.skipped) for batch in batches) == 1 and sum(len(batch.texts) for batch in batches) == 3


def test_utterances_of_a_missing_shard_are_omitted(tmp_path: Path):
    out = packed(librispeech(tmp_path / "loose"), tmp_path / "out", "21KB")
    whole = utterances(Speech("shards", str(out), val="dev-clean"), "val")
    source: Any = Speech("shards", str(out), val="dev-clean").source("val")
    second = str(out / "dev-clean-000001.tar")
    gone = {source.name(row) for row in range(4) if source.splits[0].name(row).startswith(second)}
    (out / "dev-clean-000001.tar").unlink()
    with pytest.warns(UserWarning, match=f"omitted {len(gone)} file"):
        left = utterances(Speech("shards", str(out), val="dev-clean"), "val")
    assert gone and left == [each for each in whole if each[0] not in gone]


# Objects


def objects(data: Boxes, split: str) -> list[Any]:
    source = data.source(split)
    return sorted(
        (
            int(source.ids[row]),
            source.sizes[row].tolist(),
            source.image(row).tobytes(),
            [each.tolist() for each in source.objects(row)],
        )
        for row in range(len(source))
    )


@pytest.mark.parametrize("write", [write_coco, write_export, write_yolo, write_voc], ids=lambda write: write.__name__)
def test_objects_are_those_of_the_files(write: Callable[..., Any], tmp_path: Path):
    folder = tmp_path / "loose"
    folder.mkdir()
    write(folder)
    out = packed(folder, tmp_path / "out", "1MB")
    loose, shards = Boxes("auto", str(folder)), Boxes("auto", str(out))
    assert shards.dataset == "shards" and loose.source("train").labels == shards.source("train").labels
    found = objects(shards, "train")
    assert len(found) == 3 and found == objects(loose, "train")
    assert any(each[3][2] == [False, True] for each in found) or write in (write_yolo, write_voc)


def test_objects_of_a_missing_shard_are_omitted(tmp_path: Path):
    folder = tmp_path / "loose"
    folder.mkdir()
    write_coco(folder)
    out = packed(folder, tmp_path / "out", "11KB")
    whole: Any = Boxes("auto", str(out)).source("train")
    before = objects(Boxes("auto", str(out)), "train")
    assert len(whole.shards.places) > 1
    gone = set(whole.ids[: whole.groups[1]].tolist())
    os.unlink(out / "train-000000.tar")
    with pytest.warns(UserWarning, match="damaged shard"):
        left = objects(Boxes("auto", str(out)), "train")
    assert left == [each for each in before if each[0] not in gone] and gone


def test_the_order_of_training_follows_the_tars(tmp_path: Path):
    folder = tmp_path / "loose"
    folder.mkdir()
    write_coco(folder)
    write_coco(folder, split="val")
    data = Boxes("shards", str(packed(folder, tmp_path / "out", "11KB")), batch=1, workers=0)
    data.source("train")
    groups: Any = data.train_dataloader().batch_sampler.batches.sampler.groups  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert np.array_equal(groups, data.source("train").groups) and len(groups) > 2  # pyright: ignore[reportAttributeAccessIssue]


def test_generation_takes_shards_of_images(tmp_path: Path):
    folder = image_folder(tmp_path / "loose", train=2, val=1)
    out = packed(folder, tmp_path / "out")
    loose, shards = (WholeImages(kind, str(root), size=8) for kind, root in (("imagefolder", folder), ("shards", out)))
    found = [
        sorted(dataset[0, row].images.numpy().tobytes() for row in range(len(dataset)))
        for dataset in (data.plain("train") for data in (loose, shards))
    ]
    assert found[0] == found[1] and len(found[0]) == 8


def test_data_of_another_task_is_refused(tmp_path: Path):
    out = packed(image_folder(tmp_path / "loose", train=1, val=1), tmp_path / "out")
    flags = ["--data.dataset=shards", f"--data.root={out}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    flags += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_epochs=1"]
    wanted = f"{out} holds images, for `zoo classify or generate`, not "
    assert refused("detect", "fit", "--model.backbone.name=rtdetr_r18", *flags) == f"{wanted}boxes"
    said = refused(
        "transcribe", "fit", "--model.backbone.name=conformer_s", *flags, "--data.train=train", "--data.val=val"
    )
    assert said == f"{wanted}speech"
