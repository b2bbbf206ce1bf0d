"""From noise to samples: the steps of published samplers, guidance, and noise that belongs to each sample alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.schedules import SCHEDULES, Parts, parts_of
from zoo.text import unknown

LAST = 0.04  # the time of the last step of euler_maruyama, which takes the mean


class Noise:
    """Normal noise [B, *shape]; that of each sample is a function of (seed, index) alone."""

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: Any = "cpu") -> None:
        self.shape, self.device = tuple(shape), device
        seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) for index in indices]
        self.generators = [torch.Generator("cpu").manual_seed(each) for each in seeds]

    def __call__(self) -> Tensor:
        drawn = [torch.randn(self.shape, generator=each, device="cpu") for each in self.generators]
        return torch.stack(drawn).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance, other + scale * (output - other), where `other` is the output for no class (Ho and
    Salimans 2022, arXiv:2207.12598), or that of a weaker model for the same class (Karras et al. 2024,
    arXiv:2406.02507).

    Args:
        scale: 1 for none.
        start: guided at times from here,
        end: to here (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        channels: how many channels are guided, the first ones; 0 for all.
        weak: the weaker model.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    channels: int = 0
    weak: nn.Module | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"the scale of guidance must be finite and >= 0, got {self.scale}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"the interval of guidance must lie in 0..1, got {self.start} to {self.end}")
        if self.channels < 0:
            raise ValueError(f"the guided channels must be >= 0, got {self.channels}")

    def at(self, time: float) -> bool:
        """Whether it acts at this time."""
        return self.scale != 1.0 and self.start <= time <= self.end


class Found(NamedTuple):
    """What a model says about x at a time."""

    data: Tensor
    noise: Tensor
    variance: Tensor | None  # the second half of the channels of a model that predicts it

    @property
    def velocity(self) -> Tensor:
        return self.noise - self.data


class Denoiser:
    """A model with labels [B] and guidance. `evaluations` counts the evaluations of one sample."""

    def __init__(self, model: Any, labels: Tensor | None, guidance: Guidance | None = None) -> None:
        self.model, self.labels, self.guidance = model, labels, guidance or Guidance()
        self.schedule, self.evaluations = SCHEDULES[model.config.schedule], 0
        self.dtype = next(model.parameters()).dtype

    def output(self, x: Tensor, time: float, until: float | None = None) -> Tensor:
        """The guided output of the model, in the dtype of x, which the model sees in its own."""
        return self._output(x.to(self.dtype), time, until).to(x.dtype)

    def _output(self, x: Tensor, time: float, until: float | None) -> Tensor:
        times = x.new_full((len(x),), time, dtype=torch.promote_types(x.dtype, torch.float32))
        more = {} if until is None else {"until": torch.full_like(times, until)}
        guidance, labels = self.guidance, self.labels
        if not guidance.at(time):
            self.evaluations += 1
            return self.model(x, times, labels, **more)
        self.evaluations += 2
        if guidance.weak is not None:
            output, other = self.model(x, times, labels, **more), guidance.weak(x, times, labels, **more)
        else:
            assert labels is not None
            both = torch.cat([labels, torch.full_like(labels, self.model.config.classes)])
            more = {name: each.repeat(2) for name, each in more.items()}
            output, other = self.model(x.repeat(2, 1, 1, 1), times.repeat(2), both, **more).chunk(2)
        guided = guidance.channels or x.shape[1]
        changed = other[:, :guided] + guidance.scale * (output[:, :guided] - other[:, :guided])
        return torch.cat([changed, output[:, guided:]], 1)

    def __call__(self, x: Tensor, time: float) -> Found:
        output, variance = self.output(x, time), None
        if self.model.config.variance:
            output, variance = output.chunk(2, 1)
        level = self.schedule.level(x.new_full((1, 1, 1, 1), time, dtype=torch.float64))
        parts: Parts = parts_of(self.model.config.prediction, output, x, level)
        return Found(*parts, variance)

    def levels(self, *times: float) -> list[tuple[float, float]]:
        """The shares of data and noise at these times."""
        signal, noise = self.schedule.level(torch.tensor(times, dtype=torch.float64))
        return list(zip(signal.tolist(), noise.tolist(), strict=True))


Sampler = Callable[[Denoiser, Tensor, Sequence[float], Callable[[], Tensor]], Iterator[Tensor]]


def euler(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Along the velocity; order 1."""
    for time, then in pairwise(times):
        x = x + (then - time) * denoiser(x, time).velocity
        yield x


def heun(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Along the mean of the velocities at both ends of a step; the last step is Euler's. Order 2, two evaluations."""
    for time, then in pairwise(times):
        velocity = denoiser(x, time).velocity
        if then > 0:
            other = denoiser(x + (then - time) * velocity, then).velocity
            velocity = (velocity + other) / 2
        x = x + (then - time) * velocity
        yield x


def ab2(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Adams and Bashforth's method from this velocity and that of the step before; order 2."""
    before, size = None, 1.0
    for time, then in pairwise(times):
        velocity = denoiser(x, time).velocity
        along = velocity if before is None else velocity + (then - time) / (2 * size) * (velocity - before)
        x = x + (then - time) * along
        before, size = velocity, then - time
        yield x


def ddim(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Joins the predicted data and noise at the next level (Song et al. 2021, arXiv:2010.02502); order 1."""
    for time, then in pairwise(times):
        found = denoiser(x, time)
        ((signal, share),) = denoiser.levels(then)
        x = signal * found.data + share * found.noise
        yield x


def dpm(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) in the data, with a first-order last step (Lu et al. 2022, arXiv:2211.01095); order 2."""
    before, step = None, math.inf
    for time, then in pairwise(times):
        data = denoiser(x, time).data
        (signal, share), (next_signal, next_share) = denoiser.levels(time, then)
        # exp(-h), where h is the growth of log(signal / noise)
        left = signal * next_share / (next_signal * share)
        h = -math.log(left) if left > 0 else math.inf
        better = data
        if before is not None and then > 0 and math.isfinite(step):
            better = data + h / (2 * step) * (data - before)
        x = next_share / share * x + next_signal * (1 - left) * better
        before, step = data, h
        yield x


def ddpm(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Draws from the Gaussian of the step, given the predicted data (Ho et al. 2020, arXiv:2006.11239), with the
    predicted variance if there is one (Nichol and Dhariwal 2021, arXiv:2102.09672)."""
    for time, then in pairwise(times):
        found = denoiser(x, time)
        (signal, share), (next_signal, next_share) = denoiser.levels(time, then)
        kept = signal / next_signal
        added = share**2 - (kept * next_share) ** 2
        mean = kept * next_share**2 / share**2 * x + next_signal * added / share**2 * found.data
        if then > 0:
            low, high = math.log(added * next_share**2 / share**2), math.log(added)
            log_variance = torch.full_like(mean, low)
            if found.variance is not None:
                log_variance = low + (found.variance + 1) / 2 * (high - low)
            mean = mean + (log_variance / 2).exp() * noise()
        x = mean
        yield x


def euler_maruyama(
    denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """The reverse stochastic equation with diffusion 2 * time (SiT, Ma et al. 2024, arXiv:2401.08740); the last step,
    from 0.04, is its mean."""
    if len(times) > 2 and (start := times[0]) > LAST:
        shrink = (start - LAST) / (start - times[-2])
        times = [*(start - (start - time) * shrink for time in times[:-1]), 0.0]
    for time, then in pairwise(times):
        found = denoiser(x, time)
        # velocity - time * score, where score = -noise / time
        x = x + (then - time) * (found.velocity + found.noise)
        if then > 0:
            x = x + math.sqrt(2 * time * (time - then)) * noise()
        yield x


def meanflow(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Along the mean velocity of the step, which the model predicts (Geng et al. 2025, arXiv:2505.13447)."""
    for time, then in pairwise(times):
        x = x + (then - time) * denoiser.output(x, time, then)
        yield x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ab2": ab2,
    "ddim": ddim,
    "dpm": dpm,
    "ddpm": ddpm,
    "euler_maruyama": euler_maruyama,
    "meanflow": meanflow,
}
ALONG = ("euler", "heun", "ab2", "euler_maruyama")  # they need a velocity


def usual(config: Any) -> str:
    """The sampler that is used if none is named."""
    if config.until:
        return "meanflow"
    return "heun" if SCHEDULES[config.schedule].moves else "ddim"


def times_of(config: Any, steps: int, shift: float = 1.0, start: float = 1.0) -> list[float]:
    """The times of so many steps, from `start` to 0: evenly spaced between 1 and 0, then t -> shift * t / (1 +
    (shift - 1) * t) (Esser et al. 2024, arXiv:2403.03206), then times `start`; for a schedule of steps, the nearest of
    them."""
    most = SCHEDULES[config.schedule].steps
    if not isinstance(steps, int) or not 1 <= steps <= (most or 10_000):
        raise ValueError(f"steps must be from 1 to {most or 10_000}, got {steps}")
    if not 0.01 <= shift <= 100.0:
        raise ValueError(f"shift must be from 0.01 to 100, got {shift}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"samples must start at a time > 0 and <= 1, got {start}")
    times = [1 - step / steps for step in range(steps + 1)]
    if most:
        start = max(1, round(start * most)) / most
    times = [start * shift * time / (1 + (shift - 1) * time) for time in times]
    if most:
        times = sorted({round(time * most) / most for time in times}, reverse=True)
    return times


def check_sampler(config: Any, sampler: str, guidance: Guidance) -> None:
    """ValueError if the sampler or the guidance does not fit a model of this config."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {unknown('name', sampler, SAMPLERS)}")
    if sampler in ALONG and not SCHEDULES[config.schedule].moves:
        able = ", ".join(name for name in SAMPLERS if name not in (*ALONG, "meanflow"))
        raise ValueError(
            f"sampler '{sampler}' needs a velocity, which schedule '{config.schedule}' lacks; choose from {able}"
        )
    if sampler == "meanflow" and not config.until:
        raise ValueError("sampler 'meanflow' needs a model with until=True")
    if guidance.scale != 1.0 and guidance.weak is None and not config.classes:
        raise ValueError("guidance needs a model with classes, or a weaker model")
    if guidance.weak is not None:
        other: Any = guidance.weak.config
        for field in ("channels", "classes", "schedule", "prediction", "variance", "until"):
            if getattr(other, field) != getattr(config, field):
                ours, theirs = getattr(config, field), getattr(other, field)
                raise ValueError(f"the weaker model must have the same {field}, {ours!r}, got {theirs!r}")
    if guidance.channels > config.channels:
        raise ValueError(f"at most {config.channels} channels can be guided, got {guidance.channels}")


class Samples(NamedTuple):
    """Samples [B, channels, H, W], as the model sees them, and the evaluations of the model for each."""

    x: Tensor
    evaluations: int


@torch.no_grad()
def sample(
    model: Any,
    labels: Tensor | Sequence[int] | None,
    indices: Sequence[int],
    size: tuple[int, int],
    *,
    seed: int = 0,
    steps: int = 50,
    sampler: str | None = None,
    guidance: Guidance | None = None,
    shift: float = 1.0,
    start: tuple[Tensor, float] | None = None,
    watch: Callable[[], Any] | None = None,
) -> Samples:
    """Samples of a model in eval mode, of H x W; each is a function of its label, its index and the seed, whatever
    else is in the batch.

    Args:
        labels: classes [B], or None for no class.
        indices: the numbers of the samples, which choose their noise.
        size: height and width.
        steps: number of steps.
        sampler: a row of SAMPLERS; None for `meanflow` with a model made for it, `ddim` for schedule `ddpm`, else
            `heun`.
        shift: above 1, more steps near the noise.
        start: images [B, channels, H, W] with noise, and their time, to start from instead of noise alone; the noise is
            to be the first of `Noise(seed, indices, ...)`.
        watch: called after each step.

    Raises:
        ValueError: an unknown sampler, or one that does not fit the model, no steps, or a side below a patch.
    """
    config, guidance = getattr(model, "config", model), guidance or Guidance()
    if not hasattr(config, "schedule"):
        raise ValueError(f"samples need a diffusion model, got a {type(model).__name__}")
    labels = None if labels is None else torch.as_tensor(labels, device=next(model.parameters()).device)
    if not len(indices) or min(indices) < 0 or labels is not None and labels.shape != (len(indices),):
        given = "none" if labels is None else list(labels.shape)
        raise ValueError(f"indices must be integers >= 0 with a label for each, got {len(indices)}, labels {given}")
    sampler = sampler or usual(config)
    check_sampler(config, sampler, guidance)
    if labels is None and guidance.scale != 1.0 and guidance.weak is None:
        raise ValueError("guidance needs labels, or a weaker model")
    times = times_of(config, steps, shift, 1.0 if start is None else start[1])
    if min(size) < config.patch:
        raise ValueError(f"sides must be at least a patch of {config.patch} pixels, got {size[0]} x {size[1]}")
    first = next(model.parameters())
    noise = Noise(seed, indices, (config.channels, *size), first.device)
    denoiser = Denoiser(model, labels, guidance)
    x = noise()
    if start is not None:
        x = start[0]
    for after in SAMPLERS[sampler](denoiser, x, times, noise):
        x = after
        if watch is not None:
            watch()
    return Samples(x, denoiser.evaluations)
