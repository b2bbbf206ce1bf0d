"""`zoo detect export`: an ONNX file that gives what PyTorch gives, and everything that is refused."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import zoo
from detecting import TINY
from helpers import randomise
from training import refused
from zoo.__main__ import main
from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs.label_map import LabelMap
from zoo.tasks import predicting
from zoo.tasks.detect.export import MEANING, inputs, meaning, paired
from zoo.weights import load_checkpoint, save_model

LABELS = LabelMap(("a cat\nor two", "犬 🐕", '"quoted", \udcff'), (7, 3, 90))
ROOT = Path(__file__).parents[3]


def save(folder: Path, **choices: Any) -> str:
    torch.manual_seed(0)
    made: Any = randomise(zoo.create_model(**TINY | choices, classes=3))
    for head in made.scores:
        torch.nn.init.normal_(head.weight)
    given: dict[str, Any] = {"preprocess": BoxPreprocess(size=64), "labels": LABELS}
    given |= {"source": "https://example.org/\nmodel", "license": "apache-2.0"}
    return str(save_model(made, folder, preset="rtdetr_micro", **given))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Refusals, before any work


def test_a_file_is_never_replaced(model: str):
    Path("model.onnx").write_text("precious")
    assert refused("detect", "export", model) == "model.onnx exists; delete it, or give another --output"
    Path("link.onnx").symlink_to("nowhere")
    assert refused("detect", "export", model, "-o", "link.onnx").startswith("link.onnx exists")
    assert Path("model.onnx").read_text() == "precious"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "--output must be a file; . is a folder"),
        ("missing/model.onnx", "--output missing/model.onnx: folder not found: missing"),
        ("/proc/model.onnx", "cannot write /proc/model.onnx: "),
        ("x" * 300, f"cannot write {'x' * 300}: File name too long"),
    ],
    ids=["folder", "missing", "unwritable", "long"],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(output: str, message: str):
    assert refused("detect", "export", "no such checkpoint", "-o", output).startswith(message)
    assert not list(Path().iterdir())


def test_a_missing_package_is_named(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predicting, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert refused("detect", "export", model) == 'export needs onnxscript; run: pip install "zoo[export]"'


def test_a_checkpoint_of_another_task_is_refused(monkeypatch: pytest.MonkeyPatch):
    name = str(ROOT / "checkpoints/vit_micro.digits")
    assert refused("detect", "export", name).startswith(f"`zoo detect` cannot use {name}; use `zoo classify")
    assert "'nothing' not found" in refused("detect", "export", "nothing")
    assert not list(Path().iterdir())


def test_a_detr_that_sees_padding_is_refused():
    model: Any = zoo.create_model(
        "detr_r50", trunk=TINY["trunk"], dim=16, depth=1, heads=2, classes=3, padding="published"
    )
    save_model(model, "detr", preset="detr_r50", preprocess=BoxPreprocess(size=64), labels=LABELS)
    assert refused("detect", "export", "detr").startswith("detr has padding 'published', which cannot be exported")


def test_suppression_of_proposals_is_refused(tmp_path: Path):
    name = save(tmp_path / "checkpoint", proposal_nms=0.9)
    assert refused("detect", "export", name).startswith("a model with proposal_nms=0.9 cannot be exported")
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opset", "17"], "argument --opset: must be an integer from 18 to 22, got '17'"),
        (["--opset", "23"], "argument --opset: must be an integer from 18 to 22, got '23'"),
        (["--size", "0"], "argument --size: must be an integer from 1 to 999999999, got '0'"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_wrong_arguments_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["detect", "export", *([] if not flags else ["NAME"]), *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"zoo detect export: error: {message} (see --help)\n"


def test_a_size_that_no_preprocessing_has_is_refused(model: str):
    assert refused("detect", "export", model, "--size", "999999999").startswith("size must be an integer from 1 to ")


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["detect", "export", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80 and "zoo detect export RUN/best" in lines[-1]


# What surrounds the exporter


def test_a_fault_of_the_exporter_leaves_no_file(model: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("step 1 of 3, with advice") from ValueError("no translation\nof zoo::part")

    monkeypatch.setattr(torch.onnx, "export", broken)
    assert refused("detect", "export", model) == "PyTorch cannot export this model: no translation of zoo::part"
    assert not list(Path().iterdir())


def test_inputs_have_one_padded_image():
    detector = zoo.create_model(**TINY, classes=3)
    for batch, height, width in ((1, 20, 17), (3, 1, 1), (3, 64, 50)):
        images, mask = inputs(detector, batch, height, width, torch.Generator()).values()
        assert images.shape == (batch, 3, height, width) and mask.shape == (batch, height, width)
        assert mask.any((1, 2)).all() and mask[1:].all() and not images[~mask[:, None].expand_as(images)].any()
    assert not mask[0].all()


def test_the_file_says_which_boxes_to_leave_out():
    assert meaning(zoo.create_model(**TINY).config) == MEANING
    said = meaning(zoo.create_model(**TINY, detection_nms=0.7).config)
    assert said.startswith(MEANING) and "an IoU over 0.7" in said and "\n" not in said


def test_queries_are_paired_whatever_their_order():
    wanted = {"logits": np.float32(10) * np.random.rand(2, 5, 3), "boxes": np.random.rand(2, 5, 4)}
    order = np.array([4, 0, 3, 1, 2])
    got = {name: each[:, order] + 1e-6 for name, each in wanted.items()}
    assert all(np.allclose(each, wanted[name], atol=1e-5) for name, each in paired(got, wanted).items())
    got["boxes"][1, 2] += 0.5
    assert np.abs(paired(got, wanted)["boxes"] - wanted["boxes"]).max() > 1e-3


# The whole command


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and its unfolded ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    save(folder / "checkpoint", trunk="timm:resnet18d")
    flags = ["-o", str(folder / "model.onnx"), "--no-fuse", "--opset", "22"]
    main(["detect", "export", str(folder / "checkpoint"), *flags])
    return folder


def check(path: Path, checkpoint: Any) -> dict[str, str]:
    """That the file gives what the checkpoint gives, at sizes that no one tried before; its notes."""
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == ["logits", "boxes"]
    for shape in ((1, 17, 20), (1, 1, 1), (2, 96, 33), (5, 64, 64)):
        given = inputs(checkpoint.model, *shape, torch.Generator().manual_seed(7))
        with torch.no_grad():
            wanted = {name: each.numpy() for name, each in checkpoint.model(**given).items()}
        got = session.run(["logits", "boxes"], {name: each.numpy() for name, each in given.items()})
        for name, each in paired(dict(zip(wanted, got, strict=True)), wanted).items():
            assert np.abs(each - wanted[name]).max() <= 1e-3 * np.abs(wanted[name]).max(), (shape, name)
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.all
def test_onnxruntime_gives_what_the_checkpoint_gives(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Folded, for images that are smaller than a stride, with odd names inside."""
    main(["detect", "export", save(tmp_path / "checkpoint"), "-o", "out.onnx", "--size", "20"])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4 and "largest difference: " in said[2] and "wrote out.onnx (" in said[3]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out.onnx"}
    notes = check(tmp_path / "out.onnx", load_checkpoint(tmp_path / "checkpoint"))
    assert LabelMap.from_dict(json.loads(notes["labels"])) == LABELS
    assert BoxPreprocess.from_dict(json.loads(notes["preprocess"])) == BoxPreprocess(size=20)
    assert notes["task"] == "detect" and notes["license"] == "apache-2.0"
    assert notes["source"] == r"https://example.org/\nmodel"


@pytest.mark.all
def test_an_unfolded_model_of_timm_with_a_newer_opset_gives_the_same(exported: Path):
    check(exported / "model.onnx", load_checkpoint(exported / "checkpoint"))


# The guide, whose examples run as written

GUIDE = (ROOT / "configs/detect/README.md").read_text()
ONNX, SUPERVISION = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)


def photo(path: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(values).resize((160, 120), Image.Resampling.NEAREST).save(path, quality=95)


@pytest.mark.all
def test_the_example_with_onnxruntime_alone_gives_what_the_checkpoint_gives(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    photo("photo.jpg")
    (tmp_path / "model.onnx").symlink_to(exported / "model.onnx")
    names: dict[str, Any] = {"__name__": "guide", "print": lambda *words: said.append(words)}
    said: list[Any] = []
    exec(compile(ONNX, "configs/detect/README.md", "exec"), names)
    assert "zoo" not in ONNX and "torch" not in ONNX
    wanted = [each for each in load_checkpoint(exported / "checkpoint")("photo.jpg") if each.score >= 0.3]
    got = sorted(
        zip(names["scores"][names["queries"], names["labels"]], names["labels"], names["corners"], strict=True),
        key=lambda each: -each[0],
    )
    assert len(got) == len(said) == len(wanted) > 3
    for (score, label, box), each in zip(got, wanted, strict=True):
        assert score == pytest.approx(each.score, abs=2e-3) and LABELS.names[label] == each.label
        assert np.clip(box, 0, [160, 120, 160, 120]) == pytest.approx(each.box, abs=0.5)


@pytest.mark.parametrize("threshold", ["0.3", "0.0", "1.1"])
def test_the_arrays_for_supervision(threshold: str, monkeypatch: pytest.MonkeyPatch):
    photo("photo.jpg")
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(SUPERVISION.replace("0.3", threshold), "configs/detect/README.md", "exec"), names)
    made, number = names["detections"], len(names["found"])
    assert made.xyxy.shape == (number, 4) and made.confidence.shape == made.class_id.shape == (number,)
    assert made.class_id.dtype == int and made.xyxy.dtype == made.confidence.dtype == float
    assert (number == 0) == (threshold == "1.1") or threshold == "0.3"
    labels = names["detector"].labels
    wanted = [each.label for each in names["found"]]
    assert [labels.names[index] for index in made.class_id] == list(made.data["class_name"]) == wanted
    assert (made.xyxy[:, 2:] >= made.xyxy[:, :2]).all()
