"""Samplers: exact where they must be, of their order, the same in any batch, and guidance that costs what it says."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.models.dit import DiTConfig
from zoo.outputs.samplers import (
    ALONG,
    LAST,
    SAMPLERS,
    Denoiser,
    Guidance,
    Noise,
    check_sampler,
    sample,
    times_of,
    usual,
)
from zoo.schedules import SCHEDULES, parts_of

TINY = {"dim": 32, "depth": 1, "heads": 2, "image": 8, "channels": 2, "classes": 3}
DETERMINISTIC = ("euler", "heun", "ab2", "ddim", "dpm")


class Toy(nn.Module):
    """A model of a field that is known: the data are normal with this mean and deviation, or one point if it is 0."""

    def __init__(self, mean: float, std: float, schedule: str = "linear", **fields: Any) -> None:
        super().__init__()
        self.mean, self.std, self.calls = mean, std, 0
        self.weight = nn.Parameter(torch.zeros(()))
        prediction = "velocity" if schedule == "linear" else "noise"
        given: dict[str, Any] = {"schedule": schedule, "prediction": prediction, "variance": False, "classes": 3}
        given |= {"channels": 1, "patch": 1, "until": False}
        self.config = SimpleNamespace(**given | fields)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None, *, until: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        level = SCHEDULES[self.config.schedule].level(time.view(-1, 1, 1, 1))
        signal, noise = level
        spread = signal.square() * self.std**2 + noise.square()
        data = self.mean + signal * self.std**2 / spread.clamp(min=1e-12) * (x - signal * self.mean)
        if self.config.prediction == "data":
            return data
        rest = (x - signal * data) / noise.clamp(min=1e-12)
        return rest - data if self.config.prediction == "velocity" else rest


def drawn(model: Any, sampler: str, steps: int, number: int = 4, **options: Any) -> Tensor:
    labels = torch.zeros(number, dtype=torch.int64)
    return sample(model.double(), labels, range(number), (2, 2), steps=steps, sampler=sampler, **options).x


def along(time: float, noise: Tensor, std: float, mean: float) -> Tensor:
    """The point at a time on the line of the velocity that starts at this noise."""
    return (1 - time) * mean + math.sqrt((1 - time) ** 2 * std**2 + time**2) * noise


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch):
    draw = Noise.__call__
    monkeypatch.setattr(Noise, "__call__", lambda self: draw(self).double())


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_constant_field_is_exact(sampler, steps):
    """All data are one point, so the velocity along each line is constant."""
    assert (drawn(Toy(0.7, 0.0), sampler, steps) - 0.7).abs().max() < 1e-9


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("ab2", 2), ("dpm", 2)])
def test_the_order_on_a_gaussian(sampler, order):
    """Between two times: at both ends DPM-Solver's steps are infinitely long."""
    start, noise = Noise(0, range(4), (1, 2, 2))(), Noise(1, range(4), (1, 2, 2))
    errors = []
    for steps in (20, 40, 80):
        times = [0.9 - 0.8 * step / steps for step in range(steps + 1)]
        denoiser = Denoiser(Toy(0.3, 0.5).double(), torch.zeros(4).long())
        *_, found = SAMPLERS[sampler](denoiser, along(0.9, start, 0.5, 0.3), times, noise)
        errors.append((found - along(0.1, start, 0.5, 0.3)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.daily(4)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddpm", "euler_maruyama"])
def test_stochastic_samplers_give_the_distribution(sampler, schedule):
    if sampler in ALONG and schedule == "ddpm":
        return
    found = drawn(Toy(0.3, 0.5, schedule), sampler, 250, 2000)
    assert found.mean().item() == pytest.approx(0.3, abs=0.03) and found.std().item() == pytest.approx(0.5, abs=0.03)


def test_the_noise_schedule_of_ddpm_gives_the_distribution_without_noise_too():
    for sampler in ("ddim", "dpm"):
        found = drawn(Toy(0.3, 0.5, "ddpm"), sampler, 100, 2000)
        assert found.mean().item() == pytest.approx(0.3, abs=0.03)
        assert found.std().item() == pytest.approx(0.5, abs=0.03)


def model_of(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = DiTConfig(**TINY | fields).build()
    for each in (model.out, *(step.modulation for block in model.blocks for step in block.steps), model.modulation):
        nn.init.normal_(each.weight, std=0.2)
    return model.double().eval()


@pytest.mark.parametrize("sampler", [*SAMPLERS])
def test_a_sample_is_the_same_in_any_batch(sampler):
    model = model_of(until=sampler == "meanflow")
    labels, options = torch.tensor([0, 2, 1]), {"steps": 3, "sampler": sampler, "guidance": Guidance(scale=1.5)}
    together = sample(model, labels, [4, 7, 9], (8, 6), **options).x
    alone = sample(model, labels[1:2], [7], (8, 6), **options).x
    assert (together[1:2] - alone).abs().max() < 1e-9 and together.shape == (3, 2, 8, 6)
    other = sample(model, labels[1:2], [7], (8, 6), seed=1, **options).x
    assert (other - alone).abs().max() > 0.1


def test_what_guidance_costs():
    toy = Toy(0.0, 1.0)
    assert sample(toy.double(), torch.zeros(2).long(), [0, 1], (2, 2), steps=5, sampler="euler").evaluations == 5
    assert toy.calls == 10
    for sampler, plain in (("euler", 5), ("heun", 9), ("ab2", 5), ("dpm", 5)):
        for guidance, wanted in ((Guidance(), plain), (Guidance(scale=2.0), 2 * plain)):
            toy.calls = 0
            labels = torch.zeros(2, dtype=torch.int64)
            found = sample(toy, labels, [0, 1], (2, 2), steps=5, sampler=sampler, guidance=guidance)
            assert (found.evaluations, toy.calls) == (wanted, 2 * wanted)
    part = sample(toy, labels, [0, 1], (2, 2), steps=5, sampler="euler", guidance=Guidance(scale=2.0, end=0.5))
    assert part.evaluations == 5 + 2  # times 0.4 and 0.2


def test_guidance_is_the_formula():
    model, x = model_of(), torch.randn(2, 2, 8, 8).double()
    labels, time = torch.tensor([0, 2]), torch.full((2,), 0.6)
    with torch.no_grad():
        given, null = model(x, time, labels), model(x, time)
        wanted = null + 1.7 * (given - null)
        assert (Denoiser(model, labels, Guidance(scale=1.7)).output(x, 0.6) - wanted).abs().max() < 1e-6
        first = Denoiser(model, labels, Guidance(scale=1.7, channels=1)).output(x, 0.6)
        assert (first[:, :1] - wanted[:, :1]).abs().max() < 1e-6 and (first[:, 1:] - given[:, 1:]).abs().max() < 1e-6
        weak = model_of(depth=2)
        found = Denoiser(model, labels, Guidance(scale=1.7, weak=weak)).output(x, 0.6)
        other = weak(x, time, labels)
        assert (found - (other + 1.7 * (given - other))).abs().max() < 1e-6


def test_a_learned_variance_is_between_both():
    model = model_of(schedule="ddpm", prediction="noise", variance=True)
    labels = torch.tensor([1])
    nn.init.zeros_(model.out.weight)
    with torch.no_grad():
        model.out.bias.view(4, 4)[:, 2:] = -1.0
    low = sample(model, labels, [0], (8, 8), steps=4, sampler="ddpm").x
    plain = model_of(schedule="ddpm", prediction="noise")
    nn.init.zeros_(plain.out.weight)
    assert (low - sample(plain, labels, [0], (8, 8), steps=4, sampler="ddpm").x).abs().max() < 1e-6
    with torch.no_grad():
        model.out.bias.view(4, 4)[:, 2:] = 1.0
    assert (sample(model, labels, [0], (8, 8), steps=4, sampler="ddpm").x - low).abs().max() > 1e-3


def test_times():
    linear, ddpm = (SimpleNamespace(schedule=name, until=False) for name in SCHEDULES)
    assert times_of(linear, 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert times_of(linear, 2, shift=3.0) == pytest.approx([1.0, 0.75, 0.0])
    assert times_of(ddpm, 3) == [1.0, 0.667, 0.333, 0.0]
    assert len(times_of(ddpm, 1000)) == 1001
    assert (usual(linear), usual(ddpm)) == ("heun", "ddim")
    seen = []

    class Seen(Toy):
        def forward(self, x, time, labels, *, until=None):
            seen.append(time[0].item())
            return super().forward(x, time, labels)

    drawn(Seen(0.0, 1.0), "euler_maruyama", 4)
    assert seen == pytest.approx([1.0, 1 - (1 - LAST) / 3, 1 - 2 * (1 - LAST) / 3, LAST])


REFUSED = [
    ({}, {"sampler": "eule"}, "did you mean 'euler'|sampler: unknown name"),
    ({"schedule": "ddpm", "prediction": "noise"}, {"sampler": "heun"}, "needs a velocity.*ddim, dpm, ddpm"),
    ({}, {"sampler": "meanflow"}, "needs a model with until=True"),
    ({}, {"steps": 0}, "steps must be from 1"),
    ({"schedule": "ddpm", "prediction": "noise"}, {"steps": 1001}, "from 1 to 1000"),
    ({"classes": 0}, {"guidance": Guidance(scale=2.0)}, "needs a model with classes"),
    ({}, {"guidance": Guidance(scale=2.0, channels=3)}, "at most 2 channels"),
    ({}, {"guidance": Guidance(scale=2.0, weak=Toy(0.0, 1.0))}, "weaker model must have the same channels, 2, got 1"),
    ({}, {"shift": 0.0}, "shift must be from 0.01 to 100"),
    ({"patch": 4}, {"size": (3, 8)}, "at least a patch of 4 pixels, got 3 x 8"),
]


@pytest.mark.parametrize(("fields", "options", "message"), REFUSED)
def test_refused(fields, options, message):
    model, options = model_of(**fields), dict(options)
    size = options.pop("size", (8, 8))
    with pytest.raises(ValueError, match=message) as error:
        sample(model, None if fields.get("classes") == 0 else torch.tensor([0]), [0], size, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"scale": math.nan}, {"start": 0.5, "end": 0.4}, {"end": 1.1}])
def test_refused_guidance(options):
    with pytest.raises(ValueError, match="guidance"):
        Guidance(**options)
    check_sampler(model_of().config, "ddim", Guidance())
    assert parts_of("data", torch.ones(1), torch.ones(1), SCHEDULES["linear"].level(torch.ones(1))).noise == 1.0


@pytest.mark.parametrize(
    ("labels", "indices", "options", "message"),
    [
        (None, [], {}, "with a label for each, got 0, labels none"),
        (None, [-1], {}, "indices must be integers >= 0"),
        ([1, 2], range(3), {}, r"with a label for each, got 3, labels \[2\]"),
        ([1], [0], {"steps": 2.5}, "steps must be from 1 to 10000, got 2.5"),
    ],
)
def test_refused_samples(labels, indices, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model_of(), labels, indices, (8, 8), **options)
    with pytest.raises(ValueError, match="samples need a diffusion model, got a Linear"):
        sample(nn.Linear(2, 2), None, [0], (8, 8))


def test_the_times_from_a_start():
    config = Toy(0.0, 1.0).config
    assert times_of(config, 2, start=0.5) == [0.5, 0.25, 0.0]
    assert times_of(config, 2, 3.0, 0.5) == [0.5 * each for each in times_of(config, 2, 3.0)]
    steps = Toy(0.0, 1.0, "ddpm").config
    assert times_of(steps, 2, start=0.5004) == [0.5, 0.25, 0.0] and times_of(steps, 5, start=1e-5) == [0.001, 0.0]
    for start in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="start at a time > 0 and <= 1"):
            times_of(config, 2, start=start)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_sample_from_a_start_follows_the_line(sampler):
    """On the line of the velocity through the start, to the data at its end."""
    noise = Noise(0, range(4), (1, 2, 2))()
    start = (along(0.6, noise, 0.5, 0.3), 0.6)
    found = drawn(Toy(0.3, 0.5), sampler, 200, start=start)
    assert (found - along(0.0, noise, 0.5, 0.3)).abs().max() < 5e-3


@pytest.mark.parametrize("sampler", ["ddpm", "euler_maruyama"])
@pytest.mark.parametrize("time", [0.6, LAST / 2])
def test_stochastic_samplers_from_a_start_give_the_distribution(sampler, time):
    """Data with the first noise of each sample; the sampler's own noise is independent of it."""
    data = 0.3 + 0.5 * Noise(1, range(1000), (1, 2, 2))()
    noised = (1 - time) * data + time * Noise(0, range(1000), (1, 2, 2))()
    found = drawn(Toy(0.3, 0.5), sampler, 60, 1000, start=(noised, time))
    assert found.mean().item() == pytest.approx(0.3, abs=0.03) and found.std().item() == pytest.approx(0.5, abs=0.03)


def test_the_noise_of_a_sampler_is_not_that_of_its_start(monkeypatch):
    seen: list[Tensor] = []

    def one(denoiser, x, times, noise):
        seen.extend([x, noise()])
        yield x

    monkeypatch.setitem(SAMPLERS, "euler", one)
    again = Noise(0, range(4), (1, 2, 2))
    first, second = again(), again()
    drawn(Toy(0.3, 0.5), "euler", 1)
    drawn(Toy(0.3, 0.5), "euler", 1, start=(first + 1.0, 0.5))
    assert all(map(torch.equal, seen, (first, second, first + 1.0, second)))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_model_in_half_precision_is_sampled_in_single(scale, monkeypatch):
    monkeypatch.undo()  # noise in fp32
    labels, options = torch.tensor([0, 2]), {"steps": 4, "guidance": Guidance(scale=scale)}
    exact = sample(model_of().float(), labels, range(2), (8, 8), **options).x
    found = sample(model_of().bfloat16(), labels, range(2), (8, 8), **options).x
    assert found.dtype == exact.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
