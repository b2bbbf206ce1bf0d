"""How close samples are to images, from the features [N, D] of each."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from zoo.data.sampling import seeded
from zoo.text import unknown

NEAR = 0.01  # the share of held-out images that lie as near to a training image as a near copy
MOST = 5000  # images of a kernel distance, whose matrices grow with their square
CHUNK = 2**24  # values of a matrix of distances that are held at once


class Given(nn.Module):
    """What torchmetrics calls the feature extractor: the features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def spread(number: int, total: int) -> Tensor:
    """`number` of 0 .. total - 1, evenly spread; some come several times if there are fewer."""
    return torch.arange(number) * total // number


def equal(one: Tensor, other: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """As many rows of both, evenly spread, in fp64: distances depend on how many there are."""
    number = min(len(one), len(other), most or len(one))
    first, second = (each[spread(number, len(each))].double().cpu() for each in (one, other))
    return first, second


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and the covariances of as many features of both (Heusel
    et al. 2017, arXiv:1706.08500).

    Raises:
        ValueError: not more images of one kind than features, whose covariance is then singular.
    """
    one, other = equal(one, other)
    number, width = one.shape
    if number <= width:
        found = f"a Frechet distance of {width} features needs more than {width} images of each kind, got {number}"
        raise ValueError(f"{found}; the kernel distance needs fewer")
    metric = FrechetInceptionDistance(Given(width), sync_on_compute=False)
    metric.update(other, real=True)
    metric.update(one, real=False)
    return float(metric.compute())


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The squared maximum mean discrepancy with the kernel (x y / D + 1)^3, without bias, of as many features of both:
    one subset of all, at most 5,000 (Binkowski et al. 2018, arXiv:1801.01401). It may be below 0.

    Raises:
        ValueError: fewer than two images of one kind.
    """
    one, other = equal(one, other, MOST)
    if len(one) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of each kind, got {len(one)}")
    with warnings.catch_warnings(), seeded(0):  # torchmetrics shuffles them, and warns of the memory
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(Given(one.shape[1]), subsets=1, subset_size=len(one), sync_on_compute=False)
        metric.update(other, real=True)
        metric.update(one, real=False)
        return float(metric.compute()[0])


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean distance of each query to the nearest reference, and the index of that.

    Raises:
        ValueError: there are no references.
    """
    if len(references) == 0:
        raise ValueError("the nearest of 0 images is not defined")
    rows, found = max(1, CHUNK // len(references)), []
    for part in queries.split(rows):
        # Not by a matrix product, whose rounding moves copies apart.
        found.append(torch.cdist(part, references, compute_mode="donot_use_mm_for_euclid_dist").min(1))
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def neighbour_accuracy(features: Tensor, labels: Tensor, tests: Tensor, wanted: Tensor) -> float:
    """The accuracy on tests with the labels `wanted` of a classifier that gives each the label of its nearest feature.

    Raises:
        ValueError: there are no features or no tests.
    """
    if len(tests) == 0:
        raise ValueError("a neighbour classifier needs an image to be tested on")
    _, places = nearest(tests, features)
    return float((labels[places] == wanted).double().mean())


def near_copies(features: Tensor, training: Tensor, held_out: Tensor) -> float:
    """The share of features whose nearest training image is as near as that of the nearest hundredth of held-out
    images, which have not been seen: at most the 1 % quantile of their distances. Exact copies always count.

    Raises:
        ValueError: there are no features, training or held-out images.
    """
    if min(map(len, (features, training, held_out))) == 0:
        raise ValueError("near copies need samples, training images and held-out images")
    limit = nearest(held_out, training)[0].double().quantile(NEAR)
    return float((nearest(features, training)[0].double() <= limit).double().mean())


def matched(classes: Sequence[str], known: Sequence[str] | None, name: str) -> Tensor:
    """The index of each class among those that the classifier `name` knows.

    Raises:
        ValueError: it does not know a class by its name.
    """
    if known is None:
        raise ValueError(f"classifier {name} has no class names, so its classes cannot be matched")
    if lacking := [each for each in classes if each not in known]:
        raise ValueError(f"classifier {name} does not fit: {unknown('class', lacking[0], known)}")
    return torch.tensor([list(known).index(each) for each in classes])


def agreement(read: Tensor, asked: Tensor) -> float:
    """The share of samples that a classifier reads as the class that was asked for.

    Raises:
        ValueError: there are no samples.
    """
    if len(asked) == 0:
        raise ValueError("classifier agreement needs samples")
    return float((read == asked).double().mean())
