"""Trains small vision transformers on handwritten digits, compares them, and shows predictions of one of them."""

import argparse
import contextlib
import csv
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import zoo
from zoo.__main__ import main as command
from zoo.data.images import Images
from zoo.models.base import count_parameters
from zoo.tasks.intervals import wilson

CONFIG = "configs/classify/vit_micro_digits.yaml"
SIZE = {"dim": 64, "depth": 4, "heads": 4, "patch": 8}
VARIANTS = {
    "softmax": {"mixer": "softmax", "norm": "layernorm"},
    "sla_prepbn": {"mixer": "sla", "norm": "prepbn"},
    "dcnv4": {"mixer": "dcnv4", "norm": "layernorm"},
}


class Console:
    """Standard error without the commands that a single run proposes, because the demo itself is what to call next."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.dropped = stream, False

    def write(self, text: str) -> None:
        if text == "next" or text.startswith("  zoo ") or (text == "\n" and self.dropped):
            self.dropped = text != "\n"
            return
        self.dropped = False
        self.stream.write(re.sub("; resume with: zoo .*", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def train(name: str, folder: Path, epochs: int) -> None:
    """Trains one variant, or resumes it where an earlier call was stopped."""
    state = folder / "resume/last.ckpt"
    resumed = state.exists() and not (folder / "finished").exists()
    if folder.exists() and not resumed:
        shutil.rmtree(folder)
    choices = SIZE | VARIANTS[name]
    arguments = ["classify", "fit", "--config", CONFIG, f"--trainer.max_epochs={epochs}"]
    arguments += [f"--trainer.default_root_dir={folder}"]
    arguments += ["--model.rate=3e-3", "--data.scale=[1.0,1.0]"]
    arguments += [f"--model.backbone.{field}={value}" for field, value in choices.items()]
    if resumed:
        arguments.append(f"--ckpt_path={state}")
    print(f"\n{name}: {', '.join(f'{field}={value}' for field, value in choices.items())}", file=sys.stderr)
    with contextlib.redirect_stderr(Console(sys.stderr)):
        command(arguments)
    (folder / "finished").touch()


def curve(folder: Path) -> list[float]:
    """The accuracy after each epoch, over all the parts in which a run was made."""
    values: dict[int, float] = {}
    for path in sorted((folder / "csv").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        for row in csv.DictReader(path.open()):
            if row.get("val/accuracy"):
                values[int(row["epoch"])] = float(row["val/accuracy"])
    return [value for _, value in sorted(values.items())]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: Images) -> tuple[int, int]:
    """How many of the held-out digits are classified correctly, and of how many."""
    batches = list(data.val_dataloader())
    correct = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in batches)
    return correct, sum(len(batch.labels) for batch in batches)


@torch.inference_mode()
def speeds(models: list[torch.nn.Module], images: torch.Tensor, rounds: int = 15) -> list[float]:
    """Images per second of CPU time, the models taking turns: medians."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 2):
        for model, seconds in zip(models, times, strict=True):
            start = time.process_time()
            model(images)
            if turn >= 2:
                seconds.append(time.process_time() - start)
    return [len(images) / statistics.median(seconds) for seconds in times]


def measure(folder: Path, data: Images) -> dict[str, str]:
    """Loads the trained checkpoint, checks its probe, fuses it, and measures both."""
    model = zoo.load_model(folder / "last", check=True)
    fused = zoo.fuse(model)
    batch = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        apart = (fused(batch.images) - model(batch.images)).abs().max().item()
    correct, number = accuracy(model, data)
    low, high = wilson(correct, number)
    before, after = speeds([model, fused], batch.images)
    return {
        "variant": folder.name,
        "accuracy": f"{correct / number:.3f}",
        "n": str(number),
        "95 % interval": f"{low:.3f} to {high:.3f}",
        "parameters": f"{count_parameters(model):,}",
        "images/s": f"{before:.0f}",
        "images/s fused": f"{after:.0f}",
        "norms folded": str(sum(fold.into is not None for fold in fused.fusion)),
        "largest change": f"{apart:.0e}",
    }


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The accuracy of each variant after each epoch."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=f"{name} ({values[-1]:.3f})")
    axes.set(xlabel="epoch", ylabel="accuracy on held-out digits", ylim=(0, 1.02))
    axes.set_title("Handwritten digits: the same transformer with other parts", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    given = parser.parse_args()
    try:
        show(given.output, given.epochs)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (130, 143):
            print("scripts/demo was stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(code)


def show(output: Path, epochs: int) -> None:
    """Trains, compares and draws everything below the folder `output`; ends the process if a score is too low."""
    print("About 3 minutes on an idle machine with two cores, and longer on a busy one.", file=sys.stderr)
    for name in VARIANTS:
        train(name, output / name, epochs)

    data = Images(dataset="digits", size=32, crop=1.0)
    rows = [measure(output / name, data) for name in VARIANTS]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])] + [" | ".join(row.values()) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    note = f"images/s: batch 64, CPU time, float32, eager, {torch.get_num_threads()} threads, medians of turns\n"
    (output / "table.md").write_text(f"{table}\n\n{note}")
    draw({name: curve(output / name) for name in VARIANTS}, output / "accuracy.png")

    samples = output / "digits"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    source = Images(dataset="digits", size=8, crop=1.0).source("val")  # as they are stored, 8 x 8
    for index, label in enumerate(source.labels[:24]):
        source.image(index).save(samples / f"digit_{index:02}_is_{source.classes[label]}.png")
    command(["classify", "predict", str(output / "sla_prepbn/last"), str(samples), f"--output={output}"])

    print(f"\n{table}\n\n{note}\nimages: {output}/accuracy.png, {output}/predictions.png")
    if low := [row["variant"] for row in rows if epochs >= 30 and float(row["accuracy"]) < 0.95]:
        sys.exit(f"below the expected accuracy of 0.95: {', '.join(low)}")


if __name__ == "__main__":
    main()
