"""Grafting: new mixers learn what the old ones gave, and all else is copied."""

from typing import Any

import pytest
import torch

import zoo
from helpers import prepared, randomise
from zoo.models.dit import DiTConfig

TINY = {"dim": 32, "depth": 2, "heads": 2, "image": 16, "patch": 4, "classes": 5}


def vit(**choices: Any) -> Any:
    return randomise(zoo.create_model("vit_micro", **TINY | choices)).eval()


def batches(number: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 16, 16, generator=generator).to(dtype),) for _ in range(number)]


def test_new_mixers_learn_and_the_rest_is_copied():
    model = vit()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    start = zoo.graft(model, "sla", batches(1), rate=0.0, progress=False)
    found = zoo.graft(model, "sla", batches(150), rate=3e-3, progress=False)
    assert list(found.errors) == ["blocks.0.steps.0.branch", "blocks.1.steps.0.branch"]
    assert all(found.errors[path] < 0.5 * start.errors[path] for path in found.errors)
    assert found.model.config.mixer == "sla" and not found.model.training
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
        if ".steps.0.branch." not in name:
            assert torch.equal(found.model.state_dict()[name], each)
    # The whole model is nearer to the old one, too.
    images = batches(1)[0][0]
    wanted = model(images)
    assert (found.model(images) - wanted).norm() < (start.model(images) - wanted).norm()


def test_an_equal_mixer_has_no_error():
    """Two heads of keys are those of softmax itself; weights of one name and shape are taken over."""
    found = zoo.graft(prepared(vit()), "softmax(kv_heads=2)", batches(1, torch.float64), rate=0.0, progress=False)
    assert max(found.errors.values()) < 1e-20


def test_only_blocks_that_change_are_trained():
    model = vit()
    found = zoo.graft(model, ["softmax", "sla"], batches(2), progress=False)
    assert list(found.errors) == ["blocks.1.steps.0.branch"]
    old, new = model.blocks[0].state_dict(), found.model.blocks[0].state_dict()  # pyright: ignore
    assert all(torch.equal(new[name], each) for name, each in old.items())


def test_a_generator_is_grafted_with_its_condition(tmp_path):
    model = randomise(zoo.create_model("dit_micro", dim=32, depth=2, heads=2, classes=3)).eval()
    inputs = [
        {"x": torch.randn(4, 1, 8, 8), "time": torch.rand(4), "labels": torch.tensor([0, 1, 2, 3])} for _ in range(60)
    ]
    start = zoo.graft(model, "dico", inputs[:1], rate=0.0, progress=False)
    found = zoo.graft(model, "dico", inputs, rate=3e-3, progress=False)
    assert all(found.errors[path] < start.errors[path] for path in found.errors)
    zoo.save_model(found.model, tmp_path / "grafted")
    kept = zoo.load_model(tmp_path / "grafted", check=True)
    assert torch.equal(kept(**inputs[0]), found.model(**inputs[0]))


def test_it_trains_where_gradients_are_off():
    with torch.no_grad():
        found = zoo.graft(vit(), "sla", batches(3), progress=False)
    assert all(each > 0 for each in found.errors.values())


def test_padding_has_no_say():
    """The error counts real tokens alone."""
    model, errors = vit(), []
    images, mask = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8, :12] = True
    for batch in ((images[:, :, :8, :12],), (images, mask)):
        torch.manual_seed(0)
        errors.append(zoo.graft(model, "sla", [batch], rate=0.0, progress=False).errors)
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "number"),
    [
        ("dico_s", {"dim": (8, 16, 32, 16, 8), "depth": (1,) * 5, "heads": (1,) * 5, "classes": 3}, 5),
        ("dimr_xl_2r", {"dim": (32, 16), "depth": (1, 1), "heads": (2, 2), "classes": 3}, 1),
        ("ddt_xl_2", {"dim": 32, "depth": 1, "heads": 2, "head_depth": 2, "classes": 3, "channels": 1}, 3),
        ("conformer_ctc_s", {"dim": 32, "depth": 2, "heads": 2, "vocabulary": 5}, 2),
        ("rtdetr_micro", {"image": 64, "classes": 2}, 1),
    ],
)
def test_all_blocks_of_every_family_are_found(name, fields, number):
    model: Any = zoo.create_model(name, **fields).eval()
    generator = torch.Generator().manual_seed(0)
    batch = model.config.probe_inputs(generator)
    found = zoo.graft(model, "sla", [batch, batch], progress=False)
    assert len(found.errors) == number and all(each > 0 for each in found.errors.values())


@pytest.mark.parametrize(
    ("mixer", "number", "words"),
    [
        ("softmax", 1, "mixer 'softmax' changes no block"),
        ("slaa", 1, "did you mean sla"),
        ("identity", 1, "mixer 'identity' has no weights to train"),
        ("sla", 0, "needs batches, got none"),
    ],
)
def test_refused(mixer, number, words):
    with pytest.raises(ValueError) as error:
        zoo.graft(vit(), mixer, batches(number), progress=False)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="a model of the zoo with blocks"):
        zoo.graft(torch.nn.Linear(2, 2), "sla", [])
    fused = vit(norm="prepbn")
    zoo.advance(fused, 1.0)
    fused = zoo.fuse(fused)
    with pytest.raises(ValueError, match="not fused"):
        zoo.graft(fused, "sla", [])
    model = vit()
    with pytest.raises(ValueError, match="NaN or infinite at step 0; lower rate"):
        zoo.graft(model, "sla", [(torch.full((1, 3, 16, 16), float("nan")),)], progress=False)
    with pytest.raises(ValueError, match="a batch must be the model's arguments .x: .*missing .* 'time'"):
        zoo.graft(
            DiTConfig(dim=16, depth=1, heads=2, image=4).build(), "sla", [torch.randn(1, 4, 4, 4)], progress=False
        )
