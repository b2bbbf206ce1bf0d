"""Training a generator: `zoo generate fit|validate|test`."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from zoo.aside import aside
from zoo.data.images import Batch
from zoo.inputs.images import ImagePreprocess, default_statistics
from zoo.inputs.latents import Autoencoder
from zoo.layer import Context
from zoo.outputs.samplers import Guidance, Noise, sample, times_of
from zoo.schedules import SCHEDULES
from zoo.tasks.alignment import Alignment, watched
from zoo.tasks.generate.figures import Evaluator
from zoo.tasks.generate.images import decoder_for, grid, to_bytes
from zoo.tasks.generate.objectives import Objective, Times, balanced
from zoo.tasks.intervals import Measured
from zoo.tasks.task import Task, differing

UNREADABLE = "skipped {}: cannot be read as an image"
BUCKETS = 8  # equal parts of 0..1 whose losses are measured
MOST = 10  # classes whose samples are shown during training


class Buckets(Metric):
    """The sum and the number of the losses in each part of 0..1, over all ranks."""

    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(BUCKETS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(BUCKETS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, buckets: Tensor) -> None:
        """losses and their buckets [B]."""
        self.sums = self.sums.double().index_add(0, buckets, losses.double())  # cast by trainer.precision=bf16-true
        self.counts += torch.bincount(buckets, minlength=BUCKETS)

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.sums, self.counts


class Generate(Task):
    """A diffusion model in training.

    The score is the loss on the validation data, with noise and times that are the same in every validation. That of
    MeanFlow is the loss of flow matching, as the model itself makes the targets of longer steps.

    Args:
        backbone: arguments of `zoo.create_model`: name, and any field of the model's config.
        loss: the quantity whose squared error is the loss: velocity, noise or data; null for what the model predicts.
        times: the times of training: uniform or logit_normal.
        times_mean: of logit_normal, the mean of logit(time); above 0 it is nearer to the noise.
        times_std: of logit_normal, its standard deviation.
        times_shift: above 1, moves times to the noise, for large images.
        label_drop: share of the labels that are dropped, for guidance.
        equal: of MeanFlow (until=true), the share of samples trained as flow matching.
        derivative: of MeanFlow, difference or jvp.
        teacher: an image model of the zoo, or timm:NAME, to whose features of the image without noise a block's tokens
            are brought close (REPA, Yu et al. 2024, arXiv:2410.06940); it sees RGB with ImageNet's mean and deviation.
        teacher_weights: its weights, as for `zoo detect`'s trunk_weights; null for random ones.
        teacher_block: the block, counted from 1; 0 for the last of the first third.
        teacher_size: side in pixels to which the images are resized for it; 0 for theirs.
        alignment: weight of that loss.
        show: samples of each class in the grid that is drawn after each validation; 0 for none.
        guidance: their guidance.
        steps: their steps.
        samples: how many samples validate and test draw, with guidance and without, and measure; 0 for none.
        features: a checkpoint or timm:NAME whose features compare them with images; null for pixels, without distances.
        classifier: a checkpoint that reads their classes; null for that of features, if it knows the classes.
        output: folder for the figures as JSON, and for grids of the samples.
        options: those of every task.
    """

    command = "generate"
    score = ("val/loss", "min")
    use, files = "sample", ""
    faulty = ("unreadable images",)
    betas = (0.9, 0.99)

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        loss: str | None = None,
        times: str = "uniform",
        times_mean: float = 0.0,
        times_std: float = 1.0,
        times_shift: float = 1.0,
        label_drop: float = 0.1,
        equal: float = 0.75,
        derivative: str = "difference",
        teacher: str | None = None,
        teacher_weights: str | None = "pretrained",
        teacher_block: int = 0,
        teacher_size: int = 0,
        alignment: float = 0.5,
        show: int = 4,
        guidance: float = 2.0,
        steps: int = 25,
        samples: int = 0,
        features: str | None = None,
        classifier: str | None = None,
        output: str = "runs/figures",
        **options: Any,
    ) -> None:
        if not 0.0 <= label_drop < 1.0 or show < 0:
            raise ValueError(f"model.label_drop must be >= 0 and < 1, and show >= 0, got {label_drop} and {show}")
        if samples == 0 and (features or classifier):
            raise ValueError("model.features and model.classifier measure samples; set model.samples to their number")
        if not 0.0 < alignment < math.inf or teacher_size < 0:
            raise ValueError(f"model.alignment must be > 0 and teacher_size >= 0, got {alignment} and {teacher_size}")
        self.teacher, self.alignment_weight = (teacher, teacher_weights), alignment
        self.teacher_block, self.teacher_size = teacher_block, teacher_size
        found = Times(name=times, mean=times_mean, std=times_std, shift=times_shift)
        self.objective = Objective(times=found, loss=loss, equal=equal, derivative=derivative)
        self.label_drop, self.show, self.guidance, self.steps = label_drop, show, Guidance(scale=guidance), steps
        self.drawable = True  # until the first rank, which draws, finds that latents cannot be decoded
        self.samples, self.readers, self.output = samples, (features, classifier), Path(output).expanduser()
        self.evaluator: Evaluator | None = None
        super().__init__(backbone, **options)
        self.losses = Buckets()
        self.seen, self.bucket = 0, torch.tensor(-1)
        self.decoder: Autoencoder | None = None  # of the samples that are shown

    def complete(self) -> None:
        super().complete()
        self.objective.check(self.config)
        times_of(self.config, self.steps)  # refuses a number of steps that cannot be

        teacher, weights = self.teacher
        if teacher is not None:
            config: Any = self.config
            blocks = getattr(self.model, "blocks", None)
            if blocks is None or not 0 <= self.teacher_block <= len(blocks):
                raise ValueError(
                    "model.teacher needs a model of the family dit, and model.teacher_block one of its blocks"
                )
            try:
                self.alignment = Alignment(
                    config.dim, teacher, weights, config.channels, self.teacher_size or config.image
                )
            except ValueError as error:
                raise ValueError(f"model.teacher: {error}") from error

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.alignment is not None and not isinstance(self.data.preprocess, ImagePreprocess):
            raise ValueError("model.teacher needs images; these are latents")
        labels = None if self.start is None else self.start.labels
        if stage != "fit" and isinstance(labels, tuple) and (where := differing(labels, self.data.classes)):
            raise ValueError(f"the classes of the checkpoint differ from those of the data: {where}")
        if stage != "fit" and self.samples:
            features, classifier = self.readers
            given = (self.samples, self.steps, self.seed, self.guidance, features, classifier)
            self.evaluator = Evaluator(*given, self.labels or [])

    def outputs_wanted(self, data: Any) -> int:
        """Without classes if the model is to have none."""
        given = self.backbone.get("classes", None if self.start is None else self.config.labelled)
        return 0 if given == 0 else data.labelled

    @property
    def labels(self) -> list[str] | None:
        return self.data.classes if self.config.labelled else None

    def labels_of(self, batch: Batch) -> Tensor | None:
        """The labels that the model takes."""
        return batch.labels if self.config.classes else None  # pyright: ignore[reportAttributeAccessIssue]

    def loss_of(self, batch: Batch) -> Tensor:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "training")
        images, labels = batch.images, self.labels_of(batch)
        config: Any = self.config
        empty = len(images) == 0
        if empty and not self.undivided:
            return self.no_loss()
        if empty:  # the other ranks wait for this one's part of the model
            images = images.new_zeros(1, *images.shape[1:])
            labels = None if labels is None else labels.new_zeros(1)
        times, until = self.objective.draw(len(images), config.schedule, images.device, config.until)
        noise = torch.randn_like(images)
        if labels is not None:
            dropped = torch.rand(len(images), device=images.device) < self.label_drop
            labels = labels.masked_fill(dropped, config.classes)
        model: Any = self.model
        if self.alignment is None:
            losses, apart = self.objective(model, images, labels, times, noise, until), 0.0
        else:
            with watched(model.blocks[(self.teacher_block or -(-len(model.blocks) // 3)) - 1]) as seen:
                losses = self.objective(model, images, labels, times, noise, until)
            apart = self.apart(seen[-1], images)
        self.remember(losses, times)
        loss = (losses if until is None else balanced(losses, images[0].numel())).mean() + apart
        self.log("train/loss", self.checked(loss * 0.0 if empty else loss))
        return loss * 0.0 if empty else loss

    def apart(self, seen: tuple[Tensor, Context], images: Tensor) -> Tensor:
        """The weighted loss of a block's output to the teacher's features of the images without noise."""
        (tokens, context), preprocess = seen, self.data.preprocess
        assert self.alignment is not None
        given = (preprocess.mean, preprocess.std, *default_statistics(preprocess.channels))
        mean, std, wanted, spread = (images.new_tensor(each)[:, None, None] for each in given)
        shown = (images.float() * std + mean - wanted) / spread
        if self.teacher_size:
            shown = F.interpolate(shown, (self.teacher_size,) * 2, mode="bicubic", antialias=True)
        loss = self.alignment(tokens[:, context.prefix :], context.grid, context.grid_mask, shown)
        self.log("train/alignment", loss.detach())
        return self.alignment_weight * loss

    def remember(self, losses: Tensor, times: Tensor) -> None:
        """Notes the part of 0..1 in which a loss is NaN or infinite, for the error."""
        bad = ~losses.detach().isfinite()
        first = (times[bad.int().argmax()] * BUCKETS).long().clamp(max=BUCKETS - 1)
        self.bucket = torch.where(bad.any() & (self.bucket < 0), first, self.bucket)

    def where(self) -> str:
        if (bucket := int(self.bucket)) < 0:
            return ""
        return f", at times {bucket / BUCKETS:g} to {(bucket + 1) / BUCKETS:g}"

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.report("training")

    def on_validation_epoch_start(self) -> None:
        self.seen = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(map(UNREADABLE.format, batch.skipped), self.faulty[0], "validation")
        images, number = batch.images, len(batch.images)
        if number == 0:
            return
        # A sample's noise depends on its place alone; its part of 0..1 is its place modulo their number.
        places = [(self.seen + index) * self.trainer.world_size + self.global_rank for index in range(number)]
        self.seen += number
        noise = Noise(0, places, images.shape[1:], images.device)()
        shares = torch.special.ndtr(Noise(1, places, (), images.device)())
        buckets = torch.tensor(places, device=images.device) % BUCKETS
        times = (buckets + shares) / BUCKETS
        config: Any = self.config
        schedule = SCHEDULES[config.schedule]
        if schedule.steps:
            times = ((times * schedule.steps).floor() + 1).clamp(max=schedule.steps) / schedule.steps
        losses = self.objective(self.measured, images, self.labels_of(batch), times, noise)
        self.losses.update(losses, buckets)

    def on_validation_epoch_end(self) -> None:
        self.report("validation")
        sums, counts = self.losses.compute()
        self.losses.reset()
        if not self.trainer.sanity_checking:
            self.conclude((sums / counts).tolist(), int(counts.sum()))
        if self.fitting and self.show:
            self.draw(self.alone())

    def conclude(self, means: list[float], number: int) -> None:
        """Logs the mean loss of each part of 0..1, and the mean of these, and says it."""
        if number == 0:
            raise ValueError("no image of the validation set could be read")
        part, known = "test" if self.trainer.testing else "val", [each for each in means if each == each]
        loss = sum(known) / len(known)
        self.log(f"{part}/loss", loss)
        self.log_dict({f"{part}/loss_{index}": value for index, value in enumerate(means) if value == value})
        self.said, self.figures = f"loss {loss:.4f} (n = {number})", [Measured("loss", "loss", number)]
        if self.trainer.state.fn != "fit":
            spans = [f"{each / BUCKETS:.3f} to {(each + 1) / BUCKETS:.3f}" for each in range(BUCKETS)]
            lines = [f"time {span}  {value:.4f}" for span, value in zip(spans, means, strict=True)]
            self.said = "\n".join([*lines, self.said])
            self.compare(part, self.alone())

    def alone(self) -> Any:
        """The measured model on the first rank, which uses it without the others."""
        whole = self.whole()
        return whole and whole.to(self.device)

    @rank_zero_only
    def compare(self, part: str, model: Any) -> None:
        """Draws samples of a model, logs how they compare with images, and says it."""
        if self.evaluator is None:
            return
        figures = self.evaluator.measure(model, self.data, part, self.output)
        for metric, values in figures.values.items():
            named = {f"{part}/{metric}_{column}": value for column, value in values.items()}
            self.log_dict(named, rank_zero_only=True)
        self.figures += figures.all()
        self.said = "\n".join([self.said, *figures.lines()])

    @rank_zero_only
    def draw(self, model: Any) -> None:
        """Draws a grid of samples of a model, a row for each class, as samples/NUMBER.png in the run's folder."""
        if not self.drawable:
            return None
        preprocess = self.data.preprocess
        if self.decoder is None:
            try:
                self.decoder = decoder_for(preprocess)
                if self.decoder is not None:
                    self.decoder.to(self.device)
            except ValueError as error:
                self.drawable = False
                return rank_zero_info(f"no samples are drawn: {error}")
        config: Any = self.config
        rows = min(MOST, config.classes) or 1
        labels = None
        if config.classes:
            labels = torch.arange(rows, device=self.device).repeat_interleave(self.show)
        side = (preprocess.size,) * 2
        guidance = self.guidance if config.classes else None
        indices = range(rows * self.show)
        training = model.training
        try:
            made = sample(model.eval(), labels, indices, side, steps=self.steps, guidance=guidance)
        finally:
            model.train(training)
        image = grid(to_bytes(made.x, preprocess, self.decoder), self.show)
        folder = Path(self.trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.current_epoch + 1:05d}.png"
        with aside(folder) as made:
            image.save(made / name)
            os.replace(made / name, folder / name)
        for logger in self.trainer.loggers:
            if (add := getattr(getattr(logger, "experiment", None), "add_image", None)) is not None:  # TensorBoard
                add("samples", np.atleast_3d(np.asarray(image)), self.trainer.global_step, dataformats="HWC")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_epoch_start = on_validation_epoch_start
