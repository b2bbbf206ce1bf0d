"""What the tests of generators share: tiny checkpoints, and what holds for the models of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zoo
from helpers import randomise, relative
from zoo.inputs.images import ImagePreprocess

DIGITS = tuple("0123456789")


def generator(folder: Path, **more: Any) -> str:
    """A diffusion model of 8 x 8 grey pixels with random weights."""
    torch.manual_seed(0)
    fields = {"depth": 1, "dim": 32, "heads": 2, "image": 8, "channels": 1, "classes": 10} | more
    preprocess = ImagePreprocess(size=8, channels=1, mean=(0.5,), std=(0.5,), crop=1.0)
    labels = DIGITS[: fields["classes"]] or None
    model = randomise(zoo.create_model("dit_micro", **fields))
    return str(zoo.save_model(model, folder, preset="dit_micro", preprocess=preprocess, labels=labels))


def classifier(folder: Path, labels: tuple[str, ...] = DIGITS) -> str:
    """A classifier of 8 x 8 grey pixels with random weights and features of 16 values."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "image": 8, "patch": 4, "channels": 1}
    model = randomise(zoo.create_model("vit_micro", **fields, classes=len(labels)))
    preprocess = ImagePreprocess(size=8, channels=1, mean=(0.4,), std=(0.3,), crop=1.0)
    return str(zoo.save_model(model, folder, preset="vit_micro", preprocess=preprocess, labels=labels))


@torch.no_grad()
def check_padding(model: Any) -> None:
    """A sample alone equals the same sample padded beside a larger one, at sides that no stride divides; the rest of
    its output is zero. The model is in fp64, with 3 channels and 5 classes."""
    time, labels = torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([2, 5])
    images = [torch.randn(3, 9, 7, dtype=torch.float64), torch.randn(3, 5, 14, dtype=torch.float64)]
    canvas, mask = torch.full((2, 3, 13, 15), 7.0, dtype=torch.float64), torch.zeros(2, 13, 15, dtype=torch.bool)
    for index, image in enumerate(images):
        height, width = image.shape[1:]
        canvas[index, :, :height, :width], mask[index, :height, :width] = image, True
    together = model(canvas, time, labels, mask=mask)
    assert together.shape[1] == model.config.outputs
    for index, image in enumerate(images):
        alone = model(image[None], time[index, None], labels[index, None])
        height, width = image.shape[1:]
        assert relative(together[index, None, :, :height, :width], alone) < 1e-12
        rest = together[index].clone()
        rest[:, :height, :width] = 0
        assert not rest.any()


@torch.no_grad()
def check_conditions(model: Any, least: float) -> None:
    """A sample does not depend on its batch, without labels it is of no class, and time and label change it by at least
    `least`. The model is in fp64, with 3 channels and 5 classes."""
    x, time, labels = torch.randn(3, 3, 8, 8).double(), torch.rand(3).double(), torch.tensor([0, 3, 5])
    out = model(x, time, labels)
    assert relative(out[1:2], model(x[1:2], time[1:2], labels[1:2])) < 1e-12
    assert relative(out[2:], model(x[2:], time[2:])) < 1e-12  # label 5 of 5 classes is no class
    for changed in ((x, time * 0.9, labels), (x, time, (labels + 1) % 6)):
        assert (model(*changed) - out).flatten(1).abs().amax(1).min() > least


def check_start_and_gradients(model: Any) -> None:
    """A new model gives zeros; once it is random, every parameter has a gradient, the same with checkpointing."""
    assert not model(torch.randn(2, 3, 9, 8), torch.rand(2), torch.tensor([0, 5])).any()
    check_gradients(model, lambda *given: [model(*given)])


def check_gradients(model: Any, predictions: Callable[..., list[torch.Tensor]]) -> None:
    """Once a model is random, its predictions for (x, time, labels) give every parameter a gradient, the same with
    checkpointing."""
    given = torch.randn(2, 3, 9, 8), torch.rand(2), torch.tensor([0, 5])
    randomise(model).train()
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.stack([each.square().mean() for each in predictions(*given)]).sum().backward()
        if not checkpointing:
            kept = {name: each.grad for name, each in model.named_parameters()}
            for label, each in kept.items():
                assert each is not None and each.isfinite().all() and each.any(), label
    for label, each in model.named_parameters():
        assert torch.allclose(each.grad, kept[label], rtol=1e-4, atol=1e-5), label
