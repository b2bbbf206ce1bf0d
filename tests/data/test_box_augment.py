"""Augmentation of images with objects: boxes stay on their objects."""

import random

import numpy as np
import torch
from torch import Tensor

from box_cases import drawn, shapes
from zoo.data.boxes import BoxDataset
from zoo.inputs.boxes import BoxPreprocess


def test_flips_and_turns_move_boxes_with_pixels():
    """The image and the boxes are one of eight symmetries of those of evaluation, and all eight occur."""
    plain, moved = shapes(), shapes(flip=0.5, turn=0.75)
    index = next(index for index in range(20) if len(plain.source.objects(index).labels) >= 2)
    image, (x, y, width, height) = drawn(plain, 0, index)[0], drawn(plain, 0, index)[1].unbind(1)
    ways: list[tuple[Tensor, Tensor]] = []
    for mirrored in (False, True):
        pixels, place = (image.flip(2), (1 - x, y)) if mirrored else (image, (x, y))
        size = (width, height)
        for _ in range(4):
            ways.append((pixels, torch.stack([*place, *size], 1)))
            pixels, place, size = pixels.rot90(1, (1, 2)), (place[1], 1 - place[0]), (size[1], size[0])
    found = set()
    for epoch in range(60):
        pixels, boxes, _ = drawn(moved, epoch, index)
        (way,) = (number for number, (each, _) in enumerate(ways) if torch.equal(each, pixels))
        torch.testing.assert_close(boxes, ways[way][1])
        found.add(way)
    assert found == set(range(8))


def test_boxes_turn_with_their_objects():
    """The pixels in the box of the only object of an image stay the same ones."""
    plain, turned = shapes(), shapes(turn=1.0)
    index = next(index for index in range(20) if len(plain.source.objects(index).labels) == 1)

    def inside(dataset: BoxDataset, epoch: int) -> float:
        image, boxes, _ = drawn(dataset, epoch, index)
        x, y, width, height = (64 * boxes[0]).tolist()
        rows, columns = (slice(round(c - e / 2), round(c + e / 2)) for c, e in ((y, height), (x, width)))
        return float(image[:, rows, columns].mean())

    for epoch in range(8):
        assert abs(inside(turned, epoch) - inside(plain, 0)) < 0.01


def test_photometric_changes_pixels_alone():
    one, other = shapes(), shapes(photometric=1.0)
    for index in range(4):
        before, after = drawn(one, 0, index), drawn(other, 0, index)
        assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_zoom_out_makes_objects_smaller_on_the_mean_colour():
    mean = [0.2, 0.4, 0.6]
    one, other = shapes(), shapes(zoom=1.0, mean=mean)
    for index in range(8):
        (_, before, labels), (image, after, kept) = drawn(one, 0, index), drawn(other, 0, index)
        if len(kept) == len(labels) > 0:
            ratio = after[:, 2:] / before[:, 2:]
            assert ratio.max() <= 1 and ratio.max() - ratio.min() < 0.03  # one factor, but for whole pixels
        corners = torch.stack([image[:, 0, 0], image[:, 0, -1], image[:, -1, 0], image[:, -1, -1]])
        assert (corners.abs().amax(1) < 0.01).sum() >= 1


def test_a_crop_keeps_an_object():
    one, other = shapes(), shapes(iou_crop=1.0)
    larger = 0
    for index in range(24):
        (_, before, labels), (_, after, kept) = drawn(one, 0, index), drawn(other, 0, index)
        assert len(kept) <= len(labels) and bool(kept) == bool(labels)
        larger += len(kept) > 0 and bool(after[:, 2:].max() > before[:, 2:].max() + 1e-3)
    assert larger >= 8


def test_crops_are_distributed_as_torchvisions():
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    from zoo.data.box_transforms import IoUCrop

    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[10.0, 10, 40, 50], [60, 20, 90, 80], [5, 60, 30, 90]]), format="XYXY", canvas_size=(100, 120)
    )  # pyright: ignore[reportCallIssue]
    random.seed(0)
    means = []
    for crop in (v2.RandomIoUCrop(), IoUCrop()):
        found = [crop.make_params([boxes]) for _ in range(300)]
        real = [each for each in found if each]
        rows = [
            [each["top"], each["left"], each["height"], each["width"], 25 * sum(each["is_within_crop_area"])]
            for each in real
        ]
        means.append([*np.mean(rows, axis=0), 60 * len(real) / len(found)])
    np.testing.assert_allclose(*means, atol=5)


def test_a_mosaic_shows_four_images():
    dataset = shapes(mosaic=1.0)
    counts, sizes = [], []
    for index in range(12):
        image, boxes, labels = drawn(dataset, 0, index)
        assert image.shape == (3, 64, 64)
        counts.append(len(labels))
        sizes += boxes[:, 2:].flatten().tolist()
    plain = [len(dataset.source.objects(index).labels) for index in range(12)]
    ordinary = (dataset.source.boxes[:, 2:] - dataset.source.boxes[:, :2]).mean() / dataset.source.sizes.mean()
    assert sum(counts) > 1.5 * sum(plain) and np.mean(sizes) < ordinary


def test_boxes_of_a_mosaic_stay_on_their_objects():
    """Images of one colour, each with its only object in another colour."""
    from zoo.data.box_transforms import Sample, mosaic

    samples = []
    for number in range(4):
        image = np.full((40, 60, 3), 10 * number, dtype=np.uint8)
        image[8:30, 12:50] = 100 + number
        rows, columns = (slice(4) if first else slice(-4, None) for first in (number >= 2, number % 2 == 1))
        image[rows, columns] = 200 + number  # the corner at the centre
        samples.append(Sample(image, np.array([[12, 8, 50, 30]], dtype=np.float32), np.array([number])))
    hidden = 0
    for seed in range(40):
        random.seed(seed)
        made = mosaic(samples, BoxPreprocess(size=32, interpolation="nearest"))
        assert made.image.shape == (64, 64, 3) and {200, 201, 202, 203} <= set(made.image.flatten().tolist())
        for (left, top, right, bottom), label in zip(made.boxes.round().astype(int), made.labels, strict=True):
            rows, columns = (made.image[..., 0] == 100 + label).nonzero()
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(found) - (left, top, right, bottom)).max() <= 1
        whole = {label: (made.image == 100 + label).any() for label in range(4)}
        hidden += sum(whole.values()) - len(made.labels)
    assert hidden > 0  # slivers of an object at the edge do not count


def test_mixup_is_the_mean_of_two_images_with_the_objects_of_both():
    from zoo.data.box_transforms import Made, mixup

    one = Made(torch.full((3, 4, 8), 100, dtype=torch.uint8), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([1]))
    two = Made(torch.full((3, 8, 4), 200, dtype=torch.uint8), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.tensor([2]))
    made = mixup(one, two, 0.25, (0, 0, 0))
    assert made.image[0, :, [0, 7]].T.tolist() == [[175] * 4 + [150] * 4, [25] * 4 + [0] * 4]
    torch.testing.assert_close(made.boxes, torch.tensor([[0.5, 0.25, 0.2, 0.1], [0.25, 0.5, 0.2, 0.4]]))
    assert made.labels.tolist() == [1, 2]
    plain, mixed = shapes(), shapes(mixup=1.0)
    assert sum(len(drawn(mixed, 0, i)[2]) for i in range(8)) > sum(len(drawn(plain, 0, i)[2]) for i in range(8))
