"""The card of a checkpoint: README.md in the form of the Hub."""

from collections.abc import Mapping
from typing import Any

import zoo
from zoo.config import Config, field_names
from zoo.inputs import Preprocess
from zoo.outputs import LABELS
from zoo.text import one_line

CARD = """---
{front}
---

# {name}

{text}

| choice or figure | value |
|---|---|
{rows}

Source: {source}. Written by zoo {version}.

```python
import zoo
model, preprocess, {labels}, config = zoo.load_checkpoint({name!r})  # this folder; on the Hub OWNER/{name}
{call}
```
"""


def model_card(
    config: Config,
    written: dict[str, Any],
    preprocess: Preprocess | None,
    name: str,
    text: str | None,
    license: str,
    figures: Mapping[str, object],
) -> str:
    """README.md of a checkpoint, in Markdown with the Hub's front matter.

    Args:
        config: that of the model, which says what it does, how it is called and what is to be shown.
        written: config.json.
        preprocess: how a raw input becomes the model's.
        name: of the checkpoint.
        text: what the model is; a plain sentence where None.
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
    rows = {field: config.described(field) for field in shown}
    rows |= {"fused": "yes" if written["fused"] else "no"} | dict(figures)
    prepared = config.argument if preprocess is None else f"preprocess({preprocess.raw})[None]"
    return CARD.format(
        front=front.to_yaml(),
        name=name,
        text=text or f"A `{written['preset'] or written['family']}` of the zoo.",
        rows="\n".join(f"| {one_line(key)} | {one_line(value)} |" for key, value in rows.items()),
        source=written["source"] or "not stated",
        version=zoo.__version__,
        labels="labels" if config.labels is None else LABELS[config.labels].variable,
        call=config.call(prepared),
    )
