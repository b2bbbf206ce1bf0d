"""Samples beside real images: the figures of a trained generator, and those of real images in place of samples."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm import tqdm

from zoo.aside import aside
from zoo.data.generation import WholeImages
from zoo.data.images import as_it_is
from zoo.data.loading import make_loader
from zoo.inputs.latents import Autoencoder, LatentPreprocess
from zoo.models.convolutional import TIMM
from zoo.outputs.samplers import Guidance, times_of, usual
from zoo.tasks.generate.features import classifier_of, features_of
from zoo.tasks.generate.images import decoder_for, drawn, grid, to_bytes
from zoo.tasks.generate.metrics import (
    agreement,
    frechet_distance,
    kernel_distance,
    matched,
    near_copies,
    neighbour_accuracy,
    spread,
)
from zoo.tasks.intervals import Measured, wilson
from zoo.text import counted, one_line, reason

RECORD = "figures.json"
SHOWN = 100  # samples in a grid
MOST = 50_000  # images of a split that are read, evenly spread
MEMORY = 2**31  # bytes of their features
SHARES = ("agreement", "neighbours", "near_copies")  # metrics that are a share of images


class Seen(NamedTuple):
    """Features [N, D] and labels [N] of images, the classes [N] that a classifier reads in them, or None, and the
    features [N, D] of their mirror images, or None."""

    features: Tensor
    labels: Tensor
    read: Tensor | None = None
    mirrored: Tensor | None = None


@dataclass
class Figures:
    """The values of each metric, by column, and why a metric has none."""

    facts: dict[str, Any]
    titles: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)

    def add(self, metric: str, title: str, value: Callable[[Any], float], columns: dict[str, Seen]) -> None:
        """Adds a metric's value of the images of each column, or why it has none."""
        self.titles[metric] = title
        try:
            self.values[metric] = {column: value(images) for column, images in columns.items()}
        except ValueError as error:
            self.omitted[metric] = one_line(error)

    def all(self) -> list[Measured]:
        """Each value by itself; shares with an interval."""
        facts, found = self.facts, []
        for metric, values in self.values.items():
            for column, value in values.items():
                number = facts["samples"] if column != "real" else min(facts["samples"], facts["training"])
                if metric == "neighbours" or (column == "real" and metric in SHARES):
                    number = facts["held_out"]
                share = wilson(round(value * number), number) if metric in SHARES else None
                what = "real images" if column == "real" else f"{column} samples"
                found.append(Measured(f"{metric}_{column}", f"{self.titles[metric]}, {what}", number, share))
        return found

    def lines(self) -> list[str]:
        """How samples were made, and a line for each metric."""
        facts, columns = self.facts, [*next(iter(self.values.values()))]
        guided = f", guidance {facts['guidance']:g}" if "guided" in columns else ""
        made = f"{facts['sampler']}, {counted(facts['steps'], 'step')}, seed {facts['seed']}{guided}"
        left = max(map(len, (self.titles[metric] for metric in self.values)))
        lines = [f"{facts['samples']} samples: {made}", " " * left + "".join(f"{each:>10}" for each in columns)]
        for metric, title in self.titles.items():
            found = self.values.get(metric, {})
            row = title.ljust(left) + "".join(f"{found[each]:10.4f}" for each in columns if found)
            lines.append(row if found else f"{title}: omitted; {self.omitted[metric]}")
        held, training = (read_of(facts[each], facts["all"][each]) for each in ("held_out", "training"))
        decoded = ", decoded from their latents" if facts["decoder"] else ""
        most = min(facts["samples"], facts["training"])
        real = f"real: the {held} held-out images{decoded}, in place of samples, or {most} of the {training} training"
        return [*lines, f"{real} images"]


class Evaluator:
    """What measures samples.

    Args:
        number: how many samples are drawn.
        steps: steps of the sampler.
        seed: chooses the noise.
        guidance: of the guided samples; others are drawn without guidance.
        features: a checkpoint or timm:NAME, whose features are compared; None for pixels, without distances.
        classifier: a checkpoint that reads the classes of samples; None for that of `features`, if it knows them.
        classes: names of the classes of samples; none for a model without classes.

    Raises:
        ValueError: a model cannot be used, the classifier lacks a class, or there are fewer samples than classes.
    """

    def __init__(
        self,
        number: int,
        steps: int,
        seed: int,
        guidance: Guidance,
        features: str | None,
        classifier: str | None,
        classes: Sequence[str],
    ) -> None:
        if number < (least := max(2, len(classes))):
            raise ValueError(f"model.samples must be 0 or at least {least}, one of each class, got {number}")
        if classifier is not None and not classes:
            raise ValueError("model.classifier: this model has no classes")
        self.number, self.steps, self.seed, self.guidance = number, steps, seed, guidance.scale
        self.guidances = {"plain": Guidance()}
        if classes and guidance.scale != 1.0:
            self.guidances = {"guided": guidance, "plain": Guidance()}
        self.features, self.classifier = features_of(features), None
        self.places, self.unread = torch.zeros(0), ""
        self.decoder: Autoencoder | None = None
        try:
            own = features if features is not None and not features.startswith(TIMM) else None
            if classes and (name := classifier or own):
                reader = classifier_of(name)
                self.places, self.classifier = matched(classes, reader.names, name), reader
        except ValueError as error:
            if classifier is not None:
                raise ValueError(f"model.classifier: {error}") from None
            self.unread = str(error)

    def see(self, values: Tensor, labels: Tensor, batch: int, read: bool = True, mirror: bool = False) -> Seen:
        """8-bit images uint8 [N, H, W, channels] as features and classes, and if `mirror`, the features of their mirror
        images."""
        parts, classes, mirrored = values.split(batch), None, None
        if read and self.classifier is not None:
            classes = torch.cat([self.classifier(part).argmax(1) for part in parts])
        if mirror:
            mirrored = torch.cat([self.features(part.flip(2)) for part in parts])
        return Seen(torch.cat([self.features(part) for part in parts]), labels, classes, mirrored)

    def real(self, data: WholeImages, split: str, number: int, watch: Callable[[], Any]) -> Seen:
        """So many images of a split, evenly spread, that can be read. Those of `train` are not read by the classifier,
        but are seen mirrored too if training flips images."""
        dataset, train = data.plain(split), split == "train"
        keys = [(0, index) for index in spread(number, len(dataset)).tolist()]
        batches = BatchSampler(keys, data.batch, False)  # pyright: ignore
        seen: list[Seen] = []
        for batch in make_loader(dataset, batches, as_it_is, data.processes(data.dataset in data.folders)):
            if len(batch.images):
                values = to_bytes(batch.images, data.preprocess, self.decoder)
                seen.append(self.see(values, batch.labels, data.batch, not train, train and data.flip > 0))
            watch()
        if not seen:
            raise ValueError(f"no image of split '{split}' could be read")
        return Seen(*(None if each[0] is None else torch.cat(each) for each in zip(*seen, strict=True)))  # pyright: ignore

    def width(self, preprocess: Any) -> int:
        """How many features an image has."""
        factor = preprocess.factor if isinstance(preprocess, LatentPreprocess) else 1
        channels = preprocess.channels if self.decoder is None else self.decoder.colours
        side = preprocess.size * factor
        return self.features(torch.zeros(1, side, side, channels, dtype=torch.uint8)).shape[1]

    def measure(self, model: Any, data: WholeImages, split: str, output: Path) -> Figures:
        """Draws samples of a model in eval mode, with the classes of the images of the split in their shares, and
        compares them with these. Writes the figures as JSON, and a grid of each kind of samples.

        Raises:
            ValueError: too few samples for a metric, or they are NaN or infinite.
            OSError: a file cannot be written.
        """
        device, side = next(model.parameters()).device, data.preprocess.size
        self.decoder = decoder_for(data.preprocess)
        if self.decoder is not None:
            self.decoder.to(device)
        self.features.to(device)
        if self.classifier is not None:
            self.classifier.to(device)
        steps = len(times_of(model.config, self.steps)) - 1
        width = self.width(data.preprocess)
        most = min(MOST, max(1, MEMORY // (4 * width)))
        sizes = {each: len(data.source(each).labels) for each in ("train", split)}
        numbers = {each: min(most, size) for each, size in sizes.items()}
        if self.features.model is not None and self.number <= width < min(numbers.values()):
            needed = f"the Frechet distance of {width} features"
            raise ValueError(f"model.samples must be > {width} for {needed}, got {self.number}")
        total = sum(math.ceil(number / data.batch) for number in numbers.values())
        total += math.ceil(self.number / data.batch) * steps * len(self.guidances)
        seen, grids, evaluations, size = dict[str, Seen](), dict[str, Any](), dict[str, int](), list[int]()
        with tqdm(total=total, desc="samples", unit="step", ncols=79, leave=False, disable=None) as bar:
            training, held = (self.real(data, each, numbers[each], bar.update) for each in ("train", split))
            labels = held.labels.sort().values[spread(self.number, len(held.labels))]
            asked = labels.tolist() if model.config.classes else None
            for column, guidance in self.guidances.items():
                options: dict[str, Any] = {"seed": self.seed, "steps": self.steps, "guidance": guidance}
                values, evaluations[column] = drawn(
                    model,
                    data.preprocess,
                    asked,
                    self.number,
                    (side, side),
                    data.batch,
                    bar.update,
                    self.decoder,
                    **options,
                )
                grids[column] = grid(values[spread(min(SHOWN, self.number), self.number)], 10)
                seen[column], size = self.see(values, labels, data.batch), list(values.shape[1:3])
        facts = {
            "samples": self.number,
            "sampler": usual(model.config),
            "steps": steps,
            "evaluations": evaluations,
            "seed": self.seed,
            "guidance": self.guidance,
            "size": size,
            "features": self.features.name,
            "classifier": None if self.classifier is None else self.classifier.name,
            "data": data.dataset,
            "split": split,
            "held_out": len(held.labels),
            "training": len(training.labels),
            "all": {"held_out": sizes[split], "training": sizes["train"]},
            "mirrored": training.mirrored is not None,
            "decoder": self.decoder and self.decoder.name,
        }
        figures = self.compare(Figures(facts), seen, training, held, asked is not None)
        write(output, figures, grids)
        return figures

    def compare(self, figures: Figures, seen: dict[str, Seen], training: Seen, held: Seen, labelled: bool) -> Figures:
        """Adds each metric: of samples, and as `real` of held-out images, or of as many training images where samples
        are compared with held-out ones."""
        name, number = self.features.name, min(self.number, len(training.labels))
        drawn_or_held = seen | {"real": held}
        drawn_or_training = {key: thinned(each, number) for key, each in (seen | {"real": training}).items()}
        if self.unread:
            figures.titles["agreement"], figures.omitted["agreement"] = "classifier agreement", self.unread
        if self.classifier is not None:
            figures.add(
                "agreement",
                f"classifier agreement ({self.classifier.name})",
                lambda each: agreement(each.read, self.places[each.labels]),
                drawn_or_held,
            )
        if labelled:
            figures.add(
                "neighbours",
                f"neighbour classifier ({name})",
                lambda each: neighbour_accuracy(each.features, each.labels, held.features, held.labels),
                drawn_or_training,
            )
        if self.features.model is not None:
            title = f"Frechet distance (features of {name})"
            figures.add(
                "frechet", title, lambda each: frechet_distance(each.features, held.features), drawn_or_training
            )
            title = f"kernel distance (features of {name})"
            figures.add("kernel", title, lambda each: kernel_distance(each.features, held.features), drawn_or_training)
        known, title = training.features, "near copies of training images"
        if training.mirrored is not None:
            known, title = torch.cat([known, training.mirrored]), f"{title} or their mirror images"
        figures.add(
            "near_copies",
            f"{title} ({name})",
            lambda each: near_copies(each.features, known, held.features),
            drawn_or_held,
        )
        return figures


def read_of(number: int, total: int) -> str:
    """How many of all images were read."""
    return f"{number}" if number == total else f"{number} of {total}"


def thinned(seen: Seen, number: int) -> Seen:
    """So many of the images, evenly spread."""
    chosen = spread(number, len(seen.labels))
    return Seen(seen.features[chosen], seen.labels[chosen])


def write(output: Path, figures: Figures, grids: dict[str, Any]) -> None:
    """Writes figures.json and the grids, aside and renamed; OSError if that is not possible."""
    known = figures.facts | {"figures": figures.values, "omitted": figures.omitted}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with aside(output) as folder:
            for name, image in grids.items():
                image.save(folder / f"{name}.png")
            (folder / RECORD).write_text(json.dumps(known, indent=2, ensure_ascii=False), encoding="utf-8")
            for file in sorted(os.listdir(folder)):
                os.replace(folder / file, output / file)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error
