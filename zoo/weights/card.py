"""The card of a checkpoint: README.md in the Hub's format."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zoo
from zoo.config import Config, field_names
from zoo.inputs import Preprocess
from zoo.outputs import LABELS
from zoo.quick import CARD_HEAD, card
from zoo.text import one_line, plain

CARD = """---
{front}
---

# {title}

{text}

{head}
|---|---|
{rows}

Source: {source}. Written by zoo {version}.

```python
import zoo

# this folder; on the Hub OWNER/{title}
checkpoint = zoo.load_checkpoint({name!r})
{given}{answer}model, preprocess, {labels}, config = checkpoint
{call}
```
"""


def _cell(value: object) -> str:
    """A cell of the table, with `|` escaped."""
    if isinstance(value, float) and not math.isfinite(value):
        value = "NaN" if math.isnan(value) else "infinite"
    return one_line(value).replace("|", "\\|")


def usual_text(written: Mapping[str, Any]) -> str:
    """The text of a card where none is given."""
    return f"A `{written['preset'] or written['family']}` model built with zoo."


def kept_facts(folder: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's card says, as arguments of `save_model`: source, license, card and metrics."""
    license, text, rows = card(folder)
    names = [*rows]
    metrics = names[names.index("parameters") + 1 :] if "parameters" in names else []
    return {
        "source": written["source"],
        "license": license or "unknown",
        "card": "" if text == usual_text(written) else text,
        "metrics": {name: rows[name] for name in metrics},
    }


def model_card(
    config: Config,
    written: dict[str, Any],
    preprocess: Preprocess | None,
    name: str,
    text: str,
    license: str,
    figures: Mapping[str, object],
) -> str:
    """README.md of a checkpoint, in Markdown with the Hub's front matter.

    Args:
        config: that of the model, with its task, its call and the fields to show.
        written: config.json.
        preprocess: from a raw input to the model's input.
        name: of the checkpoint.
        text: what the model is; a plain sentence where it is empty.
        license: of the weights, by its name on the Hub.
        figures: further rows of the table.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        library_name="zoo",
        license=license,
        pipeline_tag=config.pipeline_tag,
        tags=list(dict.fromkeys(["zoo", written["family"], *config.tags])),
    )
    shown = config.shown or field_names(config)
    rows: dict[str, object] = {field: config.described(field) for field in shown}
    rows |= {"fused": "yes" if written["fused"] else "no"} | dict(figures)
    if preprocess is None:
        given, prepared = "# it has no preprocess, so prepare the model's inputs yourself", config.argument
    else:
        given, prepared = f"{preprocess.raw} = {preprocess.file!r}", f"preprocess({preprocess.raw})[None]"
    call = config.call(prepared)
    return CARD.format(
        head=CARD_HEAD,
        front=front.to_yaml(),
        title=plain(name),
        name=name,
        text=text or usual_text(written),
        rows="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()),
        source=one_line(written["source"]) if written["source"] else "not stated",
        version=zoo.__version__,
        labels="labels" if config.labels is None else LABELS[config.labels].variable,
        given=f"{given}\n" if prepared in call else "",
        answer=f"answer = checkpoint({preprocess.raw})\n" if preprocess is not None and config.answers else "",
        call=call,
    )
