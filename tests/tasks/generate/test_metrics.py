"""Metrics of samples: against their formulas, and where their value is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from zoo.tasks.generate.metrics import (
    MOST,
    agreement,
    frechet_distance,
    kernel_distance,
    matched,
    near_copies,
    nearest,
    neighbour_accuracy,
    spread,
)


def exactly(number: int, mean: Tensor, root: Tensor) -> Tensor:
    """Features with exactly this mean and the covariance root @ root.T."""
    white = torch.randn(number, len(mean), dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / (number - 1)).T)
    return white @ root.T + mean


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    means, roots = torch.randn(2, 5).double(), torch.randn(2, 5, 5).double()
    one, other = (exactly(40, mean, root) for mean, root in zip(means, roots, strict=True))
    covariances = [(root @ root.T).numpy() for root in roots]
    cross = np.trace(sqrtm(covariances[0] @ covariances[1])).real
    wanted = float((means[0] - means[1]).square().sum()) + sum(map(np.trace, covariances)) - 2 * cross
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(one, one + 3.0) == pytest.approx(5 * 9.0, rel=1e-6)
    assert frechet_distance(one.float(), one.float()) == pytest.approx(0.0, abs=1e-5)


def test_frechet_distance_takes_as_many_of_both():
    one, other = torch.randn(90, 4), torch.randn(30, 4)
    assert frechet_distance(one, other) == frechet_distance(one[::3], other)


def mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, written out."""
    n = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    off = 1 - torch.eye(n, dtype=torch.float64)
    inside = (kernel(x, x) * off).sum() + (kernel(y, y) * off).sum()
    return float(inside / (n * (n - 1)) - 2 * kernel(x, y).mean())


def test_kernel_distance_is_the_formula_of_all_images():
    one, other = torch.randn(30, 6), torch.randn(30, 6) + 0.5
    assert kernel_distance(one, other) == pytest.approx(mmd(one, other), rel=1e-9)
    assert kernel_distance(torch.cat([one, one]), other) == pytest.approx(mmd(torch.cat([one, one])[::2], other))
    many = torch.randn(MOST + 10, 1)
    assert len(spread(MOST, len(many)).unique()) == MOST


def test_kernel_distance_leaves_the_generators_alone():
    one, other = torch.randn(30, 6), torch.randn(30, 6) + 0.5
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(kernel_distance(one, other))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_the_nearest(monkeypatch):
    queries, references = torch.randn(7, 3), torch.randn(11, 3)
    wanted = (queries[:, None] - references).square().sum(-1).sqrt().min(1)
    for chunk in (2**24, 30):  # all at once, and two rows at a time
        monkeypatch.setattr("zoo.tasks.generate.metrics.CHUNK", chunk)
        distances, places = nearest(queries, references)
        assert torch.allclose(distances, wanted.values, atol=1e-6) and torch.equal(places, wanted.indices)
    far = references + 1e4  # where a matrix product would round a copy away
    assert nearest(far, far)[0].max() == 0


def test_a_neighbour_classifier():
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    labels = torch.arange(3).repeat(20)
    features, tests = (corners[labels] + torch.rand(60, 2) for _ in range(2))
    assert neighbour_accuracy(features, labels, tests, labels) == 1.0
    assert neighbour_accuracy(features, (labels + 1) % 3, tests, labels) == 0.0
    half = torch.where(torch.arange(60) < 30, labels, (labels + 1) % 3)
    assert neighbour_accuracy(features, labels, tests, half) == 0.5


def test_near_copies():
    training, held_out, other = torch.randn(300, 8), torch.randn(400, 8), torch.randn(400, 8)
    assert near_copies(training[:50], training, held_out) == 1.0
    assert near_copies(held_out, training, held_out) == pytest.approx(0.01, abs=1 / 400)
    assert near_copies(other, training, held_out) < 0.03
    mixed = torch.cat([training[:100], other[:100] + 5.0])
    assert near_copies(mixed, training, held_out) == 0.5
    assert near_copies(training[:5], training, training) == 1.0  # held-out images that are copies, too


def test_classes_are_matched_by_name():
    assert matched(["b", "c"], ("a", "c", "b"), "judge").tolist() == [2, 1]
    with pytest.raises(ValueError, match="classifier judge does not fit: unknown class 'd'; .*a, c, b"):
        matched(["b", "d"], ("a", "c", "b"), "judge")
    with pytest.raises(ValueError, match="judge has no class names"):
        matched(["b"], None, "judge")
    assert agreement(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 2, 1, 2])) == 0.75


@pytest.mark.parametrize(("number", "total"), [(3, 10), (10, 10), (25, 10), (1, 4), (0, 4)])
def test_spread(number, total):
    found = spread(number, total)
    assert len(found) == number and found.tolist() == sorted(found.tolist())
    counts = torch.bincount(found, minlength=total)
    assert len(counts) == total and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x: frechet_distance(x[:4], x), r"of 4 features needs more than 4 images of each kind, got 4"),
        (lambda x: frechet_distance(x, x[:3]), r"got 3"),
        (lambda x: kernel_distance(x[:1], x), r"at least 2 images of each kind, got 1"),
        (lambda x: nearest(x, x[:0]), r"nearest of 0 images"),
        (lambda x: neighbour_accuracy(x, x[:, 0], x[:0], x[:0, 0]), r"an image to be tested on"),
        (lambda x: near_copies(x[:0], x, x), r"need samples"),
        (lambda x: near_copies(x, x, x[:0]), r"held-out images"),
        (lambda x: agreement(x[:0, 0], x[:0, 0]), r"needs samples"),
    ],
)
def test_too_few_images(metric, message):
    with pytest.raises(ValueError, match=message) as error:
        metric(torch.randn(20, 4))
    assert "\n" not in str(error.value)
