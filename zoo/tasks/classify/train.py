"""Image classification: DeiT's recipe with timm's parts (Touvron et al. 2021, arXiv:2012.12877)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores

from zoo.data.images import Batch
from zoo.data.sampling import rank_and_world
from zoo.tasks.intervals import Measured, lowest, wilson
from zoo.tasks.task import Task, differing

UNREADABLE = "skipped {}: cannot be read as an image"
TOP = 5  # the other accuracy counts a class among so many as right


class BalancedAccuracy(MulticlassStatScores):
    """The mean over classes of the accuracy on their images; classes without images do not count."""

    def compute(self) -> Tensor:
        right, number = self.counts()
        return (right / number)[number > 0].mean()

    def counts(self) -> tuple[Tensor, Tensor]:
        """By class, how many of its images are classified right, and how many there are."""
        right, _, _, missed = self._final_state()
        return right, right + missed


class Count(Metric):
    """How many images there are, over all ranks: exact in every precision of the Trainer."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("number", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, more: int) -> None:
        self.number += more

    def compute(self) -> Tensor:
        return self.number


class Classify(Task):
    """A classifier in training.

    Args:
        backbone: arguments of `zoo.create_model`: name, and any field of the model's config.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        smoothing: label smoothing.
        options: those of every task.
    """

    command = "classify"
    score = ("val/accuracy", "max")
    files = "IMAGES"
    faulty = ("unreadable images",)

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        **options: Any,
    ) -> None:
        if min(mixup, cutmix) < 0 or not 0.0 <= smoothing < 1.0:
            raise ValueError(
                f"mixup and cutmix must be >= 0 and smoothing from 0 to 1, got {mixup}, {cutmix}, {smoothing}"
            )
        self.mixing, self.smoothing = (mixup, cutmix), smoothing
        super().__init__(backbone, **options)
        self.mean_loss = MeanMetric()
        self.number = Count()

    def complete(self) -> None:
        super().complete()
        classes = self.config.labelled
        if classes < 2:
            raise ValueError(f"model.backbone.classes must be >= 2, got {classes}")
        self.mix = None
        if any(self.mixing):
            self.mix = Mixup(*self.mixing, label_smoothing=self.smoothing, num_classes=classes)
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "balanced_accuracy": BalancedAccuracy(classes, average=None),
        }
        if classes > TOP:
            metrics[f"top{TOP}_accuracy"] = MulticlassAccuracy(classes, average="micro", top_k=TOP)
        # Not grouped: metrics whose first batches agree would share one state from then on.
        self.metrics = MetricCollection(metrics, compute_groups=False)
        self.calibration = MulticlassCalibrationError(classes, n_bins=15)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.mix is not None and self.data.batch < 2:
            raise ValueError("mixup and cutmix mix pairs of images; raise data.batch, or set both to 0")
        labels, names = (None if self.start is None else self.start.labels), self.data.classes
        if stage != "fit" and isinstance(labels, tuple) and (where := differing(labels, names)):
            raise ValueError(f"the classes of the checkpoint differ from those of the data: {where}")

    def inputs_of(self, batch: Batch) -> tuple[Tensor]:
        return (batch.images,)

    @property
    def labels(self) -> list[str]:
        return self.data.classes

    def loss_of(self, batch: Batch) -> Tensor:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "training")
        images, labels = batch.images, batch.labels
        if len(images) == 0:
            # Ranks exchange the statistics of batch norms, and none may be left waiting.
            return self.model(images).sum() * 0.0 if rank_and_world()[1] > 1 else self.no_loss()
        if self.mix is not None:
            images, labels = self.mixed(images, labels)
            loss = F.cross_entropy(self.model(images), labels)
        else:
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
        self.log("train/loss", self.checked(loss))
        return loss

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] mixed in pairs, and the probabilities [B, classes] of their labels. Of an odd number,
        the first stays as it is."""
        number = len(images)
        if number % 2:
            images, labels = torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]])
        assert self.mix is not None
        images, labels = self.mix(images, labels)
        return images[:number], labels[:number]

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.report("training")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "validation")
        if len(batch.images) == 0:
            return
        logits, labels = self.data.judged(self.measured(batch.images), batch.labels)
        self.metrics.update(logits, labels)
        self.calibration.update(logits.float().softmax(1), labels)
        self.mean_loss.update(F.cross_entropy(logits, labels), len(logits))
        self.number.update(len(logits))

    def on_validation_epoch_end(self) -> None:
        self.report("validation")
        number = int(self.number.compute())
        if number == 0 and self.trainer.sanity_checking:
            return
        if number == 0:
            raise ValueError("no image of the validation set could be read")
        values = self.metrics.compute()
        part = "test" if self.trainer.testing else "val"
        self.log_dict({f"{part}/{name}": value for name, value in values.items()})
        # Four digits: further ones depend on how the batches are cut.
        self.log(f"{part}/calibration_error", self.calibration.compute().double().round(decimals=4))
        self.log(f"{part}/loss", self.mean_loss.compute())
        right = {name: round(float(value) * number) for name, value in values.items()}
        low, high = wilson(right["accuracy"], number)
        self.figures = [
            Measured("accuracy", "top-1 accuracy", number, (low, high)),
            *(
                Measured(name, f"top-{TOP} accuracy", number, wilson(count, number))
                for name, count in right.items()
                if name == f"top{TOP}_accuracy"
            ),
            Measured("balanced_accuracy", "balanced accuracy", number),
            Measured("calibration_error", "expected calibration error", number),
        ]
        if not self.fitting and self.trainer.world_size == 1:
            counts: Any = self.metrics["balanced_accuracy"]
            self.figures += lowest("recall", self.labels, *(each.tolist() for each in counts.counts()))
        accuracy = right["accuracy"] / number
        self.said = f"accuracy {accuracy:.4f} (n = {number}, 95 % interval {low:.4f} to {high:.4f})"
        for metric in (self.metrics, self.calibration, self.mean_loss, self.number):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
