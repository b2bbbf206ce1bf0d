import copy
import json
import os
import pickle
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

import zoo
import zoo.weights.adapt
import zoo.weights.format
import zoo.weights.hub
import zoo.weights.names
import zoo.weights.read
from helpers import randomise, rehash
from zoo.aside import aside
from zoo.inputs.images import ImagePreprocess
from zoo.norms import PRepBN
from zoo.outputs.tokens import train_pieces
from zoo.weights import FILES, CheckpointError, load_checkpoint, load_model, save_model

SMALL = {"dim": 32, "depth": 2, "heads": 2, "image": 16, "patch": 8, "classes": 5}
PREPROCESS = ImagePreprocess(size=16)
FIGURE: Any = {"data": "insects", "split": "val", "metric": "accuracy", "value": 0.875, "n": 360}
FIGURE |= {"interval": [0.8368, 0.9052], "command": "zoo evaluate x"}
LABELS = ["ant", "bee", "cat", "dog", "élan"]


def build(progress: float = 0.5, fused: bool = False, **choices: Any) -> Any:
    model = randomise(zoo.create_model("vit_micro", **{**SMALL, **choices}))
    zoo.advance(model, progress)
    return zoo.fuse(model) if fused else model


def save(folder: Path, model: nn.Module | None = None, **more: Any) -> Path:
    given = {"preset": "vit_micro", "preprocess": PREPROCESS, "labels": LABELS} | more
    return save_model(model if model is not None else build(norm="prepbn", mixer="sla"), folder, **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "good")


@pytest.mark.parametrize("fused", [False, True])
def test_a_pyramid_with_choices_of_its_own_in_each_stage_round_trips(tmp_path: Path, fused: bool):
    sizes = {"dim": (16, 32), "depth": (2, 2), "heads": (2, 4), "image": 16, "classes": 5}
    mixers = ("sla", ("window(size=3)", "channel"))
    model: Any = randomise(zoo.create_model("davit_tiny", **sizes, mixer=mixers, norm=("layernorm", "batchnorm")))
    model = zoo.fuse(model) if fused else model.eval()
    path = save(tmp_path / "pyramid", model, preset="davit_tiny")
    loaded = load_checkpoint(path, check=True)
    assert loaded.model.config == model.config and loaded.model.config.mixer == mixers
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(loaded.model(images), model(images))
    card = (path / "README.md").read_text()
    assert "| mixer | sla, window(size=3) / channel |" in card and "| depth | 2, 2 |" in card
    assert all(f"- {tag}\n" in card for tag in ("pyramid", "sla", "window", "channel", "batchnorm"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, folder / file)
    if "files" in json.loads((folder / "config.json").read_text()):
        rehash(folder)


def refusal(name: str | Path, check: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(name, check=check)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


CASES: dict[str, dict[str, Any]] = {
    "blending": {"norm": "prepbn", "channel": "eca", "progress": 0.5},
    "blended": {"norm": "prepbn", "mixer": "dcnv4", "progress": 1.0},
    "folded": {"norm": "prepbn", "mixer": "sla", "progress": 1.0, "fused": True},
    "folded in part": {"norm": "repbn", "placement": "peri", "layer_scale": 0.1, "channel": "se", "fused": True},
    "buffers": {"channel": "fca", "position": "rope"},
    "folded buffers": {"channel": "fca", "position": "rope", "norm": "batchnorm", "fused": True},
    "deit": {"position": "learned", "pool": "token", "class_token": True},
    "distilled": {"position": "learned", "pool": "distilled", "class_token": True, "registers": 2},
    "parallel": {
        "layout": ("mixer+ffn",),
        "placement": "sub",
        "mixer": "softmax(qk_norm='layernorm')",
        "ffn": "swiglu",
    },
    "headless": {"classes": 0, "norm": "dyt", "position": "cpe"},
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    model = build(**CASES[case])
    model.train(not case.startswith("folded"))
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = torch.get_rng_state()

    given = save(tmp_path / "a b", model, labels=None if case == "headless" else LABELS)
    loaded = load_checkpoint(given, check=True)

    assert torch.equal(torch.get_rng_state(), numbers), "saving and loading draw no random numbers"
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in loaded.model.modules())
    state = loaded.model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
        assert torch.equal(model.state_dict()[name], tensor), f"saving changed {name}"
    images = torch.randn(2, 3, 21, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model.eval()(images))
    config: Any = loaded.model.config
    for field in fields(model.config):
        got, wanted = getattr(config, field.name), getattr(model.config, field.name)
        assert got == wanted and type(got) is type(wanted), field.name
    assert loaded.preprocess == PREPROCESS
    assert loaded.labels == (None if case == "headless" else tuple(LABELS))
    assert (loaded.model.fusion is not None) == case.startswith("folded") == loaded.config["fused"]
    finished = [module.finished for module in loaded.model.modules() if isinstance(module, PRepBN)]
    assert finished == [module.finished for module in model.modules() if isinstance(module, PRepBN)]
    assert bool(finished) == case.startswith("blend")


@pytest.mark.parametrize("case", ["blending", "buffers"])
def test_a_loaded_model_trains(case, tmp_path):
    model = load_model(save(tmp_path / "x", build(**CASES[case]))).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None, name


def test_files(folder, tmp_path):
    """What is written, that it depends on nothing but the model, and that others may read it."""
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert contents(save(tmp_path / "other" / "good", load_model(folder))) == contents(folder)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert [config[key] for key in ("format", "zoo", "family", "preset")] == [4, zoo.__version__, "vit", "vit_micro"]
    assert config["model"].keys() == {field.name for field in fields(zoo.create_model("vit_micro").config)}  # pyright: ignore
    assert config["preprocess"] == PREPROCESS.to_dict() and config["labels"] == LABELS and config["fused"] is False
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    assert probe.keys() == {"input.raw", "output.output"}
    raw = probe["input.raw"]
    assert raw.dtype == torch.uint8 and raw.shape[2] == 3
    assert min(raw.shape[:2]) > PREPROCESS.size / PREPROCESS.crop and raw.shape[0] != raw.shape[1]
    assert torch.equal(probe["output.output"], load_model(folder)(PREPROCESS(raw)[None]))


def test_weights_do_not_hang_on_the_file(folder):
    images = torch.randn(1, 3, 16, 16)
    model = load_model(folder)
    before = model(images)
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "rb+") as file:
        file.write(bytes(size))
    assert torch.equal(model(images), before)


def test_no_preprocess(tmp_path):
    folder = save_model(build(channels=5), tmp_path / "x")
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    assert probe["input.images"].shape == (1, 5, 16, 16) and probe["input.images"].dtype == torch.float32
    loaded = load_checkpoint(folder, check=True)
    assert loaded.preprocess is None and loaded.labels is None and loaded.config["preset"] is None


def test_half_precision(tmp_path):
    model = build(norm="prepbn").bfloat16()
    folder = save(tmp_path / "x", model)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    state = load_checkpoint(folder, check=True).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16, "saving leaves the model as it is"
        assert torch.equal(stored[name], tensor) and stored[name].dtype == torch.bfloat16
        assert torch.equal(state[name], tensor.float()) and state[name].dtype == torch.float32


def test_surroundings(tmp_path):
    """A default device and autocast around the calls change nothing."""
    for case, preprocess in (("buffers", None), ("folded", PREPROCESS)):
        model = build(**CASES[case])
        plain = save(tmp_path / "plain" / "x", model, preprocess=preprocess)
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            folder = save(tmp_path / "x", model, preprocess=preprocess)
            load_checkpoint(plain, check=True)
        assert contents(folder) == contents(plain)


def test_card(folder, monkeypatch):
    model = load_model(folder)
    text = "Tells *animals* apart {really}."
    save(folder, model, card=text, license="mit", source="zoo classify fit", figures=[FIGURE], datasets=["insects"])
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    front = card.data.to_dict()
    assert [front[key] for key in ("library_name", "license")] == ["zoo", "mit"]
    assert {"zoo", "vit", "sla", "prepbn"} <= set(front["tags"]) and "none" not in front["tags"]
    assert front["pipeline_tag"] == "image-classification"
    number = sum(parameter.numel() for parameter in model.parameters())
    for part in (
        text,
        "| mixer | sla |",
        "| insects | val | accuracy | 0.8750 | 360 | 0.8368 to 0.9052 |",
        f"| parameters | {number:,} |",
    ):
        assert part in card.text
    assert "Source: zoo classify fit. Data: insects. License of the weights: mit." in card.text
    assert "Measured by `zoo evaluate x`." in card.text
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.875, "val")
    code = card.text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    Image.new("RGB", (40, 30), "red").save("image.jpg")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (1, 5)
    assert {guess.label for guess in names["answer"]} == {*LABELS} and len(names["answer"]) == 5


# The names in a checkpoint. A change here breaks every checkpoint that exists: write a migration, and raise FORMAT.
NORM = {"weight": [16], "bias": [16], "alpha": [1], "running_mean": [16], "running_var": [16], "blend": []}
NORM |= {"layernorm.weight": [16], "layernorm.bias": [16]}
PINNED = {
    "stem.conv.weight": [16, 3, 8, 8],
    "stem.conv.bias": [16],
    "position.conv.weight": [16, 1, 3, 3],
    "position.conv.bias": [16],
    "blocks.0.steps.0.branch.weight": [8, 1, 5, 5],
    "blocks.0.steps.0.branch.bias": [8],
    "blocks.0.steps.0.branch.qkv.weight": [48, 16],
    "blocks.0.steps.0.branch.qkv.bias": [48],
    "blocks.0.steps.0.branch.out.weight": [16, 16],
    "blocks.0.steps.0.branch.out.bias": [16],
    "blocks.0.steps.0.channel.conv.weight": [1, 1, 3],
    "blocks.0.steps.1.branch.expand.weight": [64, 16],
    "blocks.0.steps.1.branch.expand.bias": [64],
    "blocks.0.steps.1.branch.out.weight": [16, 64],
    "blocks.0.steps.1.branch.out.bias": [16],
    "blocks.0.steps.1.channel.conv.weight": [1, 1, 3],
    **{f"blocks.0.steps.0.before.{name}": shape for name, shape in NORM.items()},
    **{f"blocks.0.steps.1.before.{name}": shape for name, shape in NORM.items()},
    **{f"norm.{name}": shape for name, shape in NORM.items()},
    "head.weight": [5, 16],
    "head.bias": [5],
}


def test_names_are_pinned():
    model = build(dim=16, depth=1, norm="prepbn", mixer="sla", channel="eca", position="cpe")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == PINNED


# The probe


def test_probe_measures(folder):
    """An output that is off by a known share is let through or named with that share."""
    largest = safetensors.torch.load_file(folder / "probe.safetensors")["output.output"].abs().max()
    start = safetensors.torch.load_file(folder / "model.safetensors")["head.bias"]

    def shift(share: float) -> None:
        edit_tensors(folder, lambda tensors: tensors["head.bias"].copy_(start + share * largest * torch.eye(5)[2]))

    shift(5e-5)
    load_checkpoint(folder, check=True)
    shift(3e-4)
    load_checkpoint(folder)
    assert "is off by 0.0003 of its largest value" in refusal(folder, check=True)
    assert "probe.safetensors" in refusal(folder, check=True)


def test_probe_sees_every_weight(folder):
    whole = contents(folder)
    for name in safetensors.torch.load_file(folder / "model.safetensors"):
        if not name.startswith("blocks.0."):
            edit_tensors(folder, lambda tensors, name=name: tensors[name].add_(0.2 * torch.rand(tensors[name].shape)))
            assert "is off by" in refusal(folder, check=True), name
            (folder / "model.safetensors").write_bytes(whole["model.safetensors"])


CHANGES = {
    "mean": [0.406, 0.456, 0.485],
    "std": [0.225, 0.224, 0.229],
    "interpolation": "bilinear",
    "crop": 1.0,
    "size": 24,
}


@pytest.mark.parametrize("field", CHANGES)
def test_probe_sees_preprocessing(field, folder):
    edit(folder, lambda config: config["preprocess"].update({field: CHANGES[field]}))
    load_checkpoint(folder)
    assert "is off by" in refusal(folder, check=True)


def test_probe_sees_what_is_no_number(folder):
    edit_tensors(folder, lambda tensors: tensors["head.bias"].fill_(torch.nan))
    assert "'head.bias' is NaN or infinite" in refusal(folder)


PROBES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "nothing": (lambda probe: probe.clear(), "not a probe"),
    "no output": (lambda probe: probe.pop("output.output"), "not a probe"),
    "another output": (
        lambda probe: probe.update({"output.boxes": probe.pop("output.output")}),
        "gives output, and the probe holds boxes",
    ),
    "another input": (
        lambda probe: probe.update({"input.lengths": torch.ones(1)}),
        "its inputs must be raw",
    ),
    "prepared": (
        lambda probe: (probe.pop("input.raw"), probe.update({"input.images": torch.ones(1, 3, 16, 16)})),
        "its inputs must be raw",
    ),
    "infinite": (lambda probe: probe["output.output"].fill_(torch.inf), "is off by nan"),
    "integers": (lambda probe: probe.update({"output.output": torch.ones(1, 5).long()}), r"expected int64 \[1, 5\]"),
    "no batch": (lambda probe: probe.update({"output.output": torch.ones(0, 5)}), r"expected float32 \[0, 5\]"),
    "no pixels": (lambda probe: probe.update({"input.raw": torch.zeros(0, 5, 3).byte()}), "cannot take"),
    "odd name": (lambda probe: probe.update({"output.a\nb": torch.ones(1)}), "gives output, and the probe holds"),
    "shape": (lambda probe: probe.update({"output.output": torch.zeros(1, 6)}), r"\[1, 5\], expected float32 \[1, 6\]"),
    "input": (lambda probe: probe.update({"input.raw": torch.zeros(1, 3, 16, 16)}), "cannot take"),
}


@pytest.mark.parametrize("case", PROBES)
def test_bad_probe(case, folder):
    change, message = PROBES[case]
    edit_tensors(folder, change, "probe.safetensors")
    load_checkpoint(folder)
    line = refusal(folder, check=True)
    assert re.search(message, line) and "probe.safetensors" in line


def test_missing_probe(folder):
    (folder / "probe.safetensors").unlink()
    load_checkpoint(folder)
    assert "has no probe.safetensors" in refusal(folder, check=True)


# Bad input


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


def test_migration(folder, monkeypatch):
    """A file of an older format loads through the table, step by step, and is what the newest writes."""

    def age(config: dict[str, Any]) -> None:
        config["format"] = -1
        config["names"] = config.pop("labels")
        config["model"]["attention"] = config["model"].pop("mixer")

    def rename_labels(config: dict[str, Any], folder: Path) -> dict[str, Any]:
        return config | {"format": 0, "labels": config.pop("names")}

    def rename_mixer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
        return config | {"format": 4, "model": config["model"] | {"mixer": config["model"].pop("attention")}}

    newest = load_checkpoint(folder).config
    edit(folder, age)
    assert "format -1" in refusal(folder)
    table = zoo.weights.format.MIGRATIONS | {-1: rename_labels, 0: rename_mixer}
    monkeypatch.setattr(zoo.weights.format, "MIGRATIONS", table)
    loaded = load_checkpoint(folder, check=True)
    assert loaded.labels == tuple(LABELS)
    assert loaded.config == newest
    monkeypatch.setattr(zoo.weights.format, "MIGRATIONS", {-1: rename_labels})
    assert "format 0" in refusal(folder)


NEW = ("card", "license", "datasets", "figures", "base", "dtype", "parameters", "cost", "files")
OLD_CARD = """---
license: mit
---

# x

Tells insects apart.

| choice or figure | value |
|---|---|
| mixer | sla |
| fused | no |
| parameters | 1,234 |
| accuracy | 0.875 |
| n | 360 |
"""


def old(folder: Path, format: int, **changes: Any) -> None:
    """A checkpoint as format 1 or 2 wrote it: two fields of labels, `modulate`, one nameless input and output, and what
    is known of the model in the card alone."""

    def age(config: dict[str, Any]) -> None:
        config["format"] = format
        for name in NEW:
            del config[name]
        del config["model"]["modulation"]
        config["model"]["modulate"] = False
        if format == 2:
            config["tokenizer"] = None
        config |= changes

    edit(folder, age)
    (folder / "README.md").write_text(OLD_CARD)
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    named = {key.partition(".")[0]: tensor for key, tensor in probe.items()}
    safetensors.torch.save_file(named, folder / "probe.safetensors")


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("preprocess", [PREPROCESS, None])
def test_what_the_first_edition_wrote_is_read(format, preprocess, tmp_path):
    path = save(tmp_path / "x", preprocess=preprocess)
    newest = load_checkpoint(path)
    old(path, format)
    loaded = load_checkpoint(path, check=True)
    unknown = {"model": {}, "files": {}, "cost": None}
    figure = {"data": "", "split": "", "metric": "accuracy", "value": 0.875, "n": 360, "interval": None, "command": ""}
    said = {"license": "mit", "card": "Tells insects apart.", "parameters": 1234, "figures": [figure]}
    assert loaded.config | unknown == newest.config | unknown | said
    assert loaded.model.config == newest.model.config and loaded.labels == tuple(LABELS)
    edit_tensors(path, lambda probe: probe["output"].add_(0.1), "probe.safetensors")
    assert "is off by" in refusal(path, check=True)


def test_what_is_wrong_in_an_old_format_is_said(folder):
    old(folder, 2, tokenizer={"kind": "characters", "pieces": ["a"]})
    assert "it has both labels and a tokenizer" in refusal(folder)
    edit(folder, lambda config: config.update(labels=None))
    assert "labels" in refusal(folder)
    edit(folder, lambda config: config.update(tokenizer=None, labels=LABELS))
    edit(folder, lambda config: config["model"].update(modulate="yes"))
    assert "the model field 'modulate', which zoo" in refusal(folder)
    edit(folder, lambda config: config["model"].update(modulate=True))
    assert "no condition" in refusal(folder)


def test_a_family_s_own_migration_names_the_file(tmp_path):
    small = {"dim": 16, "widths": (16, 24), "strided": (0,), "depth": 2, "heads": 2, "mixer": "relative"}
    path = zoo.save_model(zoo.create_model("efficient_conformer_s", **small).eval(), tmp_path / "x")

    def age(config: dict[str, Any]) -> None:
        config |= {"format": 2, "tokenizer": None}
        config["model"] |= {"mixers": ["grouped(size=3)", "sla"], "mixer": "softmax"}

    edit(path, age)
    assert "mixer 'softmax' would be ignored: mixers gives one for each stage" in refusal(path)
    edit(path, lambda config: config["model"].update(mixer="relative"))
    assert "does not fit" in refusal(path), "it is read as a model whose second stage has another mixer"


def test_names_may_come_in_any_collection(tmp_path):
    import numpy

    for labels in (numpy.array(LABELS), dict.fromkeys(LABELS).keys(), tuple(LABELS)):
        assert load_checkpoint(save(tmp_path / "x", labels=labels)).labels == tuple(LABELS)
    for labels in (set(LABELS), dict.fromkeys(LABELS, 1), "abcde"):
        with pytest.raises(ValueError, match="labels must be a list of names"):
            save(tmp_path / "x", labels=labels)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    one, other = build(dim=16, depth=1), build(dim=16, depth=1)
    other.head.bias.data += 1.0
    folder, read, calls = save(tmp_path / "x", one), zoo.weights.read.read_config, []

    def interrupted(path: Path) -> dict[str, Any]:
        found = read(path)
        if not calls:
            calls.append(path)
            save(folder, other, labels=[*reversed(LABELS)])
        return found

    monkeypatch.setattr(zoo.weights.read, "read_config", interrupted)
    model, _, labels, _ = load_checkpoint(folder, check=True)
    assert calls and labels == tuple(reversed(LABELS)) and torch.equal(model.head.bias, other.head.bias)


def test_fields_that_are_left_out_have_their_defaults(tmp_path):
    folder = save(tmp_path / "x", build(drop_path=0.3))
    edit(folder, lambda config: config["model"].pop("drop_path"))
    model: Any = load_checkpoint(folder, check=True).model
    assert model.config.drop_path == 0.0 and model.blocks[-1].steps[0].drop == 0.0


# Saving


def test_refused_models(folder):
    """What cannot be saved is said before anything is written, and the old checkpoint stays."""
    before = contents(folder)

    def refused(message: str, model: Any = None, **more: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            save(folder, model, **more)
        assert "\n" not in str(error.value)
        assert contents(folder) == before and os.listdir(folder.parent) == [folder.name]

    refused("4 names, but the model has 5 classes", labels=LABELS[:4])
    refused("labels must be a list of names, one for each class, got str", labels="abcde")
    refused("makes 3 channels, but the model takes 1", build(channels=1))
    refused("unknown preset 'vit_giant'", preset="vit_giant")
    refused("needs a model of the zoo, got a Linear", nn.Linear(3, 3))
    refused("needs a model of the zoo, got a Wrapped", type("Wrapped", (nn.Sequential,), {})(build()))
    refused("float64", build().double())
    model = build()
    model.head.weight.data[0, 0] = torch.inf
    refused("'head.weight' is NaN or infinite", model)
    model = build(norm="batchnorm")
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e6)  # which float16 does not have
    refused("running_var' is NaN or infinite", model.half())
    model = build()
    model.head = nn.Linear(32, 6)
    refused(r"does not describe it.*\[6\], expected \[5\].*previous one is untouched", model)
    model = build()
    model.norm.eps = 1.0
    refused("does not describe it.*is off by", model)
    model = build()
    model.blocks[0] = torch.compile(model.blocks[0], backend=never)
    refused("'blocks.0' is compiled on its own; put blocks.0._orig_mod in its place", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})
    refused("is quantized, which checkpoints do not support; save the model before quantizing it", quantized)
    refused(r"unknown preset '\['a'\]", preset=["a"])
    refused("source must be a string, got int", source=1)
    refused("license must be a string, got int", license=1)
    refused("license must be a name such as apache-2.0, got 'a b'", license="a b")
    refused("datasets must be a list of names", datasets="insects")
    refused("base must have the fields address, commit, layout", base={"address": "x"})
    for changes, words in (
        ({"value": torch.nan}, "value must be a finite number, got nan"),
        ({"value": "0.5"}, "value must be a finite number"),
        ({"n": -1}, "n must be an integer >= 0, got -1"),
        ({"interval": [0.1]}, "interval must be two finite numbers or null"),
        ({"data": None}, "data must be a string, got NoneType"),
    ):
        refused(r"figures\[1\]: " + words, figures=[FIGURE, FIGURE | changes])
    refused(r"figures\[0\] must have the fields data, split, metric", figures=[{"accuracy": 0.5}])
    refused("figures must be a list, got dict", figures={"accuracy": 0.5})


def never(*given: Any) -> Any:
    pytest.fail("the model was compiled")


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_is_saved_without_being_compiled(way, tmp_path):
    model = build()
    if way == "in place":
        model.compile(backend=never)
    compiled = torch.compile(model, backend=never) if way == "wrapped" else model
    loaded = load_model(save(tmp_path / "x", compiled), check=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert way == "wrapped" or compiled._compiled_call_impl is not None


@pytest.mark.parametrize(
    "change", [lambda model: model, zoo.fuse, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_what_a_checkpoint_says_travels_with_its_model(change, tmp_path):
    said = {"license": "mit", "source": "a | b", "figures": [FIGURE | {"data": "a | b"}], "datasets": ["insects"]}
    said |= {"card": "Insects.\n\n## Data\n\n| n | mean |\n|---|---|\n| 3 | 0.5 |\n\nMore."}
    start = save(tmp_path / "start", build(), **said)
    again = load_checkpoint(save_model(change(load_model(start)), tmp_path / "again"), check=True)
    assert (again.labels, again.preprocess, again.config["preset"]) == (tuple(LABELS), PREPROCESS, "vit_micro")
    assert again.config["source"] == "a | b"
    cards = [(tmp_path / name / "README.md").read_text() for name in ("start", "again")]
    assert cards[0].replace("start", "again").replace("| fused | no |", "") == cards[1].replace(
        f"| fused | {'yes' if change is zoo.fuse else 'no'} |", ""
    )
    other = save_model(
        load_model(start), tmp_path / "other", labels=[*"abcde"], preprocess=replace(PREPROCESS, crop=0.5)
    )
    assert load_checkpoint(other).labels == tuple("abcde") and load_checkpoint(other).preprocess.crop == 0.5
    model: Any = load_model(start)
    model.labels = model.preprocess = None
    bare = load_checkpoint(save_model(model, tmp_path / "bare"), check=True)
    assert bare.labels is None and bare.preprocess is None


def test_a_card_that_someone_changed_is_read_as_far_as_possible(folder):
    old(folder, 2)
    for text in ("", "no title", "# only a title", "# x\n\n| a | b | c |\n| parameters |", "\0", "| fused | no |"):
        (folder / "README.md").write_text(text)
        about = load_model(folder).about
        assert (about["license"], about["figures"], about["source"]) == ("unknown", [], "")
    (folder / "README.md").write_bytes(b"\xff")
    assert load_model(folder).about["card"] == ""
    (folder / "README.md").unlink()
    assert load_model(folder).about["card"] == ""


def test_a_checkpoint_without_preprocess_or_labels_is_remarked(tmp_path):
    for missing, words in (
        ({"preprocess": None}, "without preprocess, so it takes no files, only prepared inputs; give it to save_model"),
        ({"labels": None}, "without labels, so its outputs have no names; give them to save_model"),
        ({"preprocess": None, "labels": None}, "without preprocess and labels, so it takes no files, .* and its outp"),
    ):
        with pytest.warns(UserWarning, match=f"^x was saved {words}") as seen:
            save(tmp_path / "x", build(), **missing)
        assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "x", build())
        save(tmp_path / "y", build(classes=0), preprocess=None, labels=None)


def test_a_tokenizer_travels_with_its_model(tmp_path):
    small = {"dim": 16, "depth": 1, "heads": 2, "mels": 16, "vocabulary": 13}
    tokenizer = train_pieces(["the cat sat on the mat"] * 4, 12)
    start = save_model(zoo.create_model("conformer_ctc_s", **small), tmp_path / "start", labels=tokenizer)
    assert load_checkpoint(save_model(copy.deepcopy(load_model(start)), tmp_path / "again")).labels == tokenizer


def test_odd_texts_stay_whole(tmp_path):
    """Names of folders may hold anything: bytes that are no UTF-8, line breaks, a terminal's commands."""
    labels = ["a\udcff", "b\nc", "\x1b[31m", "|", "\u202e"]
    folder = tmp_path / "x\ny|\x1b"
    figures = [FIGURE | {"data": "a|b\ne", "command": "c`d\x1b"}]
    save(folder, build(), labels=labels, source="a\x1b\udcff\nb", figures=figures)
    assert load_checkpoint(folder, check=True).labels == tuple(labels)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "| a\\|b e | val |",
        "Measured by `cd\\x1b`.",
        "# x\\ny|\\x1b\n",
        "Source: a\\x1b\\udcff b.",
    ):
        assert part in card
    assert "\x1b" not in card and "\nb" not in card.split("Source")[1].split("```")[0]


def test_a_key_twice_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"fused"', '"source": "x", "fused"'))
    assert "config.json cannot be read as JSON: key 'source' appears twice" in refusal(folder)


def test_only_checkpoints_are_replaced(folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt"):
        save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds README.md"):
        save(tmp_path / "docs")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        save(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write the checkpoint .*file/below"):
        save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_replaced(folder, tmp_path, monkeypatch):
    """Through a link, from within, with odd names, onto an empty or a broken folder."""
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", build(classes=2), labels=["a", "b"])
    assert (tmp_path / "link").is_symlink() and load_checkpoint(folder, check=True).labels == ("a", "b")
    (folder / "model.safetensors").write_bytes(b"")
    save(folder)
    (tmp_path / "[a]*?").mkdir()
    monkeypatch.chdir(tmp_path)
    assert save(Path("[a]*?")) == tmp_path / "[a]*?"
    save(Path("[a]*?"))
    for name in ("link", folder, "[a]*?"):
        load_checkpoint(name, check=True)
    assert sorted(os.listdir(tmp_path)) == sorted(["link", "good", "[a]*?"])


class Killed(BaseException):
    pass


SITES: list[tuple[Any, str]] = [
    (Path, "mkdir"),
    (Path, "write_text"),
    (safetensors.torch, "save_file"),
    (shutil, "copymode"),
    (os, "fsync"),
    (os, "replace"),
]


def fail_from(
    monkeypatch: pytest.MonkeyPatch, sites: list[tuple[Any, str]], error: BaseException, calls: range
) -> list:
    """Makes those calls to the given functions fail whose number is in `calls`; returns the names called."""
    made: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            made.append(name)
            if len(made) - 1 in calls:
                raise error
            return real(*given, **named)

        return call

    for home, name in sites:
        monkeypatch.setattr(home, name, failing(name, getattr(home, name)))
    return made


def head_bias(folder: Path) -> list[float]:
    model: Any = load_checkpoint(folder, check=True).model
    return model.head.bias.tolist()


NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "sites", "lasting"),
    [(NO_SPACE, SITES, False), (NO_SPACE, SITES, True), (SafetensorError("disk full"), SITES[2:3], False)],
)
def test_full_disk(error, sites, lasting, tmp_path, monkeypatch):
    """Whatever call fails, once or from then on: a line that says so, or a whole new checkpoint; never a broken one."""
    old, new, folder = build(dim=16, depth=1), build(dim=16, depth=1), tmp_path / "x"
    new.head.bias.data += 1.0
    reached, made, number = set(), [], 0
    for number in range(100):
        before = contents(save(folder, old))
        with monkeypatch.context() as patch:
            made = fail_from(patch, sites, error, range(number, 1000 if lasting else number + 1))
            try:
                save(folder, new)
            except OSError as raised:
                assert "\n" not in str(raised) and f"cannot write the checkpoint {folder}" in str(raised)
                assert "previous one is untouched" in str(raised)
                assert head_bias(folder) == old.head.bias.tolist()
                reached.add(made[number])
                if not lasting or made[number] != "replace":
                    assert contents(folder) == before and os.listdir(tmp_path) == ["x"]
                continue
        assert head_bias(folder) == new.head.bias.tolist()
        if len(made) <= number:
            break
    assert reached == {name for _, name in sites} and len(made) == number


def test_full_disk_at_the_first_save(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_from(patch, SITES, NO_SPACE, range(4, 1000))
        with pytest.raises(OSError, match="No space left on device; nothing was left behind"):
            save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_file_size_limit(folder, tmp_path):
    """The system itself refuses to write on."""
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large.*previous one is untouched"):
            save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before and os.listdir(tmp_path) == [folder.name]


def test_killed(tmp_path, monkeypatch):
    """Killed at any call, with nothing tidied up: a whole checkpoint loads, and the next save finds its way."""
    old, new, folder = build(dim=16, depth=1), build(dim=16, depth=1), tmp_path / "x"
    new.head.bias.data += 1.0
    seen, made, number = set(), [], 0
    for number in range(100):
        save(folder, old)
        with monkeypatch.context() as patch:
            made = fail_from(patch, [*SITES, (shutil, "rmtree")], Killed(), range(number, 1000))
            try:
                save(folder, new)
                break
            except Killed:
                pass
        bias = head_bias(folder)
        assert bias in (old.head.bias.tolist(), new.head.bias.tolist())
        seen.add((folder.is_dir(), bias == new.head.bias.tolist()))
        with monkeypatch.context() as patch:
            fail_from(patch, SITES[2:3], NO_SPACE, range(1))
            with pytest.raises(OSError, match="previous one is untouched"):
                save(folder, new)
        assert head_bias(folder) == bias
        save(folder, old)
        assert not list(tmp_path.glob(".*.previous"))
    assert len(made) == number > len(SITES)
    assert seen == {(True, False), (False, False), (True, True)}, "before, between and after the two renames"


def test_leftovers_are_removed_and_a_save_at_the_same_time_is_not(folder):
    shutil.copytree(folder, folder.parent / ".zoo-0000.new" / "files" / folder.name)
    with aside(folder.parent) as other:
        save(folder)
        assert sorted(os.listdir(folder.parent)) == [other.parent.name, "good"]
    assert os.listdir(folder.parent) == ["good"]


def test_folders_come_before_the_hub(folder, tmp_path, monkeypatch):
    def download(*given: Any) -> Path:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(zoo.weights.hub, "download", download)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "owner/name")
    shutil.copytree(folder, "checkpoints/vit.digits")
    for name in ("owner/name", "vit.digits", "checkpoints/vit.digits", tmp_path / "owner" / "name"):
        assert load_checkpoint(name).labels == tuple(LABELS)
