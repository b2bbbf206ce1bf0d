"""The card of a checkpoint: README.md in the form of the Hub."""

from collections.abc import Mapping
from typing import Any

import zoo
from zoo.layer import parse

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
from zoo.weights import load_checkpoint
model, preprocess, {labels}, config = load_checkpoint({name!r})  # this folder; on the Hub OWNER/{name}
{call}
```
"""


def model_card(
    written: dict[str, Any], name: str, text: str | None, license: str, figures: Mapping[str, object]
) -> str:
    from huggingface_hub import ModelCardData

    model = written["model"]
    choices = {field: model[field] for field in ("mixer", "norm", "placement", "channel", "position", "ffn")}
    parts = [parse(name)[0] for choice in choices.values() for name in _names(choice)]
    front = ModelCardData(
        library_name="zoo",
        license=license,
        pipeline_tag=_pipeline(model),
        tags=list(dict.fromkeys(["zoo", written["family"], *(part for part in parts if part != "none")])),
    )
    rows = {field: _listed(choice) for field, choice in choices.items()}
    fields = ("dim", "depth", "heads", "classes", "layout", "conv", "conv_norm", "head", "vocabulary")
    rows |= {field: _listed(model[field]) for field in fields[: 4 if "classes" in model else None] if field in model}
    rows |= {"fused": "yes" if written["fused"] else "no"} | dict(figures)
    return CARD.format(
        front=front.to_yaml(),
        name=name,
        text=text or f"A `{written['preset'] or written['family']}` of the zoo.",
        rows="\n".join(f"| {one_line(key)} | {one_line(value)} |" for key, value in rows.items()),
        source=written["source"] or "not stated",
        version=zoo.__version__,
        labels="labels" if "classes" in model else "tokenizer",
        call=_call(model, written["preprocess"] is not None),
    )


def _pipeline(model: dict[str, Any]) -> str:
    if "classes" in model:
        return "image-classification" if model["classes"] else "image-feature-extraction"
    return "automatic-speech-recognition" if model["vocabulary"] else "feature-extraction"


def _call(model: dict[str, Any], prepared: bool) -> str:
    if "classes" in model:
        return "logits = model(preprocess(picture)[None])" if prepared else "output = model(images)"
    made = "logits" if model["vocabulary"] and model["head"].startswith("ctc") else "tokens"
    return f"{made}, lengths = model({'preprocess(waveform)[None]' if prepared else 'features'})"


def _names(choice: Any) -> list[str]:
    """The names in a choice, which may differ from stage to stage and from block to block."""
    return [choice] if isinstance(choice, str) else [name for each in choice for name in _names(each)]


def _listed(value: Any, between: str = ", ") -> str:
    """A value of each stage with commas between them, what blocks take in turns with a slash."""
    return between.join(_listed(each, " / ") for each in value) if isinstance(value, tuple) else str(value)


def one_line(value: object) -> str:
    reason = getattr(value, "strerror", None) or str(value) or type(value).__name__
    return " ".join(reason.split())[:300]
