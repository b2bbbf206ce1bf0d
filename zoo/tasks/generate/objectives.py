"""Objectives of diffusion models: at which times a model is trained, and what its error is."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.models.diffusion import PREDICTIONS
from zoo.schedules import SCHEDULES, Level, Parts, parts_of, predicted
from zoo.spec import make
from zoo.stems.conditions import TIMES
from zoo.text import unknown

LEAST = 0.05  # the least divisor of a weight (JiT, Li and He 2025, arXiv:2511.13720)
APART = 5e-3  # half the distance in time of the two outputs whose difference is MeanFlow's derivative
FASTEST = 50.0  # the largest scale of the time for which such a difference is a derivative
DISTRIBUTIONS = ("uniform", "logit_normal")
DERIVATIVES = ("difference", "jvp")


@dataclass(frozen=True, kw_only=True)
class Times:
    """The times of training: `uniform` from 0 to 1, or `logit_normal`, sigmoid(mean + std * n) with normal n (Esser et
    al. 2024, arXiv:2403.03206).

    shift above 1 moves them to the noise. With a schedule of steps they are the times of steps.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in DISTRIBUTIONS:
            raise ValueError(f"model.times: {unknown('name', self.name, DISTRIBUTIONS)}")
        if not math.isfinite(self.mean) or not 0.0 <= self.std < math.inf or not 0.0 < self.shift < math.inf:
            given = f"{self.mean}, {self.std} and {self.shift}"
            raise ValueError(f"model.times_mean must be finite, times_std >= 0 and times_shift > 0, got {given}")

    def __call__(self, number: int, schedule: str, device: Any) -> Tensor:
        """fp32 [number]."""
        if self.name == "uniform":
            times = torch.rand(number, device=device)
        else:
            times = torch.sigmoid(self.mean + self.std * torch.randn(number, device=device))
        times = self.shift * times / (1 + (self.shift - 1) * times)
        steps = SCHEDULES[schedule].steps
        return times if steps == 0 else ((times * steps).floor() + 1).clamp(max=steps) / steps


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a model is trained for.

    Args:
        times: the times of training.
        loss: the quantity whose mean squared error is the loss: velocity, noise or data; None for what the model
            predicts.
        equal: of MeanFlow, the share of samples whose steps have no length, as in flow matching.
        derivative: of MeanFlow, `difference` of two outputs, or `jvp`, which not every mixer has.
    """

    times: Times = Times()
    loss: str | None = None
    equal: float = 0.75
    derivative: str = "difference"

    def check(self, config: Any) -> None:
        """ValueError if a model of this config cannot be trained for it."""
        if self.loss is not None and self.loss not in PREDICTIONS:
            raise ValueError(f"model.loss: {unknown('name', self.loss, PREDICTIONS)}")
        if self.loss == "velocity" and not SCHEDULES[config.schedule].moves:
            raise ValueError(f"model.loss 'velocity' needs schedule 'linear', got '{config.schedule}'")
        if self.derivative not in DERIVATIVES:
            raise ValueError(f"model.derivative: {unknown('name', self.derivative, DERIVATIVES)}")
        if not 0.0 <= self.equal <= 1.0:
            raise ValueError(f"model.equal must be from 0 to 1, got {self.equal}")
        if config.until and (config.prediction, config.schedule) != ("velocity", "linear"):
            raise ValueError("a model with until=True must predict the velocity with schedule 'linear'")
        if config.until and self.derivative == "difference" and (scale := make(TIMES, config.time).scale) > FASTEST:
            raise ValueError(
                f"model.derivative 'difference' needs an embedding of the time that changes slowly, of a scale <= "
                f"{FASTEST:g}, got {scale:g}; set model.backbone.time to sincos(scale=10.0, period=100.0)"
            )
        if config.until and (config.drop_path or config.dropout):
            raise ValueError(
                "a model with until=True takes no drop_path and no dropout, which its derivative would see"
            )
        if config.until and self.loss not in (None, "velocity"):
            raise ValueError(f"model.loss must be velocity for a model with until=True, got {self.loss}")

    def draw(self, number: int, schedule: str, device: Any, until: bool) -> tuple[Tensor, Tensor | None]:
        """Times [number], and of a model for MeanFlow the times at which their steps end."""
        times = self.times(number, schedule, device)
        if not until:
            return times, None
        other = self.times(number, schedule, device)
        equal = torch.rand(number, device=device) < self.equal
        times, ends = torch.maximum(times, other), torch.minimum(times, other)
        return times, torch.where(equal, times, ends)

    def __call__(
        self, model: Any, x: Tensor, labels: Tensor | None, times: Tensor, noise: Tensor, until: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample [B], in fp32.

        A model in training that has further `predictions`, of squares of s x s pixels, adds their errors / s^2; what
        they are to predict is `pooled` (DiMR, Liu et al. 2024, arXiv:2406.09416).

        With `until` it is that of MeanFlow (Geng et al. 2025, arXiv:2505.13447): the output at time t for a step that
        ends at r is to be v - (t - r) * du/dt, where du/dt is its total derivative along the velocity v.

        Args:
            model: a diffusion model.
            x: data [B, channels, H, W].
            labels: classes [B].
            times: [B].
            noise: like x.
            until: [B], of a model for MeanFlow.
        """
        config = model.config
        level = SCHEDULES[config.schedule].level(times.view(-1, 1, 1, 1))
        mixed = mix(x, noise, level)
        if until is not None:
            velocity = noise - x
            change = self.change(model, mixed, velocity, labels, times, until)
            wanted = velocity - (times - until).view(-1, 1, 1, 1) * change
            return squared(predictions_of(model, mixed, times, labels, until), config.scales, wanted)
        *coarse, output = predictions_of(model, mixed, times, labels)
        output, variance = output.chunk(2, 1) if config.variance else (output, None)
        error = squared([*coarse, output], config.scales, predicted(config.prediction, Parts(x, noise)))
        found = error * weight(config.prediction, self.loss or config.prediction, level).flatten()
        if variance is not None:
            data = parts_of(config.prediction, output.detach(), mixed, level).data
            found = found + variance_loss(data, variance, x, mixed, times)
        return found

    @torch.no_grad()
    def change(
        self, model: Any, x: Tensor, velocity: Tensor, labels: Tensor | None, times: Tensor, until: Tensor
    ) -> Tensor:
        """The derivative of the model's output along (velocity, 1, 0) in (x, time, until)."""
        if self.derivative == "jvp":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                found = torch.func.jvp(
                    lambda x, times: model(x, times, labels, until=until),
                    (x, times),
                    (velocity, torch.ones_like(times)),
                )
            return found[1]
        after, before = (times + APART).clamp(max=1.0), (times - APART).clamp(min=0.0)
        with torch.autocast(x.device.type, enabled=False):  # a difference of rounded outputs is no derivative
            ahead, behind = (
                model(x + (at - times).view(-1, 1, 1, 1) * velocity, at, labels, until=until).float()
                for at in (after, before)
            )
        return (ahead - behind) / (after - before).view(-1, 1, 1, 1)


def predictions_of(
    model: Any, x: Tensor, times: Tensor, labels: Tensor | None, until: Tensor | None = None
) -> list[Tensor]:
    """The model's predictions in fp32, its own last; in evaluation that alone."""
    if model.training and model.config.scales:
        return [each.float() for each in model.predictions(x, times, labels, until=until)]
    return [model(x, times, labels, until=until).float()]


def squared(predictions: list[Tensor], scales: tuple[int, ...], wanted: Tensor) -> Tensor:
    """The mean squared error of the last of the predictions, plus, divided by s^2, those of the others at their scales
    s: [B]."""
    error = (predictions[-1] - wanted).square().flatten(1).mean(1)
    for found, scale in zip(predictions[:-1], scales, strict=False):
        error = error + (found - pooled(wanted, scale)).square().flatten(1).mean(1) / scale**2
    return error


def pooled(x: Tensor, scale: int) -> Tensor:
    """The sum of each square of scale x scale pixels of x [B, C, H, W] over the root of their number, so that noise
    keeps its variance. Squares at the right and the bottom may have fewer."""
    total, number = (
        F.avg_pool2d(each, scale, ceil_mode=True, divisor_override=1) for each in (x, torch.ones_like(x[:1, :1]))
    )
    return total / number.sqrt()


def balanced(losses: Tensor, size: int) -> Tensor:
    """MeanFlow's adaptive weight for losses that are means over so many values: each over its own sum + 1e-3."""
    total = losses * size
    return total / (total.detach() + 1e-3)


def mix(data: Tensor, noise: Tensor, level: Level) -> Tensor:
    """x_t from data and noise."""
    signal, share = (each.to(data.dtype) for each in level)
    return signal * data + share * noise


def weight(prediction: str, loss: str, level: Level) -> Tensor:
    """The factor from a squared error in the prediction to that in the loss, at the same x_t; it is bounded."""
    signal, noise = level
    # An error e in the data is one of -signal / noise * e in the noise, and of -e / noise in the velocity.
    size = {
        "data": torch.ones_like(noise),
        "noise": signal / noise.clamp(min=LEAST),
        "velocity": 1 / noise.clamp(min=LEAST),
    }
    if prediction == loss:
        return size["data"].float()
    return (size[loss] / size[prediction].clamp(min=LEAST)).square().float()


def variance_loss(data: Tensor, variance: Tensor, x: Tensor, mixed: Tensor, times: Tensor) -> Tensor:
    """The variational bound of one step of `ddpm` in bits per value [B], for the predicted data, which gets no
    gradient, and the predicted variance (Nichol and Dhariwal 2021, arXiv:2102.09672); x is in -1..1."""
    schedule = SCHEDULES["ddpm"]
    (signal, noise), (before, left) = (
        schedule.level(each.view(-1, 1, 1, 1)) for each in (times, times - 1 / schedule.steps)
    )
    kept = signal / before
    added = noise**2 - (kept * left) ** 2
    low, high = (added * left**2 / noise**2), added.log()
    first = left == 0  # the step to the data, whose true variance is 0
    second = schedule.level(torch.full_like(times, 2 / schedule.steps).view(-1, 1, 1, 1))
    start = schedule.level(torch.full_like(times, 1 / schedule.steps).view(-1, 1, 1, 1))
    least = (second.noise**2 - (second.signal / start.signal * start.noise) ** 2) * start.noise**2 / second.noise**2
    low = torch.where(first, least, low).log()

    def mean(of: Tensor) -> Tensor:
        return kept * left**2 / noise**2 * mixed + before * added / noise**2 * of

    log_variance = low + (variance.double() + 1) / 2 * (high - low)
    true, found = mean(x.double()), mean(data.double())
    distance = (true - found).square()
    divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance * (-log_variance).exp())
    likelihood = -discretized(x.double(), found, log_variance / 2)
    bits = torch.where(first, likelihood, divergence) / math.log(2.0)
    return bits.flatten(1).mean(1).float()


def discretized(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The logarithm of the probability that a Gaussian gives to the 8-bit value x in -1..1."""
    scale = (-log_std).exp()
    above = torch.special.ndtr((x - mean + 1 / 255) * scale)
    below = torch.special.ndtr((x - mean - 1 / 255) * scale)
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()
