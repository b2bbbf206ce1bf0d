"""Images drawn by a diffusion model, in a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.tasks.app.shelf import Shelf, Took
from zoo.tasks.app.sides import BUTTONS, NOTHING, Side, between, fault, note, timing, unchanged
from zoo.text import counted

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 256  # images at once
EACH, STEPS, STRONGEST, SEEDS = 16, 250, 8, 10**9  # the most that can be asked for
USUAL = 50  # steps at first


class Cancelled(Exception):
    """A user asked to cancel."""


@dataclass
class Asked:
    """How often a user asked for images, and which of these times, and all before it, the user cancelled."""

    number: int = 0
    cancelled: int = 0

    def begin(self) -> None:
        self.number += 1

    def cancel(self) -> None:
        self.cancelled = self.number

    def watch(self, report: Callable[[int, int], Any]) -> Callable[[int, int], None]:
        """Calls `report` until what is asked for now is cancelled, also if it already is; then raises `Cancelled`."""
        number = self.number

        def step(done: int, total: int) -> None:
            if self.cancelled >= number:
                raise Cancelled
            report(done, total)

        return step


def starting(shelf: Shelf, name: str, steps: float | None) -> int | None:
    """The steps to start with when a checkpoint is chosen and there are `steps` now: 1 if it was made for that, and for
    others not the 1 of the one before; None to leave them."""
    from zoo.outputs.samplers import usual

    try:
        sampler = usual(shelf.take("generate", name, False).model.config)
    except Exception:  # of another task, or one that cannot be loaded, which is said elsewhere
        return None
    return 1 if sampler == "meanflow" else USUAL if steps == 1 else None


def ask(
    shelf: Shelf,
    name: str,
    fused: bool,
    classes: str,
    each: int,
    steps: int,
    guidance: float,
    seed: int,
    watch: Callable[[int, int], Any],
) -> tuple[Image, int, Took, str]:
    """The grid that `zoo generate sample` writes with these options, the number of its images, how long it took, and
    the sampler and its evaluations of the model in words. `watch` is called with the number of steps so far, from
    0 on, and of all; what it raises ends the drawing."""
    from zoo.tasks.generate import sample
    from zoo.tasks.generate.images import grid

    found = shelf.take("generate", name, fused)
    given = sample.parser().parse_args(["NAME"])  # the options that are not asked for have their defaults
    vars(given).update(classes=classes.strip() or None, each=each, steps=steps, guidance=guidance, seed=seed)
    plan = sample.planned(given, found, shelf.device)
    if (number := len(plan.wanted)) > MOST:
        raise ValueError(f"at most {MOST} images at once, and {number} were asked for; choose fewer classes or of each")
    done, total = 0, plan.batches * plan.steps

    def step() -> None:
        nonlocal done
        done += 1
        watch(done, total)

    def draw() -> tuple[Any, int]:
        watch(done, total)  # a question may have been cancelled while it waited for another
        return plan.draw(step)

    (values, evaluations), took = shelf.timed(draw, repeat=False)
    words = f"{plan.options['sampler']}, {counted(evaluations, 'evaluation')} an image"
    return grid(values, each), number, took, words


def panel(gr: Any, shelf: Shelf, sides: list[Side]) -> None:
    """The widgets, and what they do."""

    def start(name: str, steps: float | None) -> Any:
        found = starting(shelf, name, steps)
        return gr.skip() if found is None else found

    def handle(
        name: str,
        fused: bool,
        classes: str,
        each: float | None,
        steps: float | None,
        guidance: float | None,
        seed: float | None,
        asked: Asked,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any]:
        if name == NOTHING:
            return "", None
        try:
            given = (
                int(between(each, "images of each class", 1, EACH)),
                int(between(steps, "steps", 1, STEPS)),
                float(between(guidance, "guidance", 0, STRONGEST)),
                int(between(seed, "seed", 0, SEEDS)),
            )
            watch = asked.watch(lambda done, total: progress((done, total), unit="steps"))
            image, number, took, words = ask(shelf, name, fused, classes, *given, watch)
        except Cancelled:
            return note(name, "cancelled"), None
        except Exception as error:  # as in `answered`
            return fault(error), None
        return note(name, timing(took, fused), counted(number, "image"), words), image

    with gr.Row():
        with gr.Column(scale=2):
            classes = gr.Textbox(label="Classes", info="Names with commas between them; empty for all")
            each = gr.Slider(1, EACH, 8, step=1, label="Images of each class")
            first = starting(shelf, sides[0].name.value, USUAL) or USUAL
            steps = gr.Slider(1, STEPS, first, step=1, label="Steps", elem_id="generate_steps")
            guidance = gr.Slider(0, STRONGEST, 1, step=0.1, label="Guidance", info="1 for none")
            seed = gr.Number(0, label="Seed", precision=0, elem_id="generate_seed")
            asked = gr.State(Asked())  # of one user; the handlers share it
            button = gr.Button("Generate", variant="primary", elem_id="generate_button")
            cancel = gr.Button("Cancel", elem_id="generate_cancel")
            begun = button.click(Asked.begin, asked, queue=False, api_visibility="private")
            cancel.click(Asked.cancel, asked, queue=False, api_visibility="private")
        sides[0].name.change(
            start,
            [sides[0].name, unchanged(steps)],
            steps,
            trigger_mode="always_last",
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        for side in sides:
            with side.column(gr, "generate"):
                told = gr.HTML()
                grid = gr.Image(label="Samples", show_label=False, interactive=False, format="png", buttons=BUTTONS)
            begun.then(
                handle,
                [side.name, side.fused, classes, *map(unchanged, (each, steps, guidance, seed)), asked],
                [told, grid],
                trigger_mode="once",
                show_progress_on=grid,
                concurrency_limit=None,
                api_visibility="private",
            )
