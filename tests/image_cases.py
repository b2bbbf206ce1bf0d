"""What the tests of data sets of images share: all of a loader, one image of an epoch, and no augmentation."""

from typing import Any

import torch

from zoo.data.images import Batch

PLAIN: dict[str, Any] = {"randaugment": None, "flip": 0.0, "scale": (1.0, 1.0), "erasing": 0.0}


def whole(loader: Any) -> Batch:
    batches = list(loader)
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        tuple(name for batch in batches for name in batch.skipped),
    )


def image_of(dataset: Any, epoch: int, index: int) -> torch.Tensor:
    """One image [channels, size, size] of an epoch."""
    batch = dataset[epoch, index]
    assert len(batch.images) == len(batch.labels) == 1 and batch.skipped == ()
    return batch.images[0]
