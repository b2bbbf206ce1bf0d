"""Objects of an image, of which those above a threshold are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.tasks.app.shelf import Shelf, Took
from zoo.tasks.app.sides import BUTTONS, Side, answered, asked, between, fault, note, timing, unchanged

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLD, TOP = 0.3, 100  # as in `zoo detect predict`
SIDE, LINES = 1600, 36  # pixels of the longer side of what is shown, and the lines of text that fit into it


def ask(shelf: Shelf, path: str, name: str, fused: bool) -> tuple[list[dict[str, Any]], Took, Any]:
    """The objects of an image with any score, as `zoo detect predict` writes them, how long that took, and the names of
    the model's categories."""
    from zoo.tasks.detect.answers import detector

    answer = detector(shelf.take("detect", name, fused), 0.0, TOP, device=shelf.device)
    parts = [*answer.preprocess.parts(answer.preprocess.read(path))]
    (objects,), took = shelf.timed(lambda: answer(parts))
    if isinstance(objects, Exception):
        raise objects
    return objects, took, answer.labels


def above(objects: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """The objects of at least this score."""
    return [each for each in objects if each["score"] >= threshold]


def drawn(path: str, objects: list[dict[str, Any]], labels: Any) -> Image:
    """The image of a file with its objects, at most `SIDE` pixels long."""
    from zoo.inputs.images import read_image
    from zoo.tasks.detect.answers import colours_of
    from zoo.tasks.detect.videos import annotated

    image = read_image(path)
    width = image.width
    image.thumbnail((SIDE, SIDE))
    share = image.width / width
    scaled = [each | {"box": [edge * share for edge in each["box"]]} for each in objects]
    return annotated(image, scaled, colours_of(labels), LINES)


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""
    from zoo.tasks.detect.answers import summary

    def handle(path: str, name: str, fused: bool, threshold: float | None) -> Iterator[tuple[Any, ...]]:
        objects, took, labels = ask(shelf, path, name, fused)
        known = path, name, fused, objects, took, labels
        yield *shown(known, threshold), known

    def shown(known: tuple[Any, ...] | None, threshold: float | None) -> tuple[Any, Any]:
        if known is None:
            return gr.skip(), gr.skip()
        path, name, fused, objects, took, labels = known
        try:
            kept = above(objects, between(threshold, "threshold", 0, 1))
            return note(name, timing(took, fused), summary(kept)), drawn(path, kept, labels)
        except Exception as error:  # as in `answered`
            return fault(error, path), None

    with gr.Row():
        with gr.Column(scale=2):
            sources = ["upload", "webcam", "clipboard"]
            image = gr.Image(
                label="Image", type="filepath", sources=sources, height=320, buttons=BUTTONS, elem_id="detect_input"
            )
            threshold = gr.Slider(
                0,
                1,
                THRESHOLD,
                step=0.01,
                label="Threshold",
                info="Least score of a drawn object",
                elem_id="detect_threshold",
            )
        for side in sides:
            with side.column(gr, "detect"):
                told = gr.HTML()
                boxes = gr.Image(label="Objects", show_label=False, interactive=False, format="png", buttons=BUTTONS)
                known = gr.State()
            asked(
                gr,
                [image.change],
                side,
                answered(handle, (None, None)),
                [unchanged(image), unchanged(threshold)],
                [told, boxes, known],
            )
            threshold.change(
                shown,
                [known, threshold],
                [told, boxes],
                trigger_mode="always_last",
                concurrency_limit=None,
                show_progress="hidden",
                api_visibility="private",
            )
