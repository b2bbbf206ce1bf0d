"""A checkpoint holds what it should, gives the model back bit by bit, and its probe notices what changed."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import zoo
import zoo.weights.hub
import zoo.weights.read
from checkpoint_cases import FIGURE, LABELS, PREPROCESS, build, contents, edit, edit_tensors, refusal, save
from helpers import randomise
from zoo.norms import PRepBN
from zoo.weights import FILES, load_checkpoint, load_model, save_model


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


def test_a_key_twice_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"fused"', '"source": "x", "fused"'))
    assert "config.json cannot be read as JSON: key 'source' appears twice" in refusal(folder)


def test_folders_come_before_the_hub(folder, tmp_path, monkeypatch):
    def download(*given: Any) -> Path:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(zoo.weights.hub, "download", download)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "owner/name")
    shutil.copytree(folder, "checkpoints/vit.digits")
    for name in ("owner/name", "vit.digits", "checkpoints/vit.digits", tmp_path / "owner" / "name"):
        assert load_checkpoint(name).labels == tuple(LABELS)


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
