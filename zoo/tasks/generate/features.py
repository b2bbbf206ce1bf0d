"""The features of 8-bit images, and the classes that a classifier reads in them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert import timm_preprocess
from zoo.data.sampling import kept_generators
from zoo.inputs.images import PixelPreprocess
from zoo.models.base import ClassifierConfig
from zoo.models.convolutional import TIMM
from zoo.text import reason
from zoo.weights import load_checkpoint
from zoo.weights.adapt import adapt

PIXELS = "pixels"


class Reader:
    """A model that reads 8-bit images with its own preprocessing; pixels on the scale 0..1 without a model.

    Called with images uint8 [B, H, W, channels] it gives its output [B, D], fp32 on the CPU.

    Attributes:
        name: in a text.
        names: of its outputs; None for features.
    """

    def __init__(
        self,
        name: str = PIXELS,
        model: nn.Module | None = None,
        preprocess: PixelPreprocess | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.name, self.preprocess, self.names = name, preprocess, names
        self.model = None if model is None else model.eval().requires_grad_(False)

    def to(self, device: Any) -> None:
        """Moves the model."""
        if self.model is not None:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        if self.model is None or self.preprocess is None:
            return values.flatten(1).float() / 255
        read = [self.preprocess.cut(self.preprocess.read(image)) for image in values]
        device = next(self.model.parameters()).device
        output = self.model(self.preprocess.normalized(read).to(device)).float().cpu()
        if not bool(output.isfinite().all()):
            raise ValueError(f"the output of {self.name} is NaN or infinite")
        return output


def features_of(name: str | None) -> Reader:
    """What gives the pooled features [B, D] in front of the classifier of a checkpoint or of timm:NAME, with timm's
    weights; pixels for None.

    Raises:
        ValueError: the model is not found, is not an image classifier, or its weights cannot be read.
    """
    if name is None:
        return Reader()
    if name.startswith(TIMM):
        return _timm(name)
    found = load_checkpoint(name)
    if not isinstance(found.model.config, ClassifierConfig) or found.preprocess is None:
        raise ValueError(
            f"model.features: must be an image classifier with its preprocess, or timm:NAME; {name} is not"
        )
    if found.config["fused"]:
        raise ValueError(f"model.features: {name} is fused; give the unfused checkpoint")
    with kept_generators():
        model = adapt(found, {"classes": 0}, name=name).model
    assert isinstance(found.preprocess, PixelPreprocess)
    return Reader(name, model, found.preprocess)


def _timm(name: str) -> Reader:
    import timm

    word = name.removeprefix(TIMM)
    if not timm.is_model(word):
        raise ValueError(f"timm has no model '{word}'; timm.list_models() lists the names")
    try:
        with kept_generators():
            model: Any = timm.create_model(word, pretrained=True, num_classes=0)
        wanted = timm.data.resolve_model_data_config(model)  # pyright: ignore[reportAttributeAccessIssue]
        preprocess = timm_preprocess(wanted)
    except Exception as error:  # of the Hub, the weights or the preprocessing
        raise ValueError(f"model.features: {name} cannot be loaded: {reason(error)}") from error
    return Reader(name, model, preprocess)


def classifier_of(name: str) -> Reader:
    """What gives the logits of an image classifier of the zoo; ValueError if the checkpoint is of another kind."""
    found = load_checkpoint(name)
    config = found.model.config
    if not isinstance(config, ClassifierConfig) or not config.headed or found.preprocess is None:
        raise ValueError(f"must be an image classifier with its preprocess; {name} is not")
    assert isinstance(found.preprocess, PixelPreprocess)
    names = found.labels if isinstance(found.labels, tuple) else None
    return Reader(name, found.model, found.preprocess, names)
