"""Classes of an image, and a map of what speaks for the first one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zoo.tasks.app.shelf import Shelf
from zoo.tasks.app.sides import Side, answered, note, timing, unchanged

if TYPE_CHECKING:
    from PIL.Image import Image

TOP = 5  # classes that are shown


def ask(
    shelf: Shelf, path: str, name: str, fused: bool, mapped: bool
) -> Iterator[tuple[list[dict[str, Any]], float, Image | None]]:
    """The most probable classes of an image, as `zoo classify predict` writes them, and the milliseconds; first without
    the map, then with it if it is asked for."""
    from zoo.tasks.app.contributions import contributions, drawn
    from zoo.tasks.classify.answers import classifier

    found = shelf.take("classify", name, fused)
    answer = classifier(found, TOP, device=shelf.device)
    image = answer.preprocess.read(path)
    prepared = answer.preprocess(image)
    (best,), milliseconds = shelf.timed(lambda: answer([prepared]))
    if isinstance(best, Exception):
        raise best
    yield best, milliseconds, None
    if mapped:
        ask_once = (lambda: contributions(answer.logits, prepared, best[0]["index"]), False)
        values, _ = shelf.timed(*ask_once)
        yield best, milliseconds, drawn(values, answer.preprocess.cut(image))


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""

    def handle(path: str, name: str, fused: bool, mapped: bool) -> Iterator[tuple[Any, ...]]:
        for best, milliseconds, image in ask(shelf, path, name, fused, mapped):
            confidences = {each["label"]: each["probability"] for each in best}
            yield note(timing(milliseconds, fused)), confidences, gr.Image(image, visible=mapped)

    with gr.Row():
        with gr.Column(scale=2):
            sources = ["upload", "webcam", "clipboard"]
            image = unchanged(gr.Image(label="Image", type="filepath", sources=sources, height=320))
            mapped = gr.Checkbox(True, label="Map of contributions")
            gr.Markdown(
                "Red parts speak for the first class, blue parts against it: where one is hidden, its log odds fall or rise."
            )
        for side in sides:
            with gr.Column(scale=2, visible=not side.columns or side is sides[0]) as column:
                classes = gr.Label(label="Classes", num_top_classes=TOP)
                told = gr.HTML()
                shown = gr.Image(label="Map", interactive=False, format="png", height=320)
            side.columns.append(column)
            gr.on(
                [image.change, side.name.change, side.fused.change, mapped.change],
                answered(handle, (None, None)),
                [image, side.name, side.fused, mapped],
                [told, classes, shown],
                trigger_mode="always_last",
                concurrency_limit=None,
                api_name=False,
            )
