"""From one sample rate to another, for waveforms that are whole or come in pieces."""

import math
from fractions import Fraction

import torch
from torch import Tensor

LOWEST, HIGHEST = 1000, 768_000  # samples per second
LARGEST = 2e6  # numerator times denominator of a ratio, which the filter's size grows with


def check_rate(rate: int) -> None:
    """ValueError if a sample rate is out of range."""
    if not LOWEST <= rate <= HIGHEST:
        raise ValueError(f"sample rate must be {LOWEST} to {HIGHEST} Hz, got {rate}")


def resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """A waveform [S] resampled from `rate` to `wanted` Hz, as `Resampler` does it."""
    resampler = Resampler(rate, wanted)
    return torch.cat([resampler.push(waveform), resampler.finish()])


class Resampler:
    """`torchaudio.transforms.Resample` (band-limited sinc interpolation) of a waveform that comes in pieces.

    The cost of its filter grows with the two rates divided by their greatest common divisor. If their product
    exceeds `LARGEST`, the closest ratio of smaller numbers is taken; time and pitch are then off by at most 0.04 %.

    Raises:
        ValueError: a rate is out of range.
    """

    def __init__(self, rate: int, wanted: int) -> None:
        from torchaudio.transforms import Resample

        check_rate(rate)
        check_rate(wanted)
        ratio = Fraction(min(rate, wanted), max(rate, wanted))
        low, high = ratio.limit_denominator(int(math.sqrt(LARGEST / ratio))).as_integer_ratio()
        self.old, self.new = (high, low) if rate > wanted else (low, high)  # this many samples become this many
        # The filter spans 6 zeros of the sinc, at 0.99 of the lower rate, rounded up.
        reach = 0 if self.old == self.new else math.ceil(6 * self.old / (0.99 * low))
        self.margin = math.ceil(reach / self.old)
        with torch.device("cpu"):
            self.resample = Resample(self.old, self.new)
        self.waiting = torch.zeros(self.margin * self.old, dtype=torch.float32, device="cpu")

    def push(self, samples: Tensor) -> Tensor:
        """Takes the next samples [n], any number of them; returns those of the new rate that are complete."""
        self.waiting = torch.cat([self.waiting, samples])
        groups = max(0, len(self.waiting) // self.old - 2 * self.margin)
        made = self.resample(self.waiting[: (groups + 2 * self.margin) * self.old]) if groups else self.waiting
        self.waiting = self.waiting[groups * self.old :].clone()
        return made[self.margin * self.new :][: groups * self.new]

    def finish(self) -> Tensor:
        """The remaining samples."""
        made = self.resample(self.waiting) if len(self.waiting) else self.waiting
        return made[self.margin * self.new :]
