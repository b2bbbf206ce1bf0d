"""Noise schedules: x_t = signal(t) * data + noise(t) * noise for a time t from 0, data, to 1, noise; and the
conversions between what a model may predict."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.cache import table

LEAST = 1e-4  # the least divisor in a conversion, so that it is finite at both ends


class Level(NamedTuple):
    """The shares of data and of noise in x_t, fp64, each shaped to multiply x_t."""

    signal: Tensor
    noise: Tensor


class Schedule:
    """`moves`: whether its velocity is defined; `steps`: the number of its times, 0 for any time."""

    moves: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    def level(self, time: Tensor) -> Level:
        """The shares at times [B, ...] in 0..1."""
        raise TypeError(f"{type(self).__name__} has no level")

    def log_ratio(self, time: Tensor) -> Tensor:
        """The logarithm of the signal-to-noise ratio, from -20 to 20."""
        signal, noise = self.level(time)
        return (2 * (signal.clamp(min=1e-30).log() - noise.clamp(min=1e-30).log())).clamp(-20.0, 20.0)


class Linear(Schedule):
    """(1 - t) * data + t * noise (flow matching, Lipman et al. 2023, arXiv:2210.02747; rectified flow, Liu et al. 2023,
    arXiv:2209.03003). Its velocity is noise - data."""

    moves = True

    def level(self, time: Tensor) -> Level:
        time = time.double()
        return Level(1 - time, time)


class DDPM(Schedule):
    """sqrt(a) * data + sqrt(1 - a) * noise, where a is the product of 1 - beta over the steps so far, with beta from
    1e-4 to 0.02 in 1000 steps (Ho et al. 2020, arXiv:2006.11239). Step k = 1 .. 1000 has the time k / 1000; between two
    steps, log(a) is linear."""

    steps = 1000

    def level(self, time: Tensor) -> Level:
        share = self.kept(time)
        return Level(share.sqrt(), (1 - share).sqrt())

    def kept(self, time: Tensor) -> Tensor:
        """The product a, fp64."""
        logs = table(_log_kept, self.steps, device=time.device)
        place = time.double().clamp(0, 1) * self.steps
        # A time in fp32 is off its step by about 1e-5 of a step.
        place = torch.where((place - place.round()).abs() < 1e-3, place.round(), place)
        below = place.floor().clamp(max=self.steps - 1).long()
        return torch.lerp(logs[below], logs[below + 1], place - below).exp()


def _log_kept(steps: int, device: torch.device) -> Tensor:
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device=device)
    return torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])


SCHEDULES: dict[str, Schedule] = {"linear": Linear(), "ddpm": DDPM()}


class Parts(NamedTuple):
    """The data and the noise of which x_t is made, as predicted."""

    data: Tensor
    noise: Tensor


def parts_of(prediction: str, output: Tensor, x: Tensor, level: Level) -> Parts:
    """Data and noise from a model's output of the kind `prediction` at x_t. At the ends, where the output does not
    tell one of them, the result is finite."""
    signal, noise = (share.to(x.dtype) for share in level)
    if prediction == "data":
        return Parts(output, (x - signal * output) / noise.clamp(min=LEAST))
    if prediction == "noise":
        return Parts((x - noise * output) / signal.clamp(min=LEAST), output)
    # velocity = noise - data, and signal + noise = 1
    return Parts(x - noise * output, x + signal * output)


def predicted(prediction: str, parts: Parts) -> Tensor:
    """The output of a model of the kind `prediction` for these parts."""
    if prediction == "velocity":
        return parts.noise - parts.data
    return parts.data if prediction == "data" else parts.noise
