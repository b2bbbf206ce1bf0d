"""Classes of an image, and a map of the parts that support the first one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.tasks.app.shelf import Shelf, Took
from zoo.tasks.app.sides import BUTTONS, Side, answered, asked, note, timing, unchanged

if TYPE_CHECKING:
    from PIL.Image import Image

TOP = 5  # classes that are shown
MEANING = "Red parts support the first class, blue parts oppose it: hiding them lowers or raises its log odds."


def ask(
    shelf: Shelf, path: str, name: str, fused: bool, mapped: bool
) -> Iterator[tuple[list[dict[str, Any]], Took, Image | None]]:
    """The most probable classes of an image, as `zoo classify predict` writes them, and how long that took; first
    without the map, then with it if it is asked for."""
    from zoo.tasks.app.contributions import contributions
    from zoo.tasks.classify.answers import classifier
    from zoo.tasks.maps import drawn, seen

    answer = classifier(shelf.take("classify", name, fused), TOP, device=shelf.device)
    image = answer.preprocess.read(path)
    prepared = answer.preprocess(image)
    (best,), took = shelf.timed(lambda: answer([prepared]))
    if isinstance(best, Exception):
        raise best
    yield best, took, None
    if mapped:
        index = best[0]["index"]
        values, _ = shelf.timed(lambda: contributions(answer.logits, prepared, index), repeat=False)
        yield best, took, drawn(values, seen(answer.preprocess, image))


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""

    def handle(path: str, name: str, fused: bool, mapped: bool) -> Iterator[tuple[Any, ...]]:
        for best, took, image in ask(shelf, path, name, fused, mapped):
            confidences = {each["label"]: each["probability"] for each in best}
            yield note(name, timing(took, fused)), confidences, gr.Image(image, visible=mapped)

    with gr.Row():
        with gr.Column(scale=2):
            sources = ["upload", "webcam", "clipboard"]
            image = gr.Image(
                label="Image", type="filepath", sources=sources, height=320, buttons=BUTTONS, elem_id="classify_input"
            )
            mapped = gr.Checkbox(True, label="Contribution map", info=MEANING)
        for side in sides:
            with side.column(gr, "classify"):
                told = gr.HTML()
                classes = gr.Label(label="Classes", num_top_classes=TOP, show_heading=True)
                shown = gr.Image(
                    label="Map", show_label=False, interactive=False, format="png", height=320, buttons=BUTTONS
                )
            asked(
                gr,
                [image.change, mapped.change],
                side,
                answered(handle, (None, None)),
                [unchanged(image), mapped],
                [told, classes, shown],
            )
