"""Preprocessing and model as one graph, and how far it is from the checkpoint's own answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.inputs.audio import AudioPreprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.inputs.images import ImagePreprocess
from zoo.tasks import exporting
from zoo.tasks.detect.export import OUTPUTS, paired
from zoo.tasks.page.pixels import Pixels
from zoo.tasks.page.sound import Sound, length_of

RESIZED = 2e-2  # largest difference of an image that is resized, as a share of the largest logit
TRACED = (70, 90)  # height and width of the example; other sizes give the same file


class Classify(nn.Module):
    """From pixels [H, W, 4] to the logits [1, classes] of a classifier."""

    def __init__(self, model: Any, preprocess: ImagePreprocess):
        super().__init__()
        self.pixels, self.model = Pixels(preprocess), model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(self.pixels(pixels)).float()}


def classify_graph(model: Any, preprocess: ImagePreprocess, notes: dict[str, str]) -> bytes:
    """A classifier as the contents of an ONNX file: `pixels`, uint8 [H, W, 4] of any size, to `logits` [1, classes]."""
    free = {"pixels": {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}}
    example = drawn(*TRACED, torch.Generator().manual_seed(0))
    return exporting.to_onnx(Classify(model, preprocess).eval(), example, free, ["logits"], exporting.OLDEST, notes)


def compare_classify(model: Any, preprocess: ImagePreprocess, contents: bytes) -> tuple[float, float]:
    """How far onnxruntime is from the checkpoint's own answer, as a share of the largest logit: for an image that
    needs no resizing, and at most for some that do. ValueError if that is more than allowed."""

    def own(pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": model(preprocess(pixels[..., :3])[None]).float()}

    height, width = preprocess.shape
    sides = [(height * 2 + 7, width * 3 + 2), (height // 2 + 1, width // 2 + 3), (height * 3 + 5, width + 1)]
    whole = [(int(height / preprocess.crop), int(width / preprocess.crop))]
    found = [
        exporting.largest_difference(
            own, contents, [partial(drawn, *each) for each in shapes], lambda got, _: got, allowed
        )
        for shapes, allowed in ((whole, exporting.TOLERANCE), (sides, RESIZED))
    ]
    return found[0], found[1]


def drawn(height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A random opaque image with coarse and fine structure."""
    coarse = torch.randint(256, (height // 8 + 1, width // 8 + 1, 3), generator=generator)
    fine = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    fine = (fine + torch.randint(-20, 21, fine.shape, generator=generator)).clamp(0, 255)
    return {"pixels": torch.cat([fine, torch.full_like(fine[..., :1], 255)], -1).to(torch.uint8)}


class Detect(nn.Module):
    """From pixels [H, W, 4] to the logits [1, queries, classes] and boxes [1, queries, 4] of a detector."""

    def __init__(self, model: Any, preprocess: BoxPreprocess):
        super().__init__()
        shared = {name: getattr(preprocess, name) for name in ("channels", "mean", "std", "interpolation", "resizer")}
        self.pixels = Pixels(ImagePreprocess(size=preprocess.size, fit="squash", crop=1.0, **shared))
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        made = self.model(self.pixels(pixels))
        return {name: made[name].float() for name in OUTPUTS}


def detect_graph(model: Any, preprocess: BoxPreprocess, notes: dict[str, str]) -> bytes:
    """A detector whose preprocess stretches images as the contents of an ONNX file: `pixels`, uint8 [H, W, 4] of any
    size, to `logits` [1, queries, classes] and `boxes` [1, queries, 4], relative to the image."""
    free = {"pixels": {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}}
    example = drawn(*TRACED, torch.Generator().manual_seed(0))
    return exporting.to_onnx(Detect(model, preprocess).eval(), example, free, OUTPUTS, exporting.OLDEST, notes)


def compare_detect(model: Any, preprocess: BoxPreprocess, contents: bytes) -> tuple[float, float]:
    """As `compare_classify`, for the logits and boxes of a detector."""

    def own(pixels: Tensor) -> dict[str, Tensor]:
        made = model(next(preprocess.parts(pixels[..., :3])).image[None])
        return {name: made[name].float() for name in OUTPUTS}

    side = preprocess.size
    given = (([(side, side)], exporting.TOLERANCE), ([(side * 2 + 7, side * 3 + 2)], RESIZED))
    found = [
        exporting.largest_difference(own, contents, [partial(drawn, *each) for each in shapes], paired, allowed)
        for shapes, allowed in given
    ]
    return found[0], found[1]


class Transcribe(nn.Module):
    """From samples [S] to the logits [1, T, vocabulary] of a recogniser and their number [1]."""

    def __init__(self, model: Any, preprocess: AudioPreprocess):
        super().__init__()
        self.sound, self.model = Sound(preprocess), model

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        features = self.sound(samples)
        logits, lengths = self.model(features, length_of(features))
        return {"logits": logits.float(), "lengths": lengths}


def transcribe_graph(model: Any, preprocess: AudioPreprocess, notes: dict[str, str]) -> bytes:
    """A recogniser as the contents of an ONNX file: `samples`, float32 [S] at the rate of the preprocess and of any
    length from two hops on, to `logits` [1, T, vocabulary] and `lengths` [1]."""
    free = {"samples": {0: torch.export.Dim("samples", min=2 * preprocess.hop)}}
    example = noise(1.3, preprocess, torch.Generator().manual_seed(0))
    outputs = ["logits", "lengths"]
    return exporting.to_onnx(Transcribe(model, preprocess).eval(), example, free, outputs, exporting.OLDEST, notes)


def compare_transcribe(model: Any, preprocess: AudioPreprocess, contents: bytes) -> float:
    """How far onnxruntime is from the checkpoint's own answer, as a share of the largest logit. ValueError if that is
    more than allowed."""

    def own(samples: Tensor) -> dict[str, Tensor]:
        features = preprocess(samples)
        logits, lengths = model(features[None], torch.tensor([len(features)]))
        return {"logits": logits.float(), "lengths": lengths}

    draws = [partial(noise, seconds, preprocess) for seconds in (0.1, 0.333, 2.0, 7.7)]
    return exporting.largest_difference(own, contents, draws, lambda got, _: got)


def noise(seconds: float, preprocess: AudioPreprocess, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise that swells and fades."""
    count = round(seconds * preprocess.rate)
    swell = torch.linspace(0, 15 * seconds, count, dtype=torch.float32).sin()
    return {"samples": 0.1 * torch.randn(count, generator=generator, dtype=torch.float32) * swell}
