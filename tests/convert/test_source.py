"""Files of PyTorch that claim more than they hold are refused before memory is taken for it."""

import argparse
import io
import pickle
import resource
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from zoo.convert import from_detr, from_dit
from zoo.convert.source import state_dict_of

GIGABYTE = 2**30


def refusal(path: Path, convert=lambda path: state_dict_of(path, ["model"])) -> str:
    """The one line of a refusal for which no memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        convert(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # in kilobytes
    line = str(error.value)
    assert "\n" not in line and str(path) in line and len(line) < 400
    return line


def bomb(path: Path, zeros: int) -> Path:
    """A file of torch.save whose parts are compressed: `zeros` bytes in a thousandth of the space."""
    plain = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(4)}}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as part:
                content = old.read(entry.filename)
                part.write(content)
                if "/data/" in entry.filename:
                    for _ in range(zeros >> 20):
                        part.write(bytes(2**20))
    return path


@pytest.mark.parametrize("convert", [from_detr, from_dit], ids=["detr", "dit"])
def test_a_zip_bomb_is_refused_before_it_expands(convert, tmp_path):
    path = bomb(tmp_path / "model.pth", GIGABYTE)
    assert path.stat().st_size < GIGABYTE / 100
    assert "its parts are compressed or overlap" in refusal(path, convert)
    assert "its parts are compressed or overlap" in refusal(path)


def test_parts_that_overlap_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.infolist()[1]
        for number in range(3):
            again = zipfile.ZipInfo(f"archive/data/{number + 7}")
            again.file_size, again.compress_size, again.CRC = GIGABYTE, GIGABYTE, first.CRC
            again.header_offset = first.header_offset
            archive.filelist.append(again)
        archive._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
    assert "compressed or overlap" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_claim_more_than_is_stored_are_refused(legacy, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path, _use_new_zipfile_serialization=not legacy)
    assert "its tensors claim far more values than it stores" in refusal(path)
    state = {f"{n}": tensor for n, tensor in enumerate([torch.ones(5000)] * 4)}
    torch.save({"model": state, "args": argparse.Namespace(x=1)}, path, _use_new_zipfile_serialization=not legacy)
    assert state_dict_of(path, ["model"])["3"].sum() == 5000, "tied weights are read"


class Filled:
    """In a pickle, a call of bytearray with a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self):
        return bytearray, (self.number,)


class Empty(Filled):
    def __reduce__(self):
        return torch.Tensor, (self.number,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_number_that_asks_for_memory_is_refused(legacy, tmp_path):
    path = tmp_path / "model.pt"
    given = {"model": {"a": torch.zeros(2)}, "more": Filled(GIGABYTE)}
    torch.save(given, path, _use_new_zipfile_serialization=not legacy)
    assert "it holds a bytearray" in refusal(path)
    torch.save({"a": Empty(4 * GIGABYTE)}, path, _use_new_zipfile_serialization=not legacy)
    refusal(path)


def test_a_bare_pickle_and_a_tar_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(OrderedDict(a=1), protocol=2))
    assert "cannot be read" in refusal(path)
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    assert "it is a tar archive" in refusal(path)
    for content in (b"", b"P", b"PK", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        assert "cannot be read" in refusal(path)
