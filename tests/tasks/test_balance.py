"""Losses of layers: a task adds their mean to its own in training, however it trains."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from training import classifier, difference, images, trainer
from zoo import create_model
from zoo.block import Block
from zoo.models.base import adding_losses
from zoo.tasks.classify.train import Classify

ROUTED: dict[str, Any] = {"mixer": ("moa(experts=4, top=2)", "softmax"), "ffn": ("mlp", "moe(experts=4)")}

DYNAMO = "ignore:The .grad attribute of a Tensor that is not a leaf"  # which PyTorch asks for when it compiles a block


class Logged(Classify):
    """Keeps what a step logs."""

    def log(self, name: str, value: Any, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.__dict__.setdefault("kept", {}).setdefault(name, []).append(value.item())


def batch() -> Any:
    torch.manual_seed(1)
    return SimpleNamespace(images=torch.randn(6, 3, 16, 16), labels=torch.tensor([0, 1, 2, 3, 0, 1]), skipped=())


def test_a_step_adds_the_mean_of_the_losses_of_layers():
    task, given = classifier(Logged, backbone=ROUTED, balance=0.3, smoothing=0.0), batch()
    loss = task.training_step(given, 0)
    with adding_losses(task.model) as losses:
        own = F.cross_entropy(task.model(given.images), given.labels)
    assert len(losses) == 2 and task.model.losses is None
    mean = (losses[0] + losses[1]) / 2
    assert task.kept == {"train/loss": [own.item()], "train/balance": [mean.item()]}
    torch.testing.assert_close(loss, own + 0.3 * mean)
    (got,) = torch.autograd.grad(loss, [task.model.blocks[1].steps[1].branch.router.weight])
    (alone,) = torch.autograd.grad(own, [task.model.blocks[1].steps[1].branch.router.weight])
    assert (got - alone).abs().max() > 1e-3 * alone.abs().max()


@pytest.mark.parametrize(
    "options",
    [{"backbone": ROUTED, "balance": 0.0}, {"backbone": {}}, {"backbone": {"ffn": "moe(experts=2)"}}],
    ids=str,
)
def test_without_such_layers_or_weight_a_step_is_as_before(options):
    task, given = classifier(Logged, smoothing=0.0, **options), batch()
    loss = task.training_step(given, 0)
    assert torch.equal(loss, F.cross_entropy(task.model(given.images), given.labels))
    assert [*task.kept] == ["train/loss"]


def test_a_batch_without_images_has_no_loss_of_layers():
    task = classifier(Logged, backbone=ROUTED)
    given = SimpleNamespace(images=torch.zeros(0, 3, 16, 16), labels=torch.zeros(0).long(), skipped=("a.jpg",))
    with pytest.warns(UserWarning, match="skipped a.jpg"):
        assert task.training_step(given, 0).item() == 0.0


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"^model.balance must be >= 0, got -0.1$"):
        classifier(balance=-0.1)


def trained(**options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights after two steps, and what was logged last."""
    setting = {name: options.pop(name) for name in ("accumulate_grad_batches", "precision") if name in options}
    task = classifier(backbone=ROUTED | {"drop_path": 0.5}, rate=1e-2, balance=1.0, **options)
    run = trainer(1, 4, limit_val_batches=1, **setting)
    run.fit(task, datamodule=images())
    return task.model.state_dict(), {name: value.item() for name, value in run.callback_metrics.items()}


def test_checkpointing_gives_the_same_step():
    (plain, logged), (recomputed, other) = trained(), trained(checkpointing=True)
    assert difference(plain, recomputed) is None and logged == other
    assert 1.0 < logged["train/balance"] < 2.0


@pytest.mark.all
@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_step(checkpointing):
    torch._dynamo.reset()
    (plain, logged), (compiled, other) = trained(), trained(compile=True, checkpointing=checkpointing)
    assert other == pytest.approx(logged, rel=1e-3)
    for name, value in plain.items():
        assert (compiled[name] - value).abs().max() < 1e-3 * value.abs().max() + 1e-5, name


@pytest.mark.parametrize("setting", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_it_is_added_in_each_way_of_training(setting):
    weights, logged = trained(**setting)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert 0.99 < logged["train/balance"] < 2.0


@pytest.mark.filterwarnings(DYNAMO)
def test_one_program_serves_all_blocks_of_a_kind():
    """Compiled blocks are not compiled again for the losses of those before them."""
    torch._dynamo.reset()
    model = create_model("vit_micro", dim=16, depth=4, heads=2, classes=3, ffn="moe(experts=4)").train()
    counter = CompileCounter()
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=counter)
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        with adding_losses(model) as losses:
            y = model(torch.randn(2, 3, 32, 32))
        (y.sum() + torch.stack(losses).mean()).backward()
        assert len(losses) == 4 and counter.frame_count == 1
