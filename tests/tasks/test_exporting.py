"""What `export` commands share, on a small stand-in for a model."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from zoo.tasks import exporting

NOTES = {"labels": json.dumps(["line\nbreak", "猫 \udcff"]), "empty": ""}


class Model(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"sums": self.scale * images.sum((2, 3)), "tops": images.amax((2, 3))}


def draw(*shape: int) -> Any:
    return lambda generator: {"images": torch.randn(*shape, generator=generator)}


def same(got: Any, wanted: Any) -> Any:
    return got


def export(model: Any, opset: int = 18) -> bytes:
    free = {"images": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}
    example = {"images": torch.randn(2, 3, 5, 7)}
    return exporting.to_onnx(model, example, free, ["sums", "tops"], opset, NOTES)


@pytest.fixture(scope="module")
def contents() -> bytes:
    return export(Model())


def test_a_file_takes_other_sizes_and_has_its_notes_inside(contents: bytes):
    shapes = [draw(1, 3, 1, 1), draw(4, 3, 9, 6)]
    assert exporting.largest_difference(Model(), contents, shapes, same) < 1e-5  # pyright: ignore
    assert onnxruntime.InferenceSession(contents).get_modelmeta().custom_metadata_map == NOTES


@pytest.mark.parametrize("scale", [1.01, -1.0])
def test_a_difference_is_an_error(contents: bytes, scale: float):
    with pytest.raises(
        ValueError, match="^onnxruntime and PyTorch differ by .* 0.001 is allowed; nothing was written$"
    ):
        exporting.largest_difference(Model(scale), contents, [draw(2, 3, 4, 5)], same)  # pyright: ignore


def test_nan_is_an_error(contents: bytes):
    with pytest.raises(ValueError, match="^the model's output is NaN or infinite$"):
        exporting.largest_difference(Model(float("nan")), contents, [draw(2, 3, 4, 5)], same)  # pyright: ignore


def test_contents_and_inputs_that_onnxruntime_cannot_take_are_one_line(contents: bytes):
    with pytest.raises(ValueError, match="^onnxruntime cannot load the exported model: ") as error:
        exporting.largest_difference(Model(), b"no model", [draw(2, 3, 4, 5)], same)  # pyright: ignore
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"^onnxruntime cannot run the exported model on images \[2, 4, 4, 5\]"
    ) as error:
        exporting.largest_difference(Model(), contents, [draw(2, 4, 4, 5)], same)  # pyright: ignore
    assert "\n" not in str(error.value)


def test_an_opset_that_pytorch_did_not_write_is_an_error():
    class Padded(Model):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return super().forward(nn.functional.pad(images, (0, 1)))

    with pytest.raises(ValueError, match="^PyTorch cannot export this model with opset 16; use --opset 18$"):
        export(Padded(), 16)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_stop_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
):
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr(exporting.os, step, stop)
    with pytest.raises((OSError, KeyboardInterrupt)) as found:
        exporting.write(tmp_path / "model.onnx", b"contents")
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert str(found.value) == f"cannot write {tmp_path}/model.onnx: No space left on device"


def test_what_is_written_has_the_usual_rights(tmp_path: Path):
    exporting.write(tmp_path / "model.onnx", b"contents")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "model.onnx").read_bytes() == b"contents"
    assert (tmp_path / "model.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode
