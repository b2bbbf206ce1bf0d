"""Object detection: `zoo detect fit|validate|test`."""

import math
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from zoo.data.boxes import Batch
from zoo.data.coco_bootstrap import precision_intervals
from zoo.data.coco_results import Precision, Result, average_precision
from zoo.data.sampling import rank_and_world
from zoo.models.base import Model
from zoo.models.detection import Noised, Trained
from zoo.outputs.boxes import Truth, best
from zoo.tasks.alignment import Alignment, watched
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import detection_loss
from zoo.tasks.detect.matcher import ASSIGNERS
from zoo.tasks.intervals import WORST, Measured, worst
from zoo.tasks.task import Task
from zoo.text import counted, plain, unknown
from zoo.weights.trunks import load_trunk

UNREADABLE = "unreadable image {}"
PRECISIONS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
MOST = 100  # detections of an image, as COCO counts them


class Detections(Metric):
    """The detections of all images, over all ranks: rows of image id, class, score, and left, top, right and bottom in
    pixels; and the ids of the images."""

    rows: list[Tensor]
    images: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("images", [], dist_reduce_fx="cat")

    def update(self, ids: Tensor, labels: Tensor, scores: Tensor, boxes: Tensor) -> None:
        """ids [B], labels and scores [B, N], boxes [B, N, 4]; those without a box have a score < 0."""
        columns = [ids[:, None].expand_as(labels)[..., None], labels[..., None], scores[..., None], boxes]
        self.rows.append(torch.cat([each.double() for each in columns], -1)[scores >= 0])
        self.images.append(ids)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The rows [n, 7] in fp64 and the ids."""
        found, ids = self.rows, self.images  # joined already where they come from several ranks
        if not isinstance(found, Tensor):
            found = torch.cat([*found, torch.empty(0, 7, dtype=torch.float64, device=self.device)])
        if not isinstance(ids, Tensor):
            ids = torch.cat([*ids, torch.empty(0, dtype=torch.int64, device=self.device)])
        return found, ids


class Detect(Task):
    """Training and evaluation of a detector.

    Args:
        backbone: arguments of `zoo.create_model`: name, trunk, and any field of the model's config.
        trunk_weights: an image classifier whose weights the trunk starts from: a checkpoint of the zoo, or
            for a trunk of timm, `pretrained` or a file.
        trunk_rate: learning rate of the trunk, as a share of `rate`.
        loss: classification loss: vfl, mal, focal or ia_bce; softmax for a detr. Omit it for vfl or softmax.
        assigner: hungarian; or iou, as in DETA, for one object to several queries and tokens, by overlap. It needs
            non-maximum suppression in model.backbone: detection_nms=0.7, and usually proposal_nms=0.9.
        denoising: number of denoising queries of an image, about; 0 for none.
        label_noise: share of their labels that are noised; half of these are replaced.
        box_noise: how far their boxes are moved; 1 for published models.
        teacher: an image model, named like a trunk, whose features those behind the encoder are brought close to; its
            images are normalised as the detector's.
        teacher_weights: its weights, as for trunk_weights; null for random ones.
        alignment: weight of that loss.
        flat: share of training after which the learning rate begins to fall.
        options: those of every task.
    """

    command = "detect"
    score = ("val/ap", "max")
    files = "IMAGES"
    faulty = ("unreadable images",)

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        trunk_weights: str | None = None,
        trunk_rate: float = 0.1,
        loss: str | None = None,
        assigner: str = "hungarian",
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        teacher: str | None = None,
        teacher_weights: str | None = "pretrained",
        alignment: float = 1.0,
        flat: float = 0.5,
        **options: Any,
    ) -> None:
        if assigner not in ASSIGNERS:
            raise ValueError(f"model.assigner: {unknown('name', assigner, ASSIGNERS)}")
        if not 0.0 <= trunk_rate <= 1.0 or not 0.0 <= flat <= 1.0:
            raise ValueError(f"model.trunk_rate and model.flat must be from 0 to 1, got {trunk_rate} and {flat}")
        if denoising < 0 or not 0.0 <= label_noise <= 2.0 or box_noise < 0.0:
            raise ValueError("model.denoising and box_noise must be >= 0, label_noise from 0 to 2")
        if not 0.0 < alignment < math.inf:
            raise ValueError(f"model.alignment must be > 0, got {alignment}")
        self.teacher, self.alignment_weight = (teacher, teacher_weights), alignment
        self.trunk_weights, self.trunk_rate, self.flat = trunk_weights, trunk_rate, flat
        self.assigner = assigner
        self.denoising, self.noise = denoising, (label_noise, box_noise)
        super().__init__(backbone, **options)
        self.loss = self._loss(loss)
        self.found, self.mean_loss = Detections(), MeanMetric()

    def _loss(self, loss: str | None) -> str:
        """The classification loss; ValueError if it, or the assigner, does not fit the kind of detector."""
        config: Any = self.config
        if loss is not None and loss not in config.losses:
            raise ValueError(f"model.loss: {unknown('name', loss, config.losses)}")
        if self.assigner == "iou" and not config.proposals:
            raise ValueError("model.assigner: iou needs a detector with proposals, such as rtdetr; use hungarian")
        if self.assigner == "iou" and config.detection_nms == 1.0:
            raise ValueError(
                "model.assigner: iou gives an object several queries; set model.backbone.detection_nms, as to 0.7"
            )
        return loss or config.losses[0]

    def built(self, backbone: dict[str, Any], labels: Any = None) -> Model:
        model = super().built(backbone, labels)
        if self.trunk_weights is not None:
            load_trunk(model.trunk, self.trunk_weights, model.config.channels)  # pyright: ignore
        return model

    def complete(self) -> None:
        super().complete()
        if not self.denoising and (noise := getattr(self.model, "noise", None)) is not None:
            noise.requires_grad_(False)
        teacher, weights = self.teacher
        if teacher is not None:
            config: Any = self.config
            size = config.stages[0]
            if size.depth == 0:
                raise ValueError("model.teacher needs a detector with an encoder; encoder_depth is 0")
            try:
                self.alignment = Alignment(size.dim, teacher, weights, config.channels, config.image)
            except ValueError as error:
                raise ValueError(f"model.teacher: {error}") from error

    def groups(self) -> list[dict[str, Any]]:
        trunk = {id(each) for each in self.model.trunk.parameters()}  # pyright: ignore
        groups = []
        for group in super().groups():
            for inside in (False, True):
                if chosen := [each for each in group["params"] if (id(each) in trunk) is inside]:
                    scale = group.get("lr_scale", 1.0) * (self.trunk_rate if inside else 1.0)
                    groups.append(group | {"params": chosen, "lr_scale": scale})
        return groups

    def factor(self, step: int, per_epoch: int, steps: int) -> float:
        """A linear warm-up, a flat part, then half a cosine (D-FINE, Peng et al. 2024, arXiv:2410.13842)."""
        warmup, low = round(self.warmup * per_epoch), self.final_rate / self.rate
        if step < warmup:
            return (step + 1) / (warmup + 1)
        begin = max(warmup, self.flat * steps)
        share = (step - begin) / max(1, steps - begin)
        return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return batch.images, batch.mask

    @property
    def labels(self) -> Any:
        return self.data.labels

    def predicted(self, model: Any, batch: Batch, noised: Noised | None = None) -> Trained:
        """What the losses of a batch need."""
        every = {"tokens": True} if self.assigner == "iou" else {}
        return model.predict(batch.images, batch.mask, noised, **every)

    def compared(self, predicted: Trained, batch: Batch, noised: Noised | None = None) -> dict[str, Tensor]:
        """The losses of what was predicted."""
        return detection_loss(predicted, noised, batch.truth, loss=self.loss, assigner=self.assigner)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch; with denoising queries in training."""
        noised = None
        if self.denoising and self.training and getattr(self.model, "noise", None) is not None:
            noised = denoising_queries(batch.truth, self.config.labelled, self.denoising, *self.noise)
        model: Any = self.model
        if self.alignment is None or not self.training:
            return self.compared(self.predicted(model, batch, noised), batch, noised)
        with watched(model.encoder[-1]) as seen:
            predicted = self.predicted(model, batch, noised)
        losses = self.compared(predicted, batch, noised)
        tokens, context = seen[0]
        apart = self.alignment(tokens, context.grid, context.mask, batch.images, batch.mask)
        losses["alignment"] = self.alignment_weight * apart
        return losses | {"total": losses["total"] + losses["alignment"]}

    def loss_of(self, batch: Batch) -> Tensor:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "training")
        if len(batch.images) == 0:
            return self.nothing(batch)
        losses = self.losses(batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items() if name != "total"})
        self.log("train/loss", self.checked(losses["total"]))
        return losses["total"]

    def nothing(self, batch: Batch) -> Tensor:
        """The loss of a batch without images: 0, after the same collective calls, so that no rank waits."""
        if rank_and_world()[1] == 1:
            return self.no_loss()
        return self.losses(blank(batch))["total"] * 0.0

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.report("training")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "validation")
        given = batch if len(batch.images) else blank(batch)  # ranks exchange their numbers of objects
        predicted = self.predicted(self.measured, given)
        self.mean_loss.update(self.compared(predicted, given)["total"], len(batch.images))
        logits, boxes = (each[-1, : len(batch.images)] for each in predicted.layers)
        config: Any = self.config
        found = best(logits, boxes, batch.sizes, config.labelled, MOST, config.detection_nms)
        self.found.update(batch.ids, *found)

    def on_validation_epoch_end(self) -> None:
        self.report("validation")
        rows, ids = self.found.compute()
        rows, ids = rows.view(-1, 7), ids.view(-1)  # the metric drops axes of length 1
        if len(ids) == 0 and not self.trainer.sanity_checking:
            raise ValueError("no image of the validation set could be read")
        if not self.trainer.sanity_checking:
            self.conclude(rows, ids)
        self.found.reset()
        self.mean_loss.reset()

    def conclude(self, rows: Tensor, ids: Tensor) -> None:
        """Logs the average precision of all ranks' detections, and says it; outside of training by category, too."""
        part = "test" if self.trainer.testing else "val"
        source = self.data.source(part)
        results = [Result(int(row[0]), int(row[1]), row[2], row[3:]) for row in rows.tolist()]
        found = average_precision(results, source, source.labels, ids.tolist())
        self.log_dict({f"{part}/{name}": getattr(found, name) for name in PRECISIONS})
        self.log(f"{part}/loss", self.mean_loss.compute())
        size = f"n = {counted(found.objects, 'object')} in {counted(len(ids), 'image')}"
        ends: dict[str, tuple[float, float]] = {}
        if self.trainer.state.fn != TrainerFn.FITTING:
            ends = precision_intervals(results, source, source.labels, ids.tolist()) or {}
        self.figures = [Measured(key, metric, len(ids), ends.get(key)) for key, metric in PRECISIONS.items()]
        if not self.fitting:
            pairs = sorted((pair[0], name) for name, pair in found.classes.items() if pair is not None)
            self.figures += [worst("AP", name, len(ids), ap) for ap, name in pairs[:WORST]]
        if ends:
            size += f", 95 % interval {ends['ap'][0]:.4f} to {ends['ap'][1]:.4f}"
        self.said = f"AP {found.ap:.4f}, AP50 {found.ap50:.4f} ({size})"
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.said = f"{by_category(found)}\n{self.said}"

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def blank(batch: Batch) -> Batch:
    """A batch of one image without pixels or objects, for what ranks compute together: it changes no statistics."""
    images = batch.images.new_zeros(1, batch.images.shape[1], 64, 64)
    truth = Truth(*(each.new_zeros(1, 0, *each.shape[2:]) for each in batch.truth))
    return batch._replace(images=images, mask=torch.zeros_like(images[:, 0], dtype=torch.bool), truth=truth)


def by_category(found: Precision) -> str:
    """A line for each category, with its AP and AP50, and one for each range of sizes."""
    width = max(len(plain(name)) for name in (*found.classes, "medium"))
    lines = [f"{'':{width}}      AP    AP50"]
    for name, pair in found.classes.items():
        lines.append(f"{plain(name):{width}}  " + ("no objects" if pair is None else f"{pair[0]:.4f}  {pair[1]:.4f}"))
    sizes = {"small": found.small, "medium": found.medium, "large": found.large}
    lines += [f"{name:{width}}  {ap:.4f}" for name, ap in sizes.items() if ap is not None]
    return "\n".join(lines)
