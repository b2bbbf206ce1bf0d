"""Each kind of damage to a checkpoint is refused in one line, and no code in it is run."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
import zoo.weights.names
from checkpoint_cases import LABELS, edit, edit_tensors, refusal
from zoo.weights import FILES, load_model


def put(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda config: config.update({key: value}))


def put_model(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda config: config["model"].update({key: value}))


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def cut(length: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "model.safetensors", length)


def only(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


CONFIG, WEIGHTS = "config.json", "model.safetensors"
BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG, "has no config.json"),
    "empty config": (write(CONFIG, b""), CONFIG, "cannot be read as JSON"),
    "cut config": (write(CONFIG, b'{"format": 1, "zo'), CONFIG, "cannot be read as JSON"),
    "binary config": (write(CONFIG, bytes(range(128, 256))), CONFIG, "cannot be read as JSON"),
    "deep config": (write(CONFIG, b"[" * 200_000), CONFIG, "cannot be read as JSON"),
    "list": (write(CONFIG, b"[1]"), CONFIG, "not the config of a checkpoint"),
    "no format": (lambda folder: edit(folder, lambda config: config.pop("format")), CONFIG, "format"),
    "true format": (put("format", True), CONFIG, "format"),
    "newer": (put("format", 5), CONFIG, f"format 5 of zoo {zoo.__version__}.*upgrade zoo"),
    "older": (put("format", 0), CONFIG, "format 0"),
    "no field": (lambda folder: edit(folder, lambda config: config.pop("fused")), CONFIG, "lacks field 'fused'"),
    "new field": (put("extra", 1), CONFIG, "unknown field 'extra'"),
    "kind": (put("fused", "no"), CONFIG, "fused.*str"),
    "family": (put("family", "unheard"), CONFIG, "unknown family 'unheard'.*vit"),
    "family path": (put("family", "os.system"), CONFIG, "unknown family 'os.system'"),
    "family list": (put("family", ["vit"]), CONFIG, "family.*list"),
    "model kind": (put("model", [1]), CONFIG, "model.*list"),
    "model field": (
        lambda folder: (put("zoo", "9.8.7")(folder), put_model("gyroscope", 3)(folder)),
        CONFIG,
        "zoo 9.8.7 wrote the model field 'gyroscope'",
    ),
    "model lacks": (
        lambda folder: edit(folder, lambda config: config["model"].pop("dim")),
        CONFIG,
        "missing 1 required keyword-only argument: 'dim'",
    ),
    "mixer": (put_model("mixer", "unheard"), CONFIG, "mixer: unknown name 'unheard'"),
    "call": (put_model("mixer", "__import__('os').abort()"), CONFIG, "cannot read"),
    "deep option": (
        put_model("mixer", f"softmax(qk_norm={'-' * 100_000}1)"),
        CONFIG,
        "mixer: cannot read .*100018 characters",
    ),
    "long option": (
        put_model("mixer", f"softmax(qk_norm={'1+' * 20_000}1)"),
        CONFIG,
        "mixer: cannot read .*40018 characters",
    ),
    "heads": (put_model("heads", 5), CONFIG, "heads must divide dim 32, got 5"),
    "huge": (put_model("dim", 2**16), WEIGHTS, "does not fit"),
    "too wide": (put_model("dim", 10**30), CONFIG, "dim must be <= 65,536, got 1000"),
    "too deep": (put_model("depth", 10**6), CONFIG, "depth must be <= 1,000, got 1000000"),
    "deeper": (put_model("depth", 1000), CONFIG, "model.safetensors has no tensor 'blocks.2'"),
    "patch": (put_model("patch", 10**9), CONFIG, "patch must be <= 4,096, got 1000000000"),
    "wide option": (put_model("ffn", "mlp(ratio=1e300)"), CONFIG, "ratio"),
    "huge fused": (
        lambda folder: (put("fused", True)(folder), put_model("dim", 2**16)(folder)),
        WEIGHTS,
        "does not fit",
    ),
    "labels": (put("labels", LABELS[:4]), CONFIG, "labels has 4 names, but the model has 5 classes"),
    "label kind": (put("labels", [1, 2, 3, 4, 5]), CONFIG, "labels"),
    "preprocess": (put("preprocess", {"blur": 1}), CONFIG, "unknown preprocess key blur"),
    "channels": (
        put("preprocess", {"channels": 1, "mean": [0.5], "std": [0.5]}),
        CONFIG,
        "makes 1 channels, but the model takes 3",
    ),
    "fused": (put("fused", True), WEIGHTS, "does not fit"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "has no model.safetensors"),
    "empty weights": (cut(0), WEIGHTS, "not a complete safetensors"),
    "cut header": (cut(500), WEIGHTS, "not a complete safetensors"),
    "cut weights": (cut(50_000), WEIGHTS, "not a complete safetensors"),
    "noise": (write(WEIGHTS, bytes(range(256)) * 9), WEIGHTS, "not a complete safetensors"),
    "folder": (lambda folder: (only("x")(folder), (folder / WEIGHTS).mkdir()), WEIGHTS, "has no model.safetensors"),
    "kind of number": (
        tensors(lambda tensors: tensors.update({"head.bias": tensors["head.bias"].int()})),
        WEIGHTS,
        "'head.bias' has dtype torch.int32, expected torch.float32",
    ),
    "missing": (tensors(lambda tensors: tensors.pop("head.bias")), WEIGHTS, "'head.bias' is missing"),
    "unexpected": (tensors(lambda tensors: tensors.update(more=torch.ones(1))), WEIGHTS, "'more' is unknown"),
    "shape": (
        tensors(lambda tensors: tensors.update({"head.weight": torch.ones(5, 31)})),
        WEIGHTS,
        r"'head.weight' has shape \[5, 31\], expected \[5, 32\]",
    ),
    "many": (tensors(lambda tensors: [tensors.pop(name) for name in [*tensors][:7]]), WEIGHTS, "; and 4 more$"),
    "odd name": (tensors(lambda tensors: tensors.update({"a\nb": torch.ones(1)})), WEIGHTS, r"'a\\nb' is unknown"),
    "pickle": (write(WEIGHTS, pickle.dumps([1, 2])), WEIGHTS, "pickle, which is never read"),
    **{f"only {name}": (only(name), name, "never a pickle") for name in ("a.pt", "a.bin", "A.CKPT", "a.pkl", "a.pth")},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(case, folder):
    damage, file, message = BAD[case]
    damage(folder)
    line = refusal(folder)
    assert file in line and str(folder) in line and re.search(message, line), line


def test_bad_names(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("nothing", "../nothing/here", "a/b/c", "/nothing/here", "https://example.org/x", "nothing@v1"):
        assert f"checkpoint '{name}' not found" in refusal(name)
    here = folder.parent
    assert refusal("/nothing/here").endswith(": /nothing/here is not a folder")
    assert refusal("a/b/c").endswith(f": {here}/a/b/c and {here}/checkpoints/a/b/c are not folders")
    known = f"the checkpoints of the zoo and in ./checkpoints are: {', '.join(zoo.weights.names.index())}"
    assert refusal("nothing").endswith(f"{known}; for one elsewhere, give its path")
    assert isinstance(load_model("vit_micro.digits"), nn.Module), "a checkpoint of the zoo is found anywhere"
    (here / "checkpoints" / "vit_micro.digits").mkdir(parents=True)
    assert "not found: did you mean vit_micro.digits or " in refusal("vit_micro.digit")
    assert "the name of an untrained model" in refusal("caformer_s18")
    (here / "configs/classify").mkdir(parents=True)
    (here / "configs/classify/vit_micro_digits.yaml").touch()
    for name in ("best", "last", ""):
        line = refusal(f"runs/vit_micro_digits/{name}".rstrip("/"))
        assert line.endswith("train it first: zoo classify fit --config configs/classify/vit_micro_digits.yaml")
    assert "train" not in refusal("runs/other/best") and "did you mean" not in refusal("runs/other/best")
    assert "is a file" in refusal(folder / "model.safetensors")
    assert "'' is not the name of a checkpoint" in refusal("")
    (folder.parent / "model.pt").write_bytes(pickle.dumps(1))
    assert "model.pt is a file" in refusal("model.pt")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "probe.safetensors", "model.pt", "x.ckpt"])
def test_no_code_is_run(file, archive, folder, tmp_path):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Evil(marker))
    if archive:
        torch.save(Evil(marker), tmp_path / "evil")
        torch.load(tmp_path / "evil", weights_only=False)
        evil = (tmp_path / "evil").read_bytes()
    else:
        pickle.loads(evil)
    assert marker.exists(), "the trap works"
    marker.unlink()
    (folder / file).write_bytes(evil)
    if file not in FILES:
        (folder / "model.safetensors").unlink()
        assert "is a file" in refusal(folder / file)
    assert file in refusal(folder, check=True)
    assert not marker.exists()
