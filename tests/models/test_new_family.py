"""A family that no other file knows: built, listed, described, saved, loaded and carded by what its config says of
itself alone. It is as unlike the others as can be: two inputs, no preprocessing, an answer in a dict that ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import zoo
from helpers import randomise, rehash
from zoo.__main__ import main
from zoo.block import Block
from zoo.config import FlatConfig
from zoo.layer import Context
from zoo.models import FAMILIES, PRESETS, describe
from zoo.models.base import Model
from zoo.quick import model_page
from zoo.spec import Choice
from zoo.tensors import linear, to_tokens
from zoo.weights import CheckpointError, adapt


@dataclass(frozen=True, kw_only=True)
class RankingConfig(FlatConfig):
    """Finds the best of its tokens at a time."""

    argument = "x"
    labels = "classes"
    provides = frozenset({"cond"})
    shown = ("dim", "mixer", "modulation", "best")

    modulation: Choice = "adaln"
    channels: int = 4
    classes: int = 3
    best: int = 2

    def grid(self, stage: int) -> tuple[int, int]:
        return 4, 4

    @property
    def labelled(self) -> int:
        return self.classes

    @property
    def pipeline_tag(self) -> str:
        return "object-detection"

    def call(self, prepared: str) -> str:
        return f"found = model({prepared}, time)"

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.randn(1, self.channels, 4, 4, generator=generator), "time": torch.tensor([0.3])}

    def probe_outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, Ranking)
        tokens = model.encode(**inputs)
        return {"tokens": tokens, "logits": model.head(tokens)}

    def build(self) -> "Ranking":
        return Ranking(self)


class Ranking(Model[RankingConfig]):
    def __init__(self, config: RankingConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(config.channels, config.dim, 1)
        self.blocks = nn.ModuleList(Block(config.block(index=index)) for index in range(config.depth))
        self.head = linear(config.dim, config.classes)

    def encode(self, x: Tensor, time: Tensor) -> Tensor:
        cond = time[:, None, None].expand(-1, 1, self.config.dim)
        return self.run(self.blocks, to_tokens(self.stem(x)), Context(grid=(x.shape[2], x.shape[3]), cond=cond))

    def forward(self, x: Tensor, time: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encode(x, time))
        order = logits.amax(-1).topk(self.config.best).indices
        return {"logits": logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1])), "order": order}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "ranking", RankingConfig)
    monkeypatch.setitem(PRESETS, "ranking_tiny", RankingConfig(dim=16, depth=3, heads=2))


@pytest.fixture
def model(family: None) -> Any:
    return randomise(zoo.create_model("ranking_tiny", mixer=("softmax", "sla"))).eval()


LABELS = ["ant", "bee", "cat"]


def test_it_is_listed_and_described(family):
    assert zoo.list_models("rank*") == ["ranking_tiny"]
    found = describe("ranking_tiny", best=3)
    with torch.device("meta"):
        assert found["parameters"] == sum(p.numel() for p in zoo.create_model("ranking_tiny").parameters())
    assert found["family"] == "ranking" and found["about"] == ""
    assert {"dim": "16", "modulation": "adaln", "best": "3"}.items() <= found["fields"].items()
    assert "  best = 3" in model_page("ranking_tiny", found)


def test_it_is_saved_loaded_and_carded(model, tmp_path):
    folder = zoo.save_model(model, tmp_path / "kept", preset="ranking_tiny", labels=LABELS)
    loaded = zoo.load_checkpoint(folder, check=True)
    assert loaded.model.config == model.config and loaded.labels == tuple(LABELS) and loaded.preprocess is None
    x, time = torch.randn(2, 4, 4, 4), torch.tensor([0.1, 0.9])
    wanted, got = model(x, time), loaded.model(x, time)
    assert torch.equal(got["order"], wanted["order"]) and torch.equal(got["logits"], wanted["logits"])
    card = (folder / "README.md").read_text()
    for part in ("pipeline_tag: object-detection", "- ranking\n", "| mixer | softmax / sla |", "| best | 2 |"):
        assert part in card
    assert "model, preprocess, labels, config = checkpoint\n" in card
    assert "it has no preprocess, so prepare the model's inputs yourself" in card
    assert "A `ranking_tiny` model built with zoo." in card
    assert card.rstrip().endswith("found = model(x, time)\n```")


def test_its_probe_names_inputs_and_outputs_and_notices_a_change(model, tmp_path):
    folder = zoo.save_model(model, tmp_path / "kept")
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    assert probe.keys() == {"input.x", "input.time", "output.tokens", "output.logits"}
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["head.bias"] += 0.1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    rehash(folder)
    with pytest.raises(CheckpointError, match="logits is off by"):
        zoo.load_checkpoint(folder, check=True)


def test_tokens_that_are_nearly_tied_do_not_upset_its_probe(model, tmp_path):
    """With all weights of the head alike but for 1e-6, what is best hangs on the last digits; the probe does not."""
    torch.nn.init.zeros_(model.head.weight)
    model.head.weight.data += 1e-6 * torch.randn(3, 16)
    x, time = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    folder = zoo.save_model(model, tmp_path / "kept")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["head.weight"] *= -1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    rehash(folder)
    other: Any = zoo.load_checkpoint(folder, check=True).model
    assert not torch.equal(other(x, time)["order"], model(x, time)["order"])


def test_its_head_may_start_afresh_and_nothing_else(model, tmp_path):
    start = zoo.load_checkpoint(zoo.save_model(model, tmp_path / "kept", preset="ranking_tiny"))
    changed = adapt(start, {"classes": 5}, name="kept").model
    assert changed.loaded.new == ("head.weight", "head.bias") and isinstance(changed, Ranking)
    assert torch.equal(changed.stem.weight, model.stem.weight)
    with pytest.raises(ValueError, match="kept has dim '.*', not '32'; to allow it, list it in fresh"):
        adapt(start, {"dim": 32}, name="kept")


def test_what_does_not_fit_it_is_said(model, tmp_path):
    from zoo.inputs.images import ImagePreprocess

    for wrong, words in (
        ({"preprocess": ImagePreprocess(size=16)}, "must be None, got ImagePreprocess"),
        ({"labels": ["ant"]}, "labels has 1 names, but the model has 3 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            zoo.save_model(model, tmp_path / "kept", **wrong)
    with pytest.raises(ValueError, match="norm 'batchnorm' takes statistics over samples that modulation 'adaln'"):
        zoo.create_model("ranking_tiny", norm="batchnorm")
    with pytest.raises(ValueError, match=r"^blocks.1: norm 'prepbn' takes statistics"):
        zoo.create_model("ranking_tiny", norm=("layernorm", "prepbn"))
    with pytest.raises(ValueError, match="a modulated block needs cond in the Context"):
        model.blocks[0](torch.randn(1, 16, 16), Context(grid=(4, 4)))


def test_no_task_takes_it(model, tmp_path):
    folder = zoo.save_model(model, tmp_path / "kept", labels=LABELS)
    (tmp_path / "a.png").touch()
    for arguments, words in (
        (["classify", "predict", str(folder), str(tmp_path / "a.png")], "`zoo classify` cannot use"),
        (
            ["classify", "fit", "--model.backbone.name=ranking_tiny"],
            "`zoo classify` cannot train this model.backbone; no command trains it",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert words in str(stop.value.code)
