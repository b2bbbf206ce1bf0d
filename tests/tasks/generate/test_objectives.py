"""Objectives: losses against naive forms, MeanFlow's derivative, times."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from helpers import prepared, relative
from zoo.models.dimr import DiMRConfig
from zoo.models.dit import DiTConfig
from zoo.outputs.samplers import sample
from zoo.schedules import SCHEDULES
from zoo.tasks.generate.objectives import Objective, Times, balanced, discretized, pooled, variance_loss

TINY = {"dim": 32, "depth": 1, "heads": 2, "image": 8, "channels": 2, "classes": 3}


def model_of(**fields: Any) -> Any:
    return prepared(DiTConfig(**TINY | fields).build())


def batch(number: int = 4) -> tuple[torch.Tensor, ...]:
    x = (torch.rand(number, 2, 8, 8).double() * 2 - 1, torch.arange(number) % 4)
    return (*x, torch.linspace(0.1, 0.9, number).double(), torch.randn(number, 2, 8, 8).double())


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("loss", [None, "velocity", "noise", "data"])
def test_the_loss_is_the_error_of_what_it_names(prediction, loss):
    model, (x, labels, times, noise) = model_of(prediction=prediction), batch()
    found = Objective(loss=loss)(model, x, labels, times, noise)
    t = times.view(-1, 1, 1, 1)
    mixed = (1 - t) * x + t * noise
    output = model(mixed, times, labels)
    if prediction == "velocity":
        data, drawn = mixed - t * output, mixed + (1 - t) * output
    else:
        data, drawn = output, (mixed - (1 - t) * output) / t
    error = {"data": data - x, "noise": drawn - noise, "velocity": (drawn - data) - (noise - x)}[loss or prediction]
    assert relative(found.double(), error.square().flatten(1).mean(1)) < 1e-5


def test_the_weight_of_clean_data_is_bounded():
    """JiT's: an error of the data counts 1 / t^2 in the velocity, with t at least 0.05."""
    model, (x, labels, _, noise) = model_of(prediction="data"), batch(2)
    times = torch.tensor([0.01, 0.05]).double()
    plain, scaled = (Objective(loss=loss)(model, x, labels, times, noise) for loss in ("data", "velocity"))
    assert (scaled / plain).tolist() == pytest.approx([400.0, 400.0], rel=1e-4)


def test_mean_flow_without_a_step_is_flow_matching():
    model, (x, labels, times, noise) = model_of(until=True), batch()
    found = Objective()(model, x, labels, times, noise, times)
    assert relative(found.double(), Objective()(model, x, labels, times, noise).double()) < 1e-6
    until = times * 0.3
    t = times.view(-1, 1, 1, 1)
    change = Objective(derivative="jvp").change(model, (1 - t) * x + t * noise, noise - x, labels, times, until)
    output = model((1 - t) * x + t * noise, times, labels, until=until)
    wanted = (output - (noise - x) + (t - until.view(-1, 1, 1, 1)) * change).square().flatten(1).mean(1)
    found = Objective(derivative="jvp")(model, x, labels, times, noise, until)
    assert relative(found.double(), wanted) < 1e-6
    weighed = balanced(found, 128)
    assert torch.allclose(weighed, found * 128 / (found * 128 + 1e-3)) and weighed.grad_fn is not None


def test_steps_of_mean_flow():
    torch.manual_seed(0)
    times, until = Objective(equal=0.75).draw(4000, "linear", "cpu", True)
    assert until is not None and (until <= times).all()
    assert (until == times).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert Objective().draw(4, "linear", "cpu", False)[1] is None


def test_differences_agree_with_the_derivative():
    model, (x, labels, times, noise) = model_of(until=True, time="sincos(scale=1.0)"), batch()
    given = (model, x, noise - x, labels, times, times * 0.4)
    found, exact = (Objective(derivative=each).change(*given) for each in ("difference", "jvp"))
    assert relative(found, exact) < 1e-3
    assert exact.abs().max() > 0.1


def branches_of(**fields: Any) -> Any:
    sizes = {"dim": (16, 12, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)}
    return prepared(DiMRConfig(**TINY | sizes | fields).build())


@pytest.mark.parametrize(("prediction", "loss"), [("velocity", None), ("data", "velocity")])
def test_coarse_predictions_count_less_in_training_and_not_in_evaluation(prediction, loss):
    """DiMR's: 1 / 16, 1 / 4 and 1, each for the sums of squares of pixels over 4, 2 and 1."""
    model, (x, labels, times, noise) = branches_of(prediction=prediction), batch()
    t = times.view(-1, 1, 1, 1)
    mixed, wanted = (1 - t) * x + t * noise, noise - x if prediction == "velocity" else x
    factor = 1 / times.square() if loss else torch.ones(4)
    found = [Objective(loss=loss)(model.train(mode), x, labels, times, noise).double() for mode in (True, False)]
    total = torch.zeros(4).double()
    for output, side in zip(model.predictions(mixed, times, labels), (4, 2, 1), strict=True):
        target = wanted.unflatten(3, (-1, side)).unflatten(2, (-1, side)).sum((3, 5)) / side
        last = (output - target).square().flatten(1).mean(1)
        total += last / side**2
    assert relative(found[0], factor * total) < 1e-5 and relative(found[1], factor * last) < 1e-5


def test_mean_flow_with_coarse_predictions():
    """They are to predict what the finest does, in squares of pixels."""
    time = "sincos(scale=1.0)"
    model = branches_of(until=True, time=time, modulation="adaln", norm="layernorm(affine=False)").train()
    x, labels, times, noise = batch()
    objective, t, until = Objective(derivative="jvp"), times.view(-1, 1, 1, 1), times * 0.3
    mixed = (1 - t) * x + t * noise
    wanted = noise - x - (t - until.view(-1, 1, 1, 1)) * objective.change(model, mixed, noise - x, labels, times, until)
    total = torch.zeros(4).double()
    for output, side in zip(model.predictions(mixed, times, labels, until=until), (4, 2, 1), strict=True):
        total += (output - pooled(wanted, side)).square().flatten(1).mean(1) / side**2
    assert relative(objective(model, x, labels, times, noise, until).double(), total) < 1e-5


def test_pooled_noise_keeps_its_variance():
    """In squares at the edges, too, which have fewer pixels."""
    torch.manual_seed(0)
    found = pooled(torch.randn(4000, 1, 5, 3), 2)
    assert found.shape[2:] == (3, 2)
    assert torch.allclose(found.var(0), torch.ones(1, 3, 2), atol=0.1)
    assert pooled(torch.ones(1, 1, 5, 3), 2).flatten().tolist() == pytest.approx([2, 2**0.5] * 2 + [2**0.5, 1])


def test_the_bound_of_a_learned_variance():
    """Against the divergence of two Gaussians and the probability of an 8-bit value."""
    schedule = SCHEDULES["ddpm"]
    x = torch.tensor([0.2, -1.0, 1.0, 0.5]).double().view(4, 1, 1, 1)
    data, variance = x + 0.01, torch.tensor([0.3, -0.2, 1.0, 0.0]).double().view(4, 1, 1, 1)
    times = torch.tensor([0.5, 0.001, 0.001, 0.002]).double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    signal, noise = schedule.level(times.view(-1, 1, 1, 1))
    mixed = signal * x + noise * 0.7
    found = variance_loss(data, variance, x, mixed, times)
    for index, step in enumerate((499, 0, 0, 1)):
        before = kept[step - 1] if step else torch.ones(())
        beta = betas[step]
        true = beta * (1 - before) / (1 - kept[step])
        least = betas[1] * (1 - kept[0]) / (1 - kept[1]) if step == 0 else true
        share = (variance[index].item() + 1) / 2
        log_variance = share * math.log(beta) + (1 - share) * math.log(least)
        centre = [
            (before.sqrt() * beta * of + (1 - beta).sqrt() * (1 - before) * mixed[index]) / (1 - kept[step])
            for of in (x[index], data[index])
        ]
        if step:
            one = torch.distributions.Normal(centre[0], math.sqrt(true))
            other = torch.distributions.Normal(centre[1], math.exp(log_variance / 2))
            wanted = torch.distributions.kl_divergence(one, other) / math.log(2)
        else:
            wanted = -discretized(x[index], centre[1], torch.tensor(log_variance / 2)) / math.log(2)
        assert found[index].item() == pytest.approx(wanted.item(), rel=1e-5)
    total = discretized(torch.linspace(-1, 1, 256).double(), torch.tensor(0.1).double(), torch.tensor(-1.0)).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_a_learned_variance_moves_only_the_variance():
    model, (x, labels, _, noise) = model_of(schedule="ddpm", prediction="noise", variance=True), batch()
    times = torch.tensor([0.001, 0.1, 0.5, 1.0]).double()
    plain = model_of(schedule="ddpm", prediction="noise")
    whole = Objective()(model, x, labels, times, noise)
    branches = branches_of(schedule="ddpm", prediction="noise", variance=True).train()
    assert Objective()(branches, x, labels, times, noise).isfinite().all()
    t = SCHEDULES["ddpm"].level(times.view(-1, 1, 1, 1))
    output = model(t.signal * x + t.noise * noise, times, labels)[:, :2]
    error = (output - noise).square().flatten(1).mean(1)
    assert (whole > error).all() and Objective()(plain, x, labels, times, noise).isfinite().all()
    whole.sum().backward()
    gradient = model.out.bias.grad.view(4, 4)[:, :2].clone()
    model.zero_grad()
    output = model(t.signal * x + t.noise * noise, times, labels)[:, :2]
    (output - noise).square().flatten(1).mean(1).sum().backward()
    assert relative(gradient, model.out.bias.grad.view(4, 4)[:, :2]) < 1e-6


def test_times():
    torch.manual_seed(0)
    uniform = Times()(10_000, "linear", "cpu")
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02) and uniform.min() >= 0 and uniform.max() <= 1
    logits = torch.logit(Times(name="logit_normal", mean=-0.4, std=0.8)(10_000, "linear", "cpu").double())
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.03) and logits.std().item() == pytest.approx(0.8, abs=0.03)
    shifted = Times(shift=3.0)(10_000, "linear", "cpu")
    assert (shifted > 0.5).float().mean().item() == pytest.approx(0.75, abs=0.02)
    steps = Times()(5_000, "ddpm", "cpu") * 1000
    assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.min() >= 0.999 and steps.max() <= 1000.001


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"loss": "score"}, {}, "model.loss: unknown name 'score'"),
        ({"loss": "velocity"}, {"schedule": "ddpm", "prediction": "noise"}, "needs schedule 'linear'"),
        ({"derivative": "exact"}, {}, "model.derivative"),
        ({"equal": 1.5}, {}, "model.equal must be"),
        ({}, {"until": True, "prediction": "data"}, "must predict the velocity"),
        ({"loss": "noise"}, {"until": True, "time": "sincos(scale=10.0)"}, "model.loss must be velocity"),
        ({}, {"until": True, "time": "sincos(scale=10.0)", "drop_path": 0.1}, "takes no drop_path and no dropout"),
        ({}, {"until": True}, "an embedding of the time that changes slowly, of a scale <= 50, got 1000"),
    ],
)
def test_refused(options, fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options).check(DiTConfig(**TINY | fields))
    for given in ({"name": "normal"}, {"std": -1.0}, {"shift": 0.0}, {"mean": math.inf}):
        with pytest.raises(ValueError, match="model.times"):
            Times(**given)
    assert isinstance(model_of(), nn.Module)


def discs(number: int, height: int, width: int, seed: int) -> torch.Tensor:
    """White discs on black, as many per pixel in images of any size."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = -torch.ones(number, 1, height, width)
    for _ in range(height * width // 512):
        y, x, radius = torch.rand(3, number, 1, 1, generator=generator)
        inside = (rows - y * height) ** 2 + (columns - x * width) ** 2 < (3 + 4 * radius) ** 2
        images = torch.where(inside[:, None], 1.0, images)
    return images


@pytest.mark.parametrize("mixer", ["dico", "dcnv4"])
def test_a_model_without_absolute_positions_draws_other_sides_than_it_was_trained_at(mixer):
    torch.manual_seed(0)
    fields: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "patch": 4, "image": 32, "channels": 1, "classes": 0}
    model: Any = zoo.create_model("dit_micro", mixer=mixer, position="none", **fields)
    optimizer, objective = torch.optim.AdamW(model.parameters(), 3e-3), Objective()
    for step in range(100):
        x = discs(16, 32, 32, step)
        loss = objective(model, x, None, torch.rand(16), torch.randn_like(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = []
    for width in (32, 48):
        x, times = discs(64, 32, width, 1_000), (torch.arange(64) + 0.5) / 64
        with torch.no_grad():
            losses.append(float(objective(model.eval(), x, None, times, torch.randn_like(x)).mean()))
    assert losses[0] < 0.8 and losses[1] < 1.2 * losses[0], losses  # 1.6 before training
    drawn = sample(model, None, range(2), (32, 48), steps=2).x
    assert drawn.shape == (2, 1, 32, 48) and drawn.isfinite().all()
