"""checkpoints/NAME/gallery.png, one picture a checkpoint, and the gallery of README.md.

No picture holds data of others: it shows what the model made, its answers on scikit-learn's digits, on what another
checkpoint drew or a speech synthesizer said, or else its figures.
"""

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from generate import checkpoints

FILE = "gallery.png"
LARGEST = 60_000  # bytes
SIZE, DPI = (3.0, 2.0), 100  # inches, pixels an inch
COLUMNS = 3  # of the gallery
START, END = "<!--gallery-->\n", "<!--/gallery-->\n"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SENTENCE, VOICE = "january sixteen nineteen eighty four", "kal16"  # of flite
INK, GREY, TRACK, BAR, WRONG = "#1f2933", "#7b8794", "#d9dee3", "#2f6fb5", "#b3392f"

Configs = Mapping[str, Mapping[str, Any]]  # the config.json of each checkpoint
Draw = Callable[[Configs, str, Any], str | None]  # draws a checkpoint on a figure; what is shown, None if it cannot


def made_for(config: Mapping[str, Any]) -> str:
    """What a picture depends on: the weights, the preprocess, the labels and the figures of a checkpoint."""
    parts = [config["files"]["model.safetensors"]["sha256"], *(config[key] for key in ("preprocess", "labels"))]
    return hashlib.sha256(json.dumps([*parts, config["figures"]], sort_keys=True).encode()).hexdigest()


def notes(path: Path) -> dict[str, str]:
    """The PNG text fields of a picture, `Description` and `Made for`; empty if the file does not exist."""
    from PIL import Image

    if not path.exists():
        return {}
    with Image.open(path) as image:
        return {str(key): str(text) for key, text in image.info.items()}


def stale(root: Path) -> list[Path]:
    """The pictures that are missing, or were made for other weights or figures."""
    paths = {root / "checkpoints" / name / FILE: config for name, config in checkpoints.configs(root).items()}
    return [path for path, config in paths.items() if notes(path).get("Made for") != made_for(config)]


def picture(known: Configs, name: str) -> bytes:
    """The PNG of a checkpoint."""
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    figure = Figure(SIZE, dpi=DPI, facecolor="white")
    shown = PICTURES.get(task_of(known[name]), bars)(known, name, figure) or bars(known, name, figure)
    drawn, made, texts = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn)
    texts.add_text("Description", shown)
    texts.add_text("Made for", made_for(known[name]))
    Image.open(drawn).convert("RGB").quantize(256).save(made, "png", optimize=True, pnginfo=texts)
    if len(contents := made.getvalue()) > LARGEST:
        raise ValueError(f"the picture of {name} takes {len(contents):,} bytes, and {LARGEST:,} are allowed")
    return contents


def task_of(config: Mapping[str, Any]) -> str | None:
    from zoo.models import FAMILIES

    return FAMILIES[config["family"]].task


def bars(known: Configs, name: str, figure: Any) -> str:
    """The figures, with their 95 % intervals."""
    found = [each for each in known[name]["figures"] if 0 <= each["value"] <= 1][:3]
    axes = figure.add_axes((0.06, 0.16, 0.88, 0.8))
    for row, each in enumerate(found):
        axes.barh(-row, 1, height=0.32, color=TRACK)
        axes.barh(-row, each["value"], height=0.32, color=BAR)
        if (interval := each["interval"]) is not None:
            axes.plot(interval, [-row, -row], color=INK, lw=1.5, marker="|", markersize=7)
        axes.text(0, 0.24 - row, each["metric"], fontsize=8, color=INK, parse_math=False)
        axes.text(1, 0.24 - row, f"{each['value']:.3f}", fontsize=8, color=INK, ha="right")
    axes.set(xlim=(0, 1), ylim=(-len(found) + 0.6, 0.6))
    axes.axis("off")
    data = found[0]
    caption(figure, f"{data['data']}, {data['split']}" + f", n = {data['n']}" * bool(data["n"]) + "; 95 % intervals")
    return "Bars of the figures with their 95 % intervals"


def caption(figure: Any, text: str) -> None:
    figure.text(0.5, 0.03, text, ha="center", fontsize=7, color=GREY, parse_math=False)


def sampled(known: Configs, name: str, each: int) -> tuple[Any, list[str]]:
    """Images uint8 [N, H, W, 3] of all classes, so many of each, as the first figure's command draws them; and their
    classes."""
    import numpy as np

    from zoo.__main__ import main

    command = known[name]["figures"][0]["command"]
    options = [f"--{key}={value}" for key, value in re.findall(r"--(guidance|steps) (\S+)", command)]
    with tempfile.TemporaryDirectory() as folder:
        main(["generate", "sample", name, f"--each={each}", f"--output={folder}", "--device=cpu", *options])
        made = json.loads(Path(folder, "samples.json").read_text(encoding="utf-8"))["samples"]
        return np.load(Path(folder, "samples.npz"))["arr_0"], [str(one["class"]) for one in made]


def generate(known: Configs, name: str, figure: Any) -> str:
    """Samples, a class a column."""
    images, labels = sampled(known, name, 5)
    classes = list(dict.fromkeys(labels))[:10]
    for column, label in enumerate(classes):
        for row, image in enumerate([one for one, of in zip(images, labels, strict=True) if of == label]):
            axes = figure.add_axes((0.02 + 0.096 * column, 0.82 - 0.165 * row, 0.092, 0.138))
            axes.imshow(image)
            axes.axis("off")
    caption(figure, "drawn by the model, one class a column")
    return "Images that the model drew, one class a column"


def classify(known: Configs, name: str, figure: Any) -> str | None:
    """Answers on held-out digits, or on what a generator of the same classes drew; None without either."""
    from PIL import Image

    import zoo

    config = known[name]
    if config["figures"][0]["data"] == "digits":
        from zoo.data.images import Images

        source = Images(dataset="digits", size=8, crop=1.0).source("val")  # as they are stored, 8 x 8
        images = [source.image(index) for index in range(10)]
        truths, what = [source.classes[source.labels[index]] for index in range(10)], "held-out digits"
    else:
        same = (other for other, found in known.items() if found["labels"] == config["labels"])
        if (other := next((each for each in same if task_of(known[each]) == "generate"), None)) is None:
            return None
        values, truths = sampled(known, other, 1)
        images, what = [Image.fromarray(value) for value in values[:10]], "generated images"
    model = zoo.load_checkpoint(name)
    for number, (image, truth) in enumerate(zip(images, truths, strict=False)):
        label, probability = model(image)[0]
        axes = figure.add_axes((0.02 + 0.196 * (number % 5), 0.6 - 0.42 * (number // 5), 0.176, 0.264))
        axes.imshow(image.convert("RGB"))
        axes.axis("off")
        axes.set_title(f"{label}\n{probability:.0%}", fontsize=7, pad=3, color=INK if label == truth else WRONG)
    caption(figure, f"{what}, and the answers; red: wrong")
    return f"Answers on {what}"


def transcribe(known: Configs, name: str, figure: Any) -> str:
    """Synthetic speech as spectrograms, with the words that were heard."""
    import soundfile
    from synthesis.voices import RATE, Voice

    import zoo
    from zoo.__main__ import main

    checkpoint: Any = zoo.load_checkpoint(name)
    digits = {each.strip("\u2581").lower() for each in checkpoint.labels.pieces} >= {*DIGITS}
    said = DIGITS if digits else [SENTENCE]
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(said):
            soundfile.write(Path(folder, f"{number}.wav"), Voice("flite", VOICE, 1.0, 1.0).say(text), RATE)
        main(["transcribe", "predict", name, folder, f"--output={folder}/out", "--device=cpu"])
        heard = json.loads(Path(folder, "out", "transcripts.json").read_text(encoding="utf-8"))
        sounds = [checkpoint.preprocess(f"{folder}/{number}.wav").numpy().T for number in range(len(said))]
    for number, (text, entry, sound) in enumerate(zip(said, heard, sounds, strict=True)):
        place = (0.02 + 0.196 * (number % 5), 0.62 - 0.44 * (number // 5), 0.176, 0.25)
        axes = figure.add_axes(place if digits else (0.03, 0.2, 0.94, 0.6))
        axes.imshow(sound, origin="lower", aspect="auto", cmap="magma", extent=(0, entry["seconds"], 0, 1))
        axes.axis("off")
        right = entry["text"].lower() == text
        if digits:
            axes.set_title(entry["text"].lower(), fontsize=7, pad=3, color=INK if right else WRONG)
        for lane, word in enumerate([] if digits else entry["words"] or []):
            y = (1.05, 1.2)[lane % 2]
            axes.text(word["start"], y, word["text"].lower(), fontsize=7, color=INK, parse_math=False)
            axes.plot([word["start"]] * 2, [0, y], color=INK, lw=0.6, clip_on=False)
    caption(figure, "spoken by flite, and what was heard; red: wrong" if digits else f"flite said “{SENTENCE}”")
    return "Spectrograms of synthetic speech, and what was heard"


# A detector has none: its images would be of others.
PICTURES: dict[str | None, Draw] = {"classify": classify, "generate": generate, "transcribe": transcribe}


def section(root: Path) -> str:
    """The gallery as a table of pictures, each with a link to its card, its name, first figure and size. Spaces do not
    break, so that the lines stay whole."""
    cells = []
    for name, config in checkpoints.configs(root).items():
        first, home = config["figures"][0], f"checkpoints/{name}"
        metric = re.sub(r" \(.*?\)", "", first["metric"])
        size = sum(each["size"] for each in config["files"].values()) / 1e6
        lines = [f"{metric} {first['value']:.4f}".replace(", ", ",<br>"), f"{size:.1f} MB"]
        text = "<br>".join(lines).replace(" ", "&nbsp;")
        cells.append(f"[![{name}]({home}/{FILE})]({home}/README.md)<br>{name}<br>{text}")
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    lines = [[""] * COLUMNS, ["---"] * COLUMNS, *rows]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def pictures(root: Path) -> dict[str, str]:
    """The pictures for checkpoints/README.md: an image by name of the checkpoint, with what it shows."""
    paths = {name: root / "checkpoints" / name / FILE for name in checkpoints.configs(root)}
    return {name: f"![{notes(path).get('Description', '')}]({name}/{FILE})" for name, path in paths.items()}


def readme(root: Path) -> str:
    """README.md with the gallery of these checkpoints."""
    before, _, rest = (root / "README.md").read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no {START.strip()} or no {END.strip()} after it")
    return f"{before}{START}\n{section(root)}\n{END}{after}"
