"""The page of the app."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.themes import Default

from zoo.models.base import count_parameters
from zoo.tasks.app import classify, detect, generate, transcribe
from zoo.tasks.app.shelf import Shelf
from zoo.tasks.app.sides import NOTHING, Side, fault
from zoo.text import plain, reason

PANELS = {
    "classify": classify.panel,
    "detect": detect.panel,
    "transcribe": transcribe.panel,
    "generate": generate.panel,
}
LARGEST = 50 * 2**20  # bytes of an uploaded file
CLEANED = (600, 3600)  # seconds: how often files that were given or drawn are deleted, and from which age on
FONT = ("system-ui", "sans-serif")  # of the reader's machine: none is loaded
STYLE = """
.note, .about { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.about { opacity: 0.8; }
.fault { color: var(--error-text-color); margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.words { display: flex; flex-wrap: wrap; gap: 0.75em; margin: 0; padding: 0; list-style: none; }
.words small { display: block; opacity: 0.7; font-variant-numeric: tabular-nums; }
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""


def page(shelf: Shelf, tasks: Mapping[str, str], first: str) -> gr.Blocks:
    """The app.

    Args:
        shelf: loads and asks the checkpoints.
        tasks: the task of each checkpoint that is offered, by name.
        first: the one that is shown first.
    """
    names = [name for name, task in tasks.items() if task in PANELS]

    def choose(name: str, other: str) -> tuple[Any, ...]:
        """The panel of a checkpoint's task, and what can be compared with it."""
        try:
            task = tasks.get(name) or shelf.task(name)
            said = about(shelf, task, name)
        except Exception as error:  # as in `answered`
            return fault(error), gr.skip(), *[gr.skip()] * len(PANELS)
        alike = [NOTHING, *(each for each in names if tasks[each] == task)]
        kept = other if tasks.get(other, task) == task else NOTHING  # a name that was typed is kept
        return said, gr.Dropdown(alike, value=kept), *(gr.Column(visible=each == task) for each in PANELS)

    with gr.Blocks(title="zoo", analytics_enabled=False, delete_cache=CLEANED) as app:
        gr.Markdown("# zoo")
        sides = []
        with gr.Row():
            for number, label in enumerate(("Checkpoint", "Compare with")):
                with gr.Column(), gr.Row(equal_height=True):
                    more = {"allow_custom_value": True, "filterable": True, "scale": 3}
                    offered, value = ([NOTHING], NOTHING) if number else (names, first)
                    name = gr.Dropdown(offered, value=value, label=label, **more)
                    fused = gr.Checkbox(False, label="Fused", scale=1, min_width=100, elem_id=f"fused_{1 + number}")
                    sides.append(Side(name, fused, bool(number)))
        told = gr.HTML(elem_id="about")
        panels = []
        for task, panel in PANELS.items():
            with gr.Column(visible=task == tasks.get(first)) as column:
                panel(gr, shelf, sides)
            panels.append(column)
        one, other = sides
        given: dict[str, Any] = {"inputs": [one.name, other.name], "outputs": [told, other.name, *panels]}
        gr.on([app.load, one.name.change], choose, **given, trigger_mode="always_last", api_visibility="private")
        other.name.change(
            lambda name: [gr.Column(visible=name != NOTHING)] * len(other.columns),
            other.name,
            other.columns,
            api_visibility="private",
        )
    return app


def about(shelf: Shelf, task: str, name: str) -> str:
    """What a checkpoint is, in one line of HTML."""
    model, _, _, config = shelf.take(task, name, False)
    card = plain(str(config.get("card") or "").partition(". ")[0].partition("\n")[0]).rstrip(".")
    parts = [
        card,
        f"{count_parameters(model):,} parameters",
        f"license of the weights: {config.get('license') or 'unknown'}",
    ]
    return f'<p class="about">{html.escape("; ".join(part for part in parts if part))}</p>'


def launched(
    shelf: Shelf, tasks: Mapping[str, str], first: str, host: str, port: int, browser: bool
) -> tuple[gr.Blocks, str]:
    """The running app and its address; ValueError if it cannot start."""
    app = page(shelf, tasks, first)
    theme = Default(primary_hue="blue", font=FONT, font_mono=("ui-monospace", "monospace"))
    theme = theme.set(block_info_text_color="*neutral_600")
    try:
        _, address, _ = app.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=LARGEST,
            footer_links=[],
            theme=theme,
            css=STYLE,
        )
    except Exception as error:  # of the server or of its check of itself
        raise ValueError(f"gradio cannot start the app: {reason(error)}") from error
    return app, address
